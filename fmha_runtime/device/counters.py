# SPDX-License-Identifier: Apache-2.0
"""Zeroed words in a GPU's memory by which CTAs of one launch count each other (ptx/global.cuh).

A launch leaves them zero again, so launches that follow each other share them: those of a stream, and those that one
stream put into a graph.
"""

from __future__ import annotations

import os
import threading

from . import driver

WORDS = 1 << 20
"""Of a device. Decode kernels take four for each CTA, about a thousand, for a stream or a capture; Hopper's others take
one for a stream or a captured launch."""
PER_THREAD_STREAM = 2

_left: dict[int, tuple[int, int]] = {}  # device -> (next address, end)
_given: dict[tuple[int, int, int, int], int] = {}
_lock = threading.Lock()


def _unlock_in_child() -> None:
    """A forked child has no CUDA, but is told so and does not wait for a thread that it has lost."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock_in_child)


def prepare(device: int) -> None:
    """Has words for a device, before a launch that may be captured asks for some.

    Raises:
        DriverError: no memory, or no such device.
    """
    if device not in _left:
        with _lock, driver.current(device):
            if device not in _left:
                address = int(driver.call("cuMemAlloc", 4 * WORDS))
                driver.call("cuMemsetD32", address, 0, WORDS)
                driver.call("cuStreamSynchronize", 0)
                _left[device] = (address, address + 4 * WORDS)


def take(device: int, count: int) -> int | None:
    """Address of ``count`` words that nobody else has; None: all are given out."""
    with _lock:
        address, end = _left[device]
        if address + 4 * count > end:
            return None
        _left[device] = (address + 4 * count, end)
        return address


def words(device: int, stream: int, count: int) -> int | None:
    """Address of ``count`` zeros for a launch on this stream.

    Returns:
        None where none can be had: on the per-thread default stream, whose one handle means a stream a thread, and when
        all are given out. The caller then brings zeros of its own.
    """
    key = (device, stream, driver.capture_id(stream), count)
    found = _given.get(key)
    if found is None and stream != PER_THREAD_STREAM:
        found = take(device, count)
        if found is not None:
            found = _given.setdefault(key, found)
    return found
