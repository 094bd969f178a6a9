# SPDX-License-Identifier: Apache-2.0
"""``fmha explain``: the kernel that serves a problem, why the others do not, and what is no problem."""

from __future__ import annotations

import json
import re

import pytest
from helpers.program import fmha


def test_explain_names_the_kernel_and_the_reasons():
    result = fmha("explain", "d=128", "dtype=bf16", "sq=1000", "sk=4096", "causal", "--arch", "sm90")
    assert result.exit_code == 0
    assert re.search(r"^chosen +fmha_fwd_sm90a_bf16_d128 ", result.stdout, re.MULTILINE)
    assert re.search(r"^rejected +fmha_fwd_sm90_bf16_d128 +computes the same", result.stdout, re.MULTILINE)


def test_explain_tells_short_from_long():
    for words, name in (
        ("sq=99 sk=1024", "fwd_sm90a_bf16_d64_short"),
        ("sq=99 sk=1025", "fwd_sm90a_bf16_d64"),
        ("sq=9", "fwd_sm90a_bf16_d64_short"),
        ("h=4", "fwd_sm90a_bf16_d64"),
        ("sk=1025", "decode_sm90_bf16_d64_short"),
        ("sq=17 sk=1025", "decode_sm90_bf16_d64"),
    ):
        result = fmha("explain", "d=64", "dtype=bf16", *words.split(), "--arch", "sm90", "--json")
        assert json.loads(result.stdout)["items"][0]["chosen"] == f"fmha_{name}"
    result = fmha("explain", "d=64", "dtype=bf16", "--arch", "sm90")
    assert "1 x any tokens" in result.stdout
    assert "fmha_fwd_sm90a_bf16_d64_short  computes the same; is cut for up to 1024 keys" in result.stdout


def test_explain_json():
    result = fmha("explain", "d=64", "dtype=fp16", "--arch", "sm80", "--json")
    (item,) = json.loads(result.stdout)["items"]
    assert item["chosen"] == "fmha_fwd_sm80_fp16_d64"
    assert all(one["reason"] for one in item["rejected"])


@pytest.mark.parametrize("words", [["d=64", "dtype=e4m3"], ["d=33", "dtype=fp16", "softcap"]])
def test_explain_of_what_no_kernel_computes(words):
    result = fmha("explain", *words, "--arch", "sm80")
    assert result.exit_code == 1
    assert re.search(r"^chosen +nothing", result.stdout, re.MULTILINE)
    assert "fallback='torch'" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["d=64"],
        ["dtype=bf16"],
        ["d=x", "dtype=bf16"],
        ["d=64", "dtype=fp8"],
        ["d=64", "dtype=bf16", "sq=many"],
        ["d=64", "dtype=bf16", "windows=1,0"],
        ["d=64", "dtype=bf16", "window=1"],
        ["d=64", "dtype=bf16", "h=6", "hk=4"],
    ],
)
def test_explain_of_nonsense(words):
    result = fmha("explain", *words, "--arch", "sm80")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")


def test_explain_without_a_gpu_wants_an_arch(no_gpu):
    result = fmha("explain", "d=64", "dtype=bf16")
    assert result.exit_code == 3
    assert "--arch" in result.stderr
