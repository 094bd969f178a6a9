# SPDX-License-Identifier: Apache-2.0
"""Arrays of other libraries (CuPy, JAX, NumPy, Numba) as torch views of the same memory, and results as theirs.

Arrays come by DLPack, or by ``__cuda_array_interface__`` where that is all they have. Both protocols order the streams:
our stream waits for the array's, and its library's for ours when the results go back, so that nothing is read too
early, nor freed too early.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ..errors import InputError

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
R = TypeVar("R")

_IMMUTABLE = ("jax", "jaxlib", "tensorflow")
_KDL_CUDA = 2  # DLDeviceType


def foreign(x: Any) -> bool:
    """Whether x is an array of another library than torch."""
    import torch

    if x is None or isinstance(x, torch.Tensor):
        return False
    return hasattr(x, "__dlpack__") or hasattr(x, "__cuda_array_interface__")


def view(name: str, x: Any) -> Any:
    """A torch tensor on the memory of an array; anything that is no array of another library comes back as it is.

    Raises:
        InputError: the array's library, or torch, does not export or import it without a copy.
    """
    import torch

    if not foreign(x):
        return x
    try:
        return torch.from_dlpack(x) if hasattr(x, "__dlpack__") else _from_cuda_array_interface(x)
    except Exception as error:
        raise InputError(
            f"{name}, a {_kind(x)}, cannot be seen as a torch tensor without a copy "
            f"({type(error).__name__}: {error}): convert it in its own library, or pass a torch tensor"
        ) from error


def views(function: Callable[P, R]) -> Callable[P, R]:
    """The function with every array of another library in its arguments replaced by a view of it."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = [view(f"argument {i + 1}", x) for i, x in enumerate(args)]
        named: Any = {name: view(name, x) for name, x in kwargs.items()}
        return function(*given, **named)

    return wrapped


def call(function: Callable[..., Any], arrays: dict[str, Any], stream: int | None = None, first: str = "q") -> Any:
    """``function`` of torch views of the arrays; its results as arrays of the kind of ``arrays[first]``.

    Args:
        function: takes the views by name; returns a tensor or a tuple of them.
        arrays: by name; None, tensors and anything else are passed on. A given ``out`` is returned itself.
        stream: CUstream handle that the function works on; default torch's current one.
        first: the name of the array that says what kind the results are.

    Raises:
        InputError: an array that torch cannot see, an ``out`` that cannot be written, a library without
            ``from_dlpack`` for the result; and what ``function`` raises.
    """
    out = arrays.get("out")
    if foreign(out) and type(out).__module__.partition(".")[0] in _IMMUTABLE:
        raise InputError(f"out is a {_kind(out)}, which is immutable: leave out= away and take the result, a new array")
    if foreign(out) and not getattr(getattr(out, "flags", None), "writeable", True):
        raise InputError(f"out is a {_kind(out)} that is marked as read-only: pass an array that may be written")
    others = [x for x in arrays.values() if foreign(x)]
    with on_stream(others, stream):
        views = {name: view(name, x) for name, x in arrays.items()}
        found = function(**views)
        results = found if isinstance(found, tuple) else (found,)
        _hand_over(results[0], [x for x in others if x is not arrays[first]])
        results = tuple(like(arrays[first], x) for x in results)
    if out is not None:
        results = (out, *results[1:])
    return results if isinstance(found, tuple) else results[0]


def merge(function: Callable[..., Any], outs: Sequence[Any], lses: Sequence[Any]) -> Any:
    """``merge_states`` of arrays, some of another library: the results are of the kind of outs[0]."""
    parts = {f"outs[{i}]": x for i, x in enumerate(outs)} | {f"lses[{i}]": x for i, x in enumerate(lses)}

    def of_views(**seen: Any) -> Any:
        tensors = list(seen.values())
        return function(tensors[: len(outs)], tensors[len(outs) :])

    return call(of_views, parts, first="outs[0]")


