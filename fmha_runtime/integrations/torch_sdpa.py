# SPDX-License-Identifier: Apache-2.0
"""torch's scaled_dot_product_attention: ``activate_flash_attention_impl("fmha")``. Tested with torch 2.11 and 2.13.

torch keeps a registry of implementations that may stand in for its flash-attention kernels. ``register()`` puts this
library into it; activating it replaces two operators on CUDA, ``_scaled_dot_product_flash_attention`` (what SDPA calls
once it has chosen its flash backend: see ``torch.nn.attention.sdpa_kernel``) and ``_flash_attention_forward`` (nested
tensors, ``torch.nn.attention.varlen``). A call that the kernels do not compute goes to torch's own kernel, as if nobody
had stepped in between; ``Registration.passed_on`` counts why. Calls that need a gradient are among them.

A kernel that exists but was not built, or is damaged, is an error: that is no reason to be slow in silence.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

from ..errors import InputError, UnsupportedProblem

if TYPE_CHECKING:
    import torch

KEY = "CUDA"
"""The dispatch key whose kernels are replaced."""

_SDPA = "_scaled_dot_product_flash_attention"
_FORWARD = "_flash_attention_forward"
_REMEMBERED = 1024


class Registration:
    """The implementation as torch's registry knows it, and the way back.

    Attributes:
        name: in the registry.
        calls: how many calls ran on this library.
        passed_on: reasons why calls went to torch's own kernels, and how many.
    """

    def __init__(self, name: str, device: str | None) -> None:
        self.name, self.calls = name, 0
        self.passed_on: Counter[str] = Counter()
        self._device = device
        self._library: Any = None
        self._refused: dict[Any, str] = {}
        self._inside = threading.local()  # .own: torch's own kernel runs in this thread

    def activate(self) -> None:
        """``torch.nn.attention.activate_flash_attention_impl(name)``: from now on in this process.

        Raises:
            UnsupportedProblem: this torch has no CUDA flash attention to stand in for.
        """
        import torch.nn.attention

        torch.nn.attention.activate_flash_attention_impl(self.name)

    @property
    def active(self) -> bool:
        """Whether calls come here now."""
        return self._library is not None

    def remove(self) -> None:
        """Gives the operators back to torch and leaves the registry. A second call does nothing."""
        import torch.nn.attention

        if self.active and torch.nn.attention.current_flash_attention_impl() == self.name:
            torch.nn.attention.restore_flash_attention_impl()
        self._restore()
        implementations = torch.nn.attention._registry._FLASH_ATTENTION_IMPLS
        if implementations.get(self.name) == self._install:
            del implementations[self.name]

    def _install(self) -> _Handle:
        """What the registry calls to activate."""
        import torch

        self._restore()
        try:
            own = {name: torch.library.get_kernel(f"aten::{name}", KEY) for name in (_SDPA, _FORWARD)}
        except RuntimeError as error:
            raise UnsupportedProblem(
                f"torch {torch.__version__} has no CUDA flash attention to stand in for ({error}): install a CUDA "
                "build of torch, or call fmha_runtime.attention itself"
            ) from error
        library = torch.library.Library("aten", "IMPL", KEY)
        with warnings.catch_warnings():  # torch warns of what is the point here
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name, run in ((_SDPA, self._sdpa), (_FORWARD, self._forward)):
                library.impl(name, self._standing_in(run, own[name]), KEY, with_keyset=True, allow_override=True)
        self._library = library
        return _Handle(self)

    def _restore(self) -> None:
        if self._library is not None:
            self._library._destroy()
        self._library = None

    def _standing_in(self, run: Any, own: Any) -> Any:
        """The kernel that is put in place: ``run``, and where it has a reason not to, torch's own."""

        def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
            # torch's SDPA kernel calls the other operator: a call that was passed on stays passed on.
            if getattr(self._inside, "own", False):
                return own.call_boxed(keys, *args, **kwargs)
            result = run(*args, **kwargs)
            if not isinstance(result, str):
                self.calls += 1
                return result
            self.passed_on[result] += 1
            self._inside.own = True
            try:
                return own.call_boxed(keys, *args, **kwargs)
            finally:
                self._inside.own = False

        return kernel

    def _sdpa(
        self, query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False,
        return_debug_mask: bool = False, *, scale: float | None = None,
    ) -> Any:  # fmt: skip
        """[B, H, S, D] tensors; the output has the strides of the query, as torch's has."""
        import torch

        reason = _why_not(query, key, value, dropout_p, return_debug_mask)
        if reason is None and is_causal and query.shape[2] != key.shape[2]:
            reason = "causal with different lengths: rows without keys have another LSE in torch"
        if reason is not None:
            return reason
        out = torch.empty_like(query)
        options = {"causal": is_causal, "scale": scale, "out": out.transpose(1, 2)}
        lse = self._attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), options)
        if isinstance(lse, str):
            return lse
        return (out, lse, None, None, query.shape[2], key.shape[2], *_randomness(query))

    def _forward(
        self, query: Any, key: Any, value: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: int, max_k: int,
        dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
        window_size_left: int | None = None, window_size_right: int | None = None, seqused_k: Any = None,
        alibi_slopes: Any = None, block_table: Any = None, num_splits: int | None = None,
    ) -> Any:  # fmt: skip
        """[B, S, H, D], or [T, H, D] with offsets. ``num_splits`` is advice to another kernel."""
        import torch

        reason = _why_not(query, key, value, dropout_p, return_debug_mask)
        if reason is None and alibi_slopes is not None:
            reason = "ALiBi slopes"
        if reason is None and block_table is not None:
            reason = "a page table"
        if reason is not None:
            return reason
        out = torch.empty_like(query)
        right = None if is_causal else window_size_right
        options: dict[str, Any] = {
            "causal": is_causal, "window": (window_size_left, right), "scale": scale, "seqused_k": seqused_k, "out": out
        }  # fmt: skip
        offsets = () if cum_seq_q is None else (cum_seq_q, cum_seq_k, max_q, max_k)
        lse = self._attend(query, key, value, options, offsets)
        if isinstance(lse, str):
            return lse
        # torch's LSE of a row without keys is +inf, so that its backward finds exp(s - lse) = 0.
        lse.nan_to_num_(nan=float("nan"), posinf=float("inf"), neginf=float("inf"))
        return (out, lse, *_randomness(query))

    def _attend(self, q: Any, k: Any, v: Any, options: dict[str, Any], offsets: tuple[Any, ...] = ()) -> Any:
        """The LSE, with the output in ``options["out"]``; or why these tensors cannot be computed here."""
        from .. import attention, attention_varlen

        if self._refused and (before := self._refused.get(_question(q, k, v, options, offsets))) is not None:
            return before  # what was refused once is not tried again
        call = attention_varlen if offsets else attention
        try:
            result: Any = call(q, k, v, *offsets, return_lse=True, device=self._device, **options)
            return result[1]
        except (InputError, UnsupportedProblem) as error:
            if len(self._refused) >= _REMEMBERED:
                self._refused.clear()
            self._refused[_question(q, k, v, options, offsets)] = str(error)
            return str(error)


