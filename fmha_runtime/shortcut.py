# SPDX-License-Identifier: Apache-2.0
"""The common call of a plan, in one function: q, k and v that the plan's guard knows, nothing optional, a new output.

``Plan.launch`` does the same for every call; here whatever it looks up in the plan is a variable of the function, which
saves a third of a microsecond of eight.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import driver, params
from .errors import DriverError

if TYPE_CHECKING:
    import torch


def shortcut(
    *,
    device: int,
    empty: Callable[..., torch.Tensor],
    out: tuple[Any, ...],
    block: Any,
    fields: ctypes.Structure,
    words: Sequence[ctypes.c_uint64],
    queued: bool,
    lock: threading.Lock,
    start: Callable[[int], None],
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]:
    """A function of (q, k, v) that launches on the current stream and returns the output.

    The function returns None, and has launched nothing, where the call is not so common after all: another device is
    current, an address is misaligned, the thread has no context yet. ``Plan.launch`` then knows what to do or to say.

    Args:
        device: CUDA device index.
        empty: (shape, strides, dtype) -> a new tensor on the current device.
        out: shape, strides and dtype of the output.
        block: the kernel's parameter block; its ``queue`` is set where ``queued``.
        fields: the FwdParams in it.
        words: the address words of the tensor maps of q, k and v in it.
        lock: of the block.
        start: enqueues the kernel on a stream.
    """
    import torch

    shape, strides, dtype = out
    q_word, k_word, v_word = words
    write, queue_word = params.write_addresses, driver.queue_word
    current_device, current_stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
        if current_device() != device:
            return None
        o = empty(shape, strides, dtype)
        stream = current_stream(device)
        q_at, k_at, v_at, o_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr()
        if (q_at | k_at | v_at | o_at) & 15:
            return None
        try:
            with lock:
                write(fields, 0, q_at, k_at, v_at, o_at, 0, 0, 0, 0)
                q_word.value, k_word.value, v_word.value = q_at, k_at, v_at
                if queued:
                    block.queue = queue_word(device, stream)
                start(stream)
        except DriverError:
            return None
        return o

    return call