def like(example: Any, tensor: torch.Tensor) -> Any:
    """A tensor as an array of the example's library, on the same memory; its stream waits for torch's.

    Arrays that speak ``__cuda_array_interface__`` only (Numba) get the tensor itself: it speaks that too.
    """
    if not foreign(example):
        return tensor
    convert = _from_dlpack(example)
    if convert is not None:
        return convert(tensor)
    if hasattr(example, "__cuda_array_interface__"):
        _wait_for_torch(example)
        return tensor
    raise InputError(
        f"q is a {_kind(example)}, whose library has no from_dlpack for the result: pass q as a torch tensor "
        "(torch.from_dlpack(q))"
    )


def _from_dlpack(x: Any) -> Callable[[Any], Any] | None:
    """``from_dlpack`` of an array's library: its array namespace, or the module that its type comes from."""
    if not hasattr(x, "__dlpack__"):
        return None
    namespace = x.__array_namespace__() if hasattr(x, "__array_namespace__") else None
    root = sys.modules.get(type(x).__module__.partition(".")[0])
    for owner in (namespace, root):
        found = getattr(owner, "from_dlpack", None)
        if found is not None:
            return found
    return None


def _hand_over(result: torch.Tensor, others: Sequence[Any]) -> None:
    """The libraries of further arrays wait for torch too: theirs may be overwritten or freed after the call."""
    if result.device.type != "cuda":
        return
    seen: set[int] = set()
    for x in others:
        convert = _from_dlpack(x)
        if convert is None:
            _wait_for_torch(x)
        elif id(convert) not in seen:
            seen.add(id(convert))
            convert(result)


def _from_cuda_array_interface(x: Any) -> torch.Tensor:
    """A view on the current device, ordered after the stream that the interface names."""
    import torch

    stream = x.__cuda_array_interface__.get("stream")
    if stream is not None:
        torch.cuda.current_stream().wait_stream(_stream(stream))
    tensor = torch.as_tensor(x, device="cuda")
    address = x.__cuda_array_interface__["data"][0]
    if tensor.numel() and tensor.data_ptr() != address:
        raise InputError("it lies on another GPU than the current one: call within torch.cuda.device(n)")
    return tensor


def _wait_for_torch(x: Any) -> None:
    import torch

    stream = getattr(x, "__cuda_array_interface__", {}).get("stream")
    if stream is not None:
        _stream(stream).wait_stream(torch.cuda.current_stream())


def _stream(handle: int) -> torch.cuda.Stream:
    """The stream that the interface's number names: 1 is the legacy default stream, which torch does not take by it."""
    import torch

    return torch.cuda.default_stream() if handle == 1 else torch.cuda.ExternalStream(handle)


@contextlib.contextmanager
def on_stream(arrays: Sequence[Any], stream: int | None) -> Iterator[None]:
    """The GPU of the arrays and the stream of the call become torch's current ones: the protocols order by those."""
    import torch

    places = [_gpu(x) for x in arrays]
    on_gpu = [place for place in places if place != "cpu"]
    with contextlib.ExitStack() as stack:
        index = next((place for place in on_gpu if place is not None), None)
        if index is not None:
            stack.enter_context(torch.cuda.device(index))
        if stream is not None and on_gpu:
            stack.enter_context(torch.cuda.stream(torch.cuda.ExternalStream(stream)))
        yield


def _gpu(x: Any) -> int | str | None:
    """The index of an array's GPU; None: some GPU; "cpu": none, or no answer (``view`` says what is wrong then)."""
    if not hasattr(x, "__dlpack__"):
        return None
    try:
        kind, index = x.__dlpack_device__()
    except Exception:
        return "cpu"
    return int(index) if int(kind) == _KDL_CUDA else "cpu"


def _kind(x: Any) -> str:
    return f"{type(x).__module__.partition('.')[0]} {type(x).__name__}"
