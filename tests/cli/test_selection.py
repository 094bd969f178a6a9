# SPDX-License-Identifier: Apache-2.0
"""Which kernels and which problem the words of a command line mean."""

from __future__ import annotations

import re

import pytest
from helpers.program import PLAIN, SMALL, fmha, names

from fmha_runtime.cli import selection
from fmha_runtime.kernels.spec import Arch


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ([*PLAIN, "--arch", "sm90"], 52),
        ([*PLAIN, "--arch", "sm90", "--arch", "sm80", "--dtype", "bf16"], 52),
        ([*PLAIN, "--head-dim", "192"], 44),
        ([*PLAIN, "--head-dim", "192x128", "--dtype", "fp16"], 11),
        (["--score", "softcap", "--no-paged", "--head-dim", "64", "--arch", "sm80"], 2),
        (["fmha_fwd_sm8?_*_d64"], 6),
        ([SMALL], 1),
        ([*PLAIN, "--op", "fwd"], 156),
        (["--short"], 278),
        (["--short", "--head-dim", "64"], 22),
        (["--no-short", "--head-dim", "64", "--arch", "sm90a"], 16),
        (["--no-short", "--op", "pack"], 5),
        (["--op", "pack"], 5),
        (["--op", "pack", "--arch", "sm90"], 1),
    ],
)
def test_selection(words, count):
    assert len(names(fmha("list", *words))) == count


@pytest.mark.parametrize("command", ["list", "build", "verify", "inspect"])
def test_nothing_selected(command):
    device = ["--device", "emulator"] if command == "verify" else []
    result = fmha(command, "fmha_fwd_sm80_bf16_d33", *device)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert SMALL in result.stderr
    assert "fmha list" in result.stderr


def test_nearest_names_respect_the_options():
    result = fmha("list", "--arch", "sm90", "--dtype", "e4m3", "--head-dim", "64")
    assert result.exit_code == 2
    near = re.findall(r"fmha_\w+", result.stderr)
    assert near
    assert all("_sm90_" in name and "_d64" in name for name in near[:2])


def test_nothing_short_is_selected():
    result = fmha("list", "--short", "--arch", "sm80", "--op", "fwd")
    assert result.exit_code == 2 and "op fwd, arch sm80, short" in result.stderr


def test_problem_words():
    problem = selection.problem(
        ["b=2", "sq=3", "h=8", "hk=2", "d=192x128", "dtype=bf16", "window=4,-1", "varlen"],
        Arch.SM90,
    )
    assert (problem.batch, problem.seqlen_q, problem.seqlen_k) == (2, 3, 3)
    assert (problem.heads, problem.heads_k) == (8, 2)
    assert (problem.head_dim, problem.head_dim_v) == (192, 128)
    assert (problem.window, problem.varlen) == ((4, None), True)
