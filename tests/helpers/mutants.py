# SPDX-License-Identifier: Apache-2.0
"""Faulty copies of kernels, and what the emulator must say of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fmha_runtime import config
from fmha_runtime.device import emulator
from fmha_runtime.device.emulator import Order
from fmha_runtime.errors import EmulatorFault
from fmha_runtime.kernels import catalog, sources
from fmha_runtime.kernels.spec import KernelSpec
from fmha_runtime.ops import obtain

Run = Callable[[emulator.Kernel, KernelSpec], tuple[torch.Tensor, ...]]
"""Runs a problem on a kernel; the output first."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file, and the fault that it must cause; an empty one: a wrong result."""

    file: str
    pattern: str
    replacement: str
    fault: str
    spec: str = "fmha_fwd_sm90_bf16_d64"


def mutate(mutant: Mutant, folder: Path) -> None:
    shutil.copytree(config.kernel_src() / "fmha", folder)
    text = (folder / mutant.file).read_text()
    changed, count = re.subn(mutant.pattern, mutant.replacement, text)
    assert count == 1, f"{mutant.pattern!r} matches {count} times in {mutant.file}, not once"
    (folder / mutant.file).write_text(changed)


def assert_caught(mutant: Mutant, folder: Path, run: Run, orders: Iterable[Order] = Order) -> None:
    """A mutant, made in ``folder``, faults as it says in each of these orders, or else computes something else."""
    spec = KernelSpec.parse(mutant.spec)
    mutate(mutant, folder)
    kernel = obtain.from_source(sources.render(spec, catalog.tile(spec)), spec.name, [folder])
    for kernel.order in orders:
        if mutant.fault:
            with pytest.raises(EmulatorFault, match=mutant.fault) as caught:
                run(kernel, spec)
            assert spec.name in str(caught.value)
        else:
            good, bad = run(obtain.kernel(spec, device="emulator"), spec)[0], run(kernel, spec)[0]
            assert not torch.allclose(good.float(), bad.float(), atol=0.1)


def assert_the_same_in_every_order(spec: KernelSpec, run: Run) -> None:
    """The kernel as it is faults in no order, leaves no NaN and computes the same bits."""
    kernel = obtain.kernel(spec, device="emulator")
    results = []
    for kernel.order in Order:
        results.append(run(kernel, spec))
    assert not any(each.isnan().any() for each in results[0])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
