# SPDX-License-Identifier: Apache-2.0
"""The look-alikes in ``sys.modules``, and the way back."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType

from ..errors import FmhaError
from . import bert_padding, shared

_replaced: dict[str, ModuleType | None] = {}  # what install() found in sys.modules under the names that it took


def put(interface: ModuleType, *, fa3: bool, device: str | None, force: bool) -> None:
    """``install`` of ``interface``, the module of FlashAttention 2's functions. Raises FmhaError: see there."""
    uninstall()
    taken = {"flash_attn", *(("flash_attn_interface", "flash_attn_3") if fa3 else ())}
    real = [name for name in sys.modules if name.partition(".")[0] in taken]
    if real and not force:
        raise FmhaError(
            f"{', '.join(sorted(real))} was imported already: call install() before whatever imports it, or "
            "install(force=True) to replace it for imports from now on"
        )
    ours = _version_2(interface) + (_version_3() if fa3 else [])
    for name in {*real, *(module.__name__ for module in ours)}:
        _replaced[name] = sys.modules.pop(name, None)
    for module in ours:
        sys.modules[module.__name__] = module
        parent, _, own = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    shared.device = device


def uninstall() -> None:
    """Puts back what ``install()`` found. Without an installation it does nothing."""
    for name, before in _replaced.items():
        sys.modules.pop(name, None)
        if before is not None:
            sys.modules[name] = before
    _replaced.clear()
    shared.device = None


def _version_2(interface: ModuleType) -> list[ModuleType]:
    from . import rotary

    package = _module("flash_attn", interface, interface.FUNCTIONS, package=True)
    package.__dict__["__version__"] = interface.VERSION
    padding = _module("flash_attn.bert_padding", bert_padding, bert_padding.FUNCTIONS)
    padding.__dict__["__getattr__"] = bert_padding.__getattr__
    return [
        package,
        _module("flash_attn.flash_attn_interface", interface, interface.FUNCTIONS),
        padding,
        _module("flash_attn.layers", rotary, (), package=True),
        _module("flash_attn.layers.rotary", rotary, (*rotary.LAYERS, "apply_rotary")),
        _module("flash_attn.ops", rotary, (), package=True),
        _module("flash_attn.ops.triton", rotary, (), package=True),
        _module("flash_attn.ops.triton.rotary", rotary, ("apply_rotary",)),
    ]


def _version_3() -> list[ModuleType]:
    from . import flash_attn_3

    functions = flash_attn_3.FUNCTIONS
    return [
        _module("flash_attn_interface", flash_attn_3, functions),
        _module("flash_attn_3", flash_attn_3, (), package=True),
        _module("flash_attn_3.flash_attn_interface", flash_attn_3, functions),
    ]


def _module(name: str, source: ModuleType, names: Iterable[str], *, package: bool = False) -> ModuleType:
    module = ModuleType(name, f"{name} by fmha_runtime.compat.\n\n{source.__doc__}")
    module.__spec__ = ModuleSpec(name, None, is_package=package)  # importlib.util.find_spec looks at it
    if package:
        module.__path__ = []  # a module of it that is not here is a ModuleNotFoundError
    module.__dict__.update((each, getattr(source, each)) for each in names)
    return module
