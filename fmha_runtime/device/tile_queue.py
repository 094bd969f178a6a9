# SPDX-License-Identifier: Apache-2.0
"""Words in a GPU's memory from which running kernels draw their tiles (blocks/tile_queue.cuh)."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from . import driver

WORDS = 1 << 14
"""Counters of a device: one a stream, and one a launch that is captured into a graph."""

_queues: dict[int, Iterator[int]] = {}  # device -> addresses of the words not given out yet
_stream_words: dict[tuple[int, int], int] = {}
_PER_THREAD_STREAM = 2
_lock = threading.Lock()


def _unlock_in_child() -> None:
    """A forked child has no CUDA, but is told so and does not wait for a thread that it has lost."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock_in_child)


def prepare(device: int) -> None:
    """Has words for a device, before a launch that may be captured asks for one.

    Raises:
        DriverError: no memory, or no such device.
    """
    if device not in _queues:
        with _lock, driver.current(device):
            if device not in _queues:
                _queues[device] = _allocate()


def word(device: int, stream: int) -> int | None:
    """Address of a zeroed word for the tile queue of a launch (tile_queue.cuh), which is zero again when it has run.

    Launches on one stream follow each other and share a word. A captured launch gets one for itself: its graph may run
    beside other work of the stream that it was captured on.

    Returns:
        None where no word can be had without a risk: on the per-thread default stream, whose one handle means a stream
        a thread, and when all are given out. The kernel then deals its tiles out in turn.
    """
    found = _stream_words.get((device, stream))
    if found is not None and not driver.stream_is_capturing(stream):
        return found
    if stream == _PER_THREAD_STREAM:
        return None
    with _lock:
        found = next(_queues[device], None)
        if found is not None and not driver.stream_is_capturing(stream):
            _stream_words[device, stream] = found
        return found


def _allocate() -> Iterator[int]:
    """Zeroed memory of the current device, kept for the life of the process."""
    address = int(driver.call("cuMemAlloc", 4 * WORDS))
    driver.call("cuMemsetD32", address, 0, WORDS)
    driver.call("cuStreamSynchronize", 0)
    return iter(range(address, address + 4 * WORDS, 4))
