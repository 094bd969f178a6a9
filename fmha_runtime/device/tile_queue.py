# SPDX-License-Identifier: Apache-2.0
"""Words in a GPU's memory from which running kernels draw their tiles (blocks/tile_queue.cuh)."""

from __future__ import annotations

from . import counters, driver

_stream_words: dict[tuple[int, int], int] = {}


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
    if stream == counters.PER_THREAD_STREAM:
        return None
    found = counters.take(device, 1)
    if found is not None and not driver.stream_is_capturing(stream):
        _stream_words[device, stream] = found
    return found
