# SPDX-License-Identifier: Apache-2.0
"""A long job says how long it will take before it starts, and corrects itself by its own pace."""

from __future__ import annotations

import pytest

from fmha_runtime.cli import progress
from fmha_runtime.cli.progress import Pace, duration
from fmha_runtime.kernels import catalog
from fmha_runtime.kernels.spec import Arch

SM80 = [spec for spec in catalog.enumerate_specs() if spec.arch is Arch.SM80][:10]


class Clock:
    """Seconds, as a test sets them."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_before_anything_is_done_it_guesses_by_the_measured_rate():
    assert Pace(SM80, 2, Clock()).left() == pytest.approx(10 * progress._SECONDS[Arch.SM80] / 2)


def test_it_corrects_itself_by_its_own_pace():
    clock = Clock()
    pace = Pace(SM80, 2, clock)
    for spec in SM80[:4]:
        pace.done(spec)
    clock.now += 40.0  # ten seconds a kernel, all compilers together
    assert pace.left() == pytest.approx(60.0)
    for spec in SM80[4:]:
        pace.done(spec)
    assert pace.left() == 0


def test_one_kernel_of_the_first_wave_says_nothing_yet():
    clock = Clock()
    pace = Pace(SM80, 8, clock)
    rough = pace.left()
    pace.done(SM80[0])
    clock.now += 0.25
    assert pace.left() == pytest.approx(rough - 0.25)
    clock.now += 1000
    assert pace.left() == 0


def test_every_arch_has_a_measured_rate():
    assert set(progress._SECONDS) == set(Arch)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "5 s"), (33, "35 s"), (89, "90 s"), (100, "2 min"), (3500, "58 min"), (4200, "1 h 10 min")],
)
def test_durations_are_for_people(seconds, words):
    assert duration(seconds) == words
