# SPDX-License-Identifier: Apache-2.0
"""Words by which CTAs count each other: who shares them, and when there are none."""

from __future__ import annotations

import contextlib

import pytest

pytest.importorskip("cuda.bindings")

from fmha_runtime.device import counters, driver


@pytest.fixture
def captures(monkeypatch):
    """A device with room for ten launches; the captures that streams take part in."""
    found: dict[int, int] = {}
    answers = {"cuMemAlloc": 0x1000}
    monkeypatch.setattr(driver, "current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(driver, "call", lambda name, *arguments: answers.get(name))
    monkeypatch.setattr(driver, "capture_id", lambda stream: found.get(stream, 0))
    monkeypatch.setattr(counters, "WORDS", 100)
    monkeypatch.setattr(counters, "_left", {})
    monkeypatch.setattr(counters, "_given", {})
    counters.prepare(0)
    return found


def test_launches_of_a_stream_share_words_and_those_of_a_capture_have_their_own(captures):
    first, other = counters.words(0, 0x51, 10), counters.words(0, 0x52, 10)
    assert abs(first - other) >= 40
    captures[0x51] = 7
    captured = counters.words(0, 0x51, 10)
    assert captured not in (first, other) and counters.words(0, 0x51, 10) == captured
    captures[0x51] = 8
    assert counters.words(0, 0x51, 10) not in (first, other, captured)
    del captures[0x51]
    assert counters.words(0, 0x51, 10) == first


def test_launches_of_another_size_have_words_of_their_own(captures):
    first, other = counters.words(0, 0x51, 10), counters.words(0, 0x51, 20)
    assert other >= first + 40 or first >= other + 80


def test_none_where_there_are_none(captures):
    assert counters.words(0, 2, 10) is None, "the per-thread default stream means a stream a thread"
    assert [counters.words(0, stream, 30) is None for stream in range(10, 15)] == [False, False, False, True, True]
    assert counters.words(0, 10, 30) is not None
