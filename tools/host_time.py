# SPDX-License-Identifier: Apache-2.0
"""Microseconds of host time per call, next to torch's: what a launch-bound model (small batches, decoding) pays.

    python tools/host_time.py [--out host_time.json] [--only attention,plan.run] [--profile plan.run]

One process, batch 1, 128 tokens, 8 heads, head dim 128, bf16, inference mode. Each number is the median over batches of
100 calls, which fit into the launch queue, so that nobody waits for the GPU; batches of all callers take turns. Then
calls with lengths not seen before (new_lengths.py). Needs a GPU; missing kernels are built.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import new_lengths

SHAPE = (1, 128, 8, 128)
CALLS = 100
BATCHES = 21
GOALS = {"attention": 12.0, "plan.run": 8.0}

FIRST = """
import time, torch
x = torch.randn(1, 128, 8, 128, dtype=torch.bfloat16, device="cuda")
y = x[..., :64].contiguous()
torch.nn.functional.scaled_dot_product_attention(x, x, x)
torch.cuda.synchronize()
begin = time.perf_counter()
import fmha_runtime as fmha
fmha.attention(x, x, x)
first = time.perf_counter()
fmha.attention(y, y, y)
print(1e3 * (first - begin), 1e3 * (time.perf_counter() - first))
"""
"""A fresh process in which torch has used the GPU: milliseconds of import and first call, and of one more kernel."""

Context = Callable[[], AbstractContextManager[Any]]
Callers = dict[str, tuple[Callable[[], Any], Context]]


def main() -> int:
    """Returns 0, or 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    parser.add_argument("--only", help="callers, with commas between them")
    parser.add_argument("--new-lengths", type=int, default=10_000, metavar="N", help="calls with new lengths; 0 = none")
    parser.add_argument("--profile", help="also print cProfile's view of this caller")
    given = parser.parse_args()
    os.environ.setdefault("FMHA_BUILD_ON_DEMAND", "1")
    import torch

    if not torch.cuda.is_available():
        print(
            "host_time.py needs a GPU: what the driver and torch's CUDA allocator cost is most of it", file=sys.stderr
        )
        return 3
    with torch.inference_mode():
        ready, absent = prepare(callers(torch, "cuda"), given.only)
        times = measure(torch, ready)
        new = new_lengths.measure(torch, "cuda", given.new_lengths) if given.new_lengths else {}
        if given.profile:
            profile(ready[given.profile])
    rows = {
        name: {"median_us": round(statistics.median(t), 2), "best_us": round(min(t), 2)} for name, t in times.items()
    }
    for name, row in rows.items():
        goal = f"  goal {GOALS[name]:.0f}" if name in GOALS else ""
        print(f"{name:24} {row['median_us']:8.2f} us   best {row['best_us']:8.2f}{goal}")
    for name, reason in absent.items():
        print(f"{name:24} absent: {reason}")
    if new:
        print("\n".join(new_lengths.lines(new)))
    first = first_calls()
    print("import and first call {import_and_call_ms} ms, first call of another kernel {kernel_ms} ms".format(**first))
    if given.out:
        from fmha_runtime import records

        meta = {
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "python": sys.version.split()[0],
            "shape": SHAPE, "date": records.now(), "commit": records.commit(),
        }  # fmt: skip
        given.out.write_text(
            json.dumps({"meta": meta, "host_us": rows, "new_lengths": new, "first": first, "absent": absent}, indent=1)
            + "\n"
        )
    missed = [name for name, goal in GOALS.items() if name in rows and rows[name]["median_us"] > goal]
    return 1 if missed else 0


def first_calls() -> dict[str, float]:
    """``FIRST``, the median of five processes each."""
    runs = [
        [
            float(x)
            for x in subprocess.run([sys.executable, "-c", FIRST], stdout=subprocess.PIPE, check=True).stdout.split()
        ]
        for _ in range(5)
    ]
    load, kernel = (statistics.median(column) for column in zip(*runs, strict=True))
    return {"import_and_call_ms": round(load, 1), "kernel_ms": round(kernel, 2)}


