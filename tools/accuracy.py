# SPDX-License-Identifier: Apache-2.0
"""Errors against an fp64 reference, feature by feature: this library's next to those of torch, on the same tensors.

    python tools/accuracy.py                 writes docs/accuracy/GPU_DATE.json
    python tools/gen_tables.py               then writes the table of docs/accuracy.md

torch's scaled_dot_product_attention runs with each of its backends that takes the case: masks, windows and chunks as a
bool mask, ALiBi as a float bias, pages gathered beforehand. Where it has no such feature (softcap, sinks), and besides
it everywhere, the explicit formula stands: both products in the input dtype, softmax in float32.

Exits with 1 when this library's relative L2 error is more than twice that of the best of them in any case, or its
largest error more than twice that of the best of those that fuse (of all, where none does).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import fmha_runtime as fmha  # noqa: E402
from fmha_runtime import records  # noqa: E402
from fmha_runtime.device import driver  # noqa: E402
from fmha_runtime.ops.forward import reference  # noqa: E402

SCHEMA = 1
OURS = "ours"
FEATURES = ("plain", "causal", "window", "alibi", "softcap", "packed", "paged", "sinks", "chunk")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
HEAD_DIMS = (64, 104, 128, 256)
FUSED = ("flash", "cudnn", "efficient")
PAGE = 64


def make(
    feature: str, dtype: torch.dtype, d: int, seqlen: int, device: str
) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """q, k, v of 2 sequences, 8 query and 2 key heads, and the options that ask for the feature."""
    random = torch.Generator(device).manual_seed(FEATURES.index(feature) * 1000 + d)

    def normal(heads: int) -> Any:
        return torch.randn(2, seqlen, heads, d, generator=random, device=device).to(dtype)

    options: dict[str, Any] = {"causal": feature not in ("plain", "packed", "paged")}
    if feature == "window":
        options["window"] = (seqlen // 4 - 1, 0)
    elif feature == "alibi":
        options["alibi_slopes"] = fmha.alibi_slopes(8).to(device)
    elif feature == "softcap":
        options["softcap"] = 5.0
    elif feature == "packed":
        mask = torch.rand(2, 8, seqlen, seqlen, generator=random, device=device) < 0.5
        options["mask"] = mask | torch.eye(seqlen, dtype=torch.bool, device=device)
    elif feature == "sinks":
        options["sinks"] = torch.randn(8, generator=random, device=device)
    elif feature == "chunk":
        options["attention_chunk"] = seqlen // 4
    return (normal(8), normal(2), normal(2)), options


def ours(feature: str, tensors: Sequence[Any], options: dict[str, Any], emulator: str | None) -> tuple[Any, str]:
    """This library's output and the kernel's name."""
    q, k, v = tensors
    if feature != "paged":
        chosen = fmha.explain(q, k, v, device=emulator, **options).chosen
        return fmha.attention(q, k, v, device=emulator, **options), chosen.name if chosen else ""
    count = -(-k.shape[1] // PAGE)
    table = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0)).view(2, count).int().to(q.device)
    pools = []
    for x in (k, v):
        pool = x.new_full((2 * count, PAGE, *x.shape[2:]), math.nan)
        padded = x.new_full((2, count * PAGE, *x.shape[2:]), math.nan)
        padded[:, : x.shape[1]] = x
        pool[table.flatten().long()] = padded.unflatten(1, (count, PAGE)).flatten(0, 1)
        pools.append(pool)
    used = torch.full((2,), k.shape[1], dtype=torch.int32, device=q.device)
    lengths = {"page_table": table, "device": emulator, **options}
    chosen = fmha.explain(q, *pools, seqused_k=used, **lengths).chosen
    out = fmha.attention_with_kvcache(q, *pools, cache_seqlens=used, **lengths)
    return out, chosen.name if chosen else ""


def peers(feature: str, tensors: Sequence[Any], options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, output [B, S, H, D]) of everyone who takes the case."""
    yield "explicit", reference.baseline(*tensors, **options)[0]
    if feature in ("softcap", "sinks"):
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in tensors)
    k, v = (x.repeat_interleave(4, 1) for x in (k, v))
    backends = {
        "math": SDPBackend.MATH,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for name, backend in backends.items():
        for bias in biases(feature, q, options):
            if name == "cudnn" and bias is not None and bias.dtype not in (torch.bool, q.dtype):
                continue  # torch takes it and reads its bytes as q's dtype (pytorch#191612): the output is nonsense
            try:
                with warnings.catch_warnings(), sdpa_kernel(backend):
                    warnings.simplefilter("ignore")
                    causal = options["causal"] and bias is None
                    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
            except RuntimeError:
                continue  # this backend does not take the case, or not in this form
            yield name, out.transpose(1, 2)
            break


def biases(feature: str, q: Any, options: dict[str, Any]) -> list[Any]:
    """The forms in which SDPA may take what a feature hides or adds: None, a bool mask, a float bias."""
    if feature in ("plain", "causal", "paged"):
        return [None]
    if feature == "packed":
        return [options["mask"]]
    seqlen = q.shape[2]
    at = torch.arange(seqlen, device=q.device)
    past = at[:, None] - at
    seen = past >= 0
    if feature == "window":
        return [seen & (past <= options["window"][0])]
    if feature == "chunk":
        chunk = options["attention_chunk"]
        return [seen & (at[:, None] // chunk == at // chunk)]
    bias = -options["alibi_slopes"].view(1, -1, 1, 1) * past.abs()
    bias = bias.masked_fill(~seen, -math.inf).expand(q.shape[0], -1, -1, -1)
    return [bias.contiguous(), bias.to(q.dtype).contiguous()]


def measure(
    features: Sequence[str], dtypes: Sequence[str], dims: Sequence[int], seqlen: int, device: str, emulator: str | None
) -> list[dict[str, Any]]:
    """One row per case and provider."""
    rows = []
    for feature in features:
        for dtype in dtypes:
            for d in dims:
                tensors, options = make(feature, DTYPES[dtype], d, seqlen, device)
                ref, _ = reference.attention(*tensors, **options)
                out, kernel = ours(feature, tensors, options, emulator)
                for name, got in ((OURS, out), *peers(feature, tensors, options)):
                    error = got.double() - ref
                    rows.append(
                        {
                            **{"feature": feature, "dtype": dtype, "head_dim": d, "provider": name},
                            "kernel": kernel if name == OURS else None,
                            "rel_l2": float(f"{float(error.norm() / ref.norm()):.4g}"),
                            "max_abs": float(f"{float(error.abs().nan_to_num(nan=math.inf).max()):.4g}"),
                        }
                    )
    return rows


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case: this library's errors over the yardsticks', and whether both are at most 2.

    Raises:
        ValueError: a case without this library, or with nobody to compare it with.
    """
    found = []
    for case in dict.fromkeys((row["feature"], row["dtype"], row["head_dim"]) for row in rows):
        mine = {r["provider"]: r for r in rows if (r["feature"], r["dtype"], r["head_dim"]) == case}
        own = mine.pop(OURS, None)
        if own is None or not mine:
            raise ValueError(f"{case}: {OURS} and somebody to compare it with are needed, {sorted(mine)} are there")
        fused = [r for name, r in mine.items() if name in FUSED] or list(mine.values())
        l2 = own["rel_l2"] / min(r["rel_l2"] for r in mine.values())
        largest = own["max_abs"] / min(r["max_abs"] for r in fused)
        good = l2 <= 2 and largest <= 2
        found.append({"case": case, "l2_ratio": l2, "max_ratio": largest, "ok": good})
    return found


def meta(device: str, seqlen: int) -> dict[str, Any]:
    """Where and with what the errors were measured."""
    name = "CPU emulator"
    if device != "cpu":
        info = driver.device_info(torch.cuda.current_device())
        name = info.name
    return {
        **{"gpu": name, "torch": torch.__version__, "commit": records.commit(), "seqlen": seqlen},
        **{"cudnn": torch.backends.cudnn.version(), "date": records.now()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=FEATURES)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--head-dims", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--emulator", metavar="ARCH", help="CPU tensors on the emulator of this arch; slow")
    parser.add_argument("--json", type=Path, help="default docs/accuracy/GPU_DATE.json; none for the emulator")
    given = parser.parse_args(arguments)
    device = "cpu" if given.emulator else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no GPU: --emulator sm90 with a small --seqlen runs on the CPU", file=sys.stderr)
        return 3
    emulator = f"emulator:{given.emulator}" if given.emulator else None
    rows = measure(given.features, given.dtypes, given.head_dims, given.seqlen, device, emulator)
    record = {"schema": SCHEMA, "meta": meta(device, given.seqlen), "rows": rows}
    judged = verdicts(rows)
    for one in judged:
        feature, dtype, d = one["case"]
        word = "ok  " if one["ok"] else "FAIL"
        print(f"{word}  {feature:8} {dtype} d{d:<4} L2 x{one['l2_ratio']:.2f}  largest x{one['max_ratio']:.2f}")
    path = given.json
    if path is None and device == "cuda":
        gpu = record["meta"]["gpu"].lower().replace("nvidia ", "").replace(" ", "_")
        path = ROOT / "docs" / "accuracy" / f"{gpu}_{record['meta']['date'][:10]}.json"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        head = json.dumps(record["meta"])
        path.write_text(f'{{"schema": {SCHEMA}, "meta": {head}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)
    bad = sum(not one["ok"] for one in judged)
    print(f"{len(judged) - bad} of {len(judged)} cases within twice the error of the best peer", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
