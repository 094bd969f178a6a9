# SPDX-License-Identifier: Apache-2.0
"""Host time of calls whose lengths were not seen before: what each token of a conversation pays.

host_time.py runs this and records it. Every geometry is random and new; each is called twice, so that the second call
tells what the same call costs when its plan is there. Tensors are made before the clock starts.
"""

from __future__ import annotations

import gc
import importlib
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

FORMS = ("dense", "varlen", "pages", "packed")
HEADS, DIM, LONGEST, MAX_QUERIES = 8, 128, 2048, 64
AT_ONCE = 32
"""Calls between two waits for the GPU, so that its queue never fills."""


class Calls:
    """Random calls of each form, no geometry twice."""

    def __init__(self, torch: Any, device: str, seed: int = 1) -> None:
        import fmha_runtime

        self.torch, self.fmha, self.device, self._random = torch, fmha_runtime, device, random.Random(seed)
        self._pool = torch.randn(2, LONGEST, HEADS, DIM, dtype=torch.bfloat16, device=device)
        self._seen: set[tuple[Any, ...]] = set()

    def __call__(self, form: str) -> Callable[[], Any]:
        """A call of this library."""
        torch, fmha = self.torch, self.fmha
        batch, sq, sk = self._geometry(form)
        q, k, v = self._tensors(batch, sq, sk)
        if form == "dense":
            return lambda: fmha.attention(q, k, v, causal=True)
        if form == "varlen":
            cu_q, cu_k = (self._int32([0, n // 2, n]) for n in (sq, sk))
            q, k, v = q[0], k[0], v[0]
            return lambda: fmha.attention_varlen(q, k, v, cu_q, cu_k, sq, sk, causal=True)
        if form == "pages":
            pages = self._pool.view(-1, 64, HEADS, DIM)
            table, used = self._int32([[0] * (1 + sk // 64)] * batch), self._int32([sk] * batch)
            return lambda: fmha.attention_with_kvcache(
                q, pages, pages, cache_seqlens=used, page_table=table, causal=True
            )
        mask = fmha.pack_mask(torch.ones(sq, sk, dtype=torch.bool, device=self.device))
        return lambda: fmha.attention(q, k, v, mask=mask)

    def peer(self, backend: Any) -> Callable[[], Any]:
        """The same dense call by a backend of torch's SDPA; without its mask, whose alignment differs, and from 64 keys
        up: cuDNN refuses one."""
        from torch.nn.functional import scaled_dot_product_attention

        q, k, v = (t.transpose(1, 2) for t in self._tensors(*self._geometry(str(backend), shortest=64)))
        return lambda: scaled_dot_product_attention(q, k, v)

    def flash_attn_3(self, function: Any) -> Callable[[], Any]:
        """The same dense call by FlashAttention 3."""
        q, k, v = self._tensors(*self._geometry("flash_attn_3"))
        return lambda: function(q, k, v, causal=True)

    def _geometry(self, form: str, shortest: int = 1) -> tuple[int, int, int]:
        pick = self._random.randint
        while True:
            found = (pick(1, 2), pick(1, MAX_QUERIES), pick(shortest, LONGEST))
            if (form, found) not in self._seen:
                self._seen.add((form, found))
                return found

    def _tensors(self, batch: int, sq: int, sk: int) -> tuple[Any, Any, Any]:
        return self._pool[:batch, :sq], self._pool[:batch, :sk], self._pool[:batch, LONGEST - sk :]

    def _int32(self, values: Any) -> Any:
        return self.torch.tensor(values, dtype=self.torch.int32, device=self.device)


def callers(torch: Any, device: str) -> Iterator[tuple[str, Callable[[], Callable[[], Any]]]]:
    """(name, a maker of calls with lengths not seen before): this library in every form, then its peers."""
    from torch.nn.attention import SDPBackend

    calls = Calls(torch, device)
    for form in FORMS:
        yield f"attention, {form}", lambda form=form: calls(form)
    yield "SDPA flash", lambda: calls.peer(SDPBackend.FLASH_ATTENTION)
    yield "SDPA cudnn", lambda: calls.peer(SDPBackend.CUDNN_ATTENTION)
    try:
        function = importlib.import_module("flash_attn_interface").flash_attn_func
    except (ImportError, OSError, RuntimeError):  # a peer may be missing, or lack a library
        return
    yield "FA3", lambda: calls.flash_attn_3(function)


def measure(torch: Any, device: str, count: int) -> dict[str, dict[str, float]]:
    """By caller: microseconds of a call with new lengths (median, 99th percentile) and of the same call again, and the
    growth of the process in MB over all ``count`` calls of this library (a quarter of them of each form)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cudnn": SDPBackend.CUDNN_ATTENTION}
    found: dict[str, dict[str, float]] = {}
    for name, maker in callers(torch, device):
        ours = name.startswith("attention")
        number = count // len(FORMS) if ours else min(count // 20, 300)  # cuDNN makes a plan of 40 ms each time
        if name in backends:
            with sdpa_kernel(backends[name]):
                found[name] = _times(torch, maker, number)
        else:
            found[name] = _times(torch, maker, number)
    return found


def _times(torch: Any, maker: Callable[[], Callable[[], Any]], number: int) -> dict[str, float]:
    for _ in range(5):  # kernels are loaded, other things made once
        maker()()
    torch.cuda.synchronize()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    new, again = [], []
    for begin in range(0, number, AT_ONCE):
        batch = [maker() for _ in range(min(AT_ONCE, number - begin))]
        gc.collect(0)
        for call in batch:
            new.append(_timed(call))
        torch.cuda.synchronize()
        for call in batch:
            again.append(_timed(call))
        torch.cuda.synchronize()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    new.sort()
    return {
        "median_us": round(statistics.median(new), 2), "p99_us": round(new[min(len(new) - 1, len(new) * 99 // 100)], 2),
        "again_us": round(statistics.median(again), 2), "grown_mb": round(grown, 1), "calls": number,
    }  # fmt: skip


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - begin)


def lines(rows: dict[str, dict[str, float]]) -> Iterator[str]:
    """The table for a terminal."""
    yield f"{'calls with new lengths':24} {'median':>9} {'p99':>9} {'again':>9} us   {'grown':>6} MB"
    for name, row in rows.items():
        numbers = (row["median_us"], row["p99_us"], row["again_us"])
        yield f"{name:24} " + " ".join(f"{x:9.2f}" for x in numbers) + f"      {row['grown_mb']:6.1f}"