class _Handle:
    """What torch's registry keeps while the implementation is active."""

    def __init__(self, registration: Registration) -> None:
        self._registration = registration

    def remove(self) -> None:
        self._registration._restore()


def register(name: str = "fmha", *, device: str | None = None) -> Registration:
    """Puts this library into torch's registry of flash attentions. Nothing changes before it is activated.

    Args:
        name: for ``torch.nn.attention.activate_flash_attention_impl(name)``, or ``Registration.activate()``.
        device: passed to ``attention``.

    Raises:
        UnsupportedProblem: this torch has no such registry.
        InputError: the name is that of another implementation.
    """
    import torch.nn.attention

    if not hasattr(torch.nn.attention, "register_flash_attention_impl") or not hasattr(torch.library, "get_kernel"):
        raise UnsupportedProblem(
            f"torch {torch.__version__} has no registry of flash attentions "
            "(torch.nn.attention.register_flash_attention_impl): install torch 2.11 or newer, or call "
            "fmha_runtime.attention itself"
        )
    if name in torch.nn.attention.list_flash_attention_impls():
        raise InputError(
            f"torch's registry has a flash attention named {name!r} already: remove() it, or choose a name"
        )
    registration = Registration(name, device)
    torch.nn.attention.register_flash_attention_impl(name, register_fn=registration._install)
    return registration


def _why_not(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, debug: bool) -> str | None:
    """Why a call is torch's own affair, as far as a glance tells; None: it is worth trying."""
    import torch

    if dropout:
        return "dropout"
    if debug:
        return "a debug mask"
    if (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled():
        return "a gradient is needed"
    if q.shape[-1] != v.shape[-1]:
        return "head dims of K and V differ"
    if 0 in q.shape or 0 in k.shape:
        return "an empty tensor"
    return None


def _question(q: Any, k: Any, v: Any, options: dict[str, Any], offsets: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that a refusal can depend on: geometry, alignment, options."""
    tensors = [t for t in (q, k, v, *options.values(), *offsets) if hasattr(t, "stride")]
    others = tuple(x for x in (*options.values(), *offsets) if not hasattr(x, "stride"))
    return (*((t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16) for t in tensors), others)


def _randomness(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seed, offset and mask of a dropout that there is not."""
    import torch

    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    return seed, torch.empty((), dtype=torch.uint64, device=q.device), q.new_empty(0)