def callers(torch: Any, device: str) -> Callers:
    """Everything that is timed, by name: the call, and the context in which it is made."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    import fmha_runtime as fmha

    q, k, v = (torch.randn(SHAPE, dtype=torch.bfloat16, device=device) for _ in range(3))
    out = torch.empty_like(q)
    cu = torch.tensor([0, SHAPE[1]], dtype=torch.int32, device=device)
    rows = [t[0] for t in (q, k, v)]
    turned = [t.transpose(1, 2) for t in (q, k, v)]
    plan = fmha.plan(q, k, v)
    compiled = torch.compile(lambda q, k, v: fmha.attention(q, k, v), fullgraph=True)
    fmha.register_torch_ops()
    own: Callers = {
        "attention": (lambda: fmha.attention(q, k, v), nullcontext),
        "attention out=": (lambda: fmha.attention(q, k, v, out=out), nullcontext),
        "attention lse causal": (lambda: fmha.attention(q, k, v, causal=True, return_lse=True), nullcontext),
        "attention_varlen": (lambda: fmha.attention_varlen(*rows, cu, cu, SHAPE[1], SHAPE[1]), nullcontext),
        "plan.run": (lambda: plan.run(q, k, v), nullcontext),
        "plan.run out=": (lambda: plan.run(q, k, v, out=out), nullcontext),
        "torch.ops.fmha.fwd": (lambda: torch.ops.fmha.fwd(q, k, v), nullcontext),
        "compiled attention": (lambda: compiled(q, k, v), nullcontext),
        "SDPA plug-in": (lambda: scaled_dot_product_attention(*turned), plugged_in),
    }
    backends = {
        "SDPA flash": SDPBackend.FLASH_ATTENTION,
        "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
        "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
        "SDPA math": SDPBackend.MATH,
    }
    theirs: Callers = {
        name: (lambda: scaled_dot_product_attention(*turned), lambda backend=backend: sdpa_kernel(backend))
        for name, backend in backends.items()
    }
    parts: Callers = {
        "torch.empty": (lambda: torch.empty(SHAPE, dtype=torch.bfloat16, device=device), nullcontext),
        "torch.empty_like": (lambda: torch.empty_like(q), nullcontext),
    }
    return own | theirs | parts


@contextmanager
def plugged_in() -> Iterator[None]:
    """Torch's flash backend, with this library in its place."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from fmha_runtime.integrations import torch_sdpa

    registration = torch_sdpa.register()
    try:
        registration.activate()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
        if registration.passed_on or not registration.calls:
            raise RuntimeError(f"calls went to torch's own kernel: {dict(registration.passed_on)}")
    finally:
        registration.remove()


def prepare(found: Callers, only: str | None) -> tuple[Callers, dict[str, str]]:
    """Who runs, warmed up, and why the others do not."""
    wanted = found if only is None else {name: found[name] for name in only.split(",")}
    ready: Callers = {}
    absent: dict[str, str] = {}
    for name, (call, context) in wanted.items():
        try:
            with context():
                for _ in range(5):
                    call()
            ready[name] = (call, context)
        except Exception as error:  # a peer may be missing for any reason, which is what gets printed
            absent[name] = " ".join(str(error).split())[:200] or type(error).__name__
    return ready, absent


def measure(torch: Any, ready: Callers) -> dict[str, list[float]]:
    """Microseconds per call of each batch."""
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(BATCHES):
        for name, (call, context) in ready.items():
            with context():
                call()
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(CALLS):
                    call()
                times[name].append(1e6 * (time.perf_counter() - begin) / CALLS)
                torch.cuda.synchronize()
    return times


def profile(caller: tuple[Callable[[], Any], Context]) -> None:
    """Where the time of a caller goes; the profiler itself adds most of it, so read the shares."""
    call, context = caller
    with context(), cProfile.Profile() as profiler:
        for _ in range(20 * CALLS):
            call()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    raise SystemExit(main())
