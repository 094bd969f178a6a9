# SPDX-License-Identifier: Apache-2.0
"""What is read of a cubin's ELF headers before the driver sees it."""

from __future__ import annotations

import struct

from ..errors import ArtifactError

MAGIC = b"\x7fELF"
_SHT_NOBITS = 8


def check_whole(name: str, image: bytes) -> None:
    """The driver takes a cubin by address and trusts its headers: a truncated one would crash the process.

    Raises:
        ArtifactError: the ELF headers or a section reach past the end of the image.
    """
    size = len(image)
    try:
        segments, headers = struct.unpack_from("<QQ", image, 0x20)
        segment, segment_count, entry, count = struct.unpack_from("<HHHH", image, 0x36)
        table = headers + entry * count
        end = max(table, segments + segment * segment_count)
        for at in range(headers, table, entry):
            (kind,) = struct.unpack_from("<I", image, at + 4)
            offset, length = struct.unpack_from("<QQ", image, at + 0x18)
            end = max(end, offset if kind == _SHT_NOBITS else offset + length)
    except struct.error:
        end = size + 1
    if end > size:
        raise ArtifactError(
            f"the cubin of {name} is truncated: it is {size} bytes and its headers reach further; "
            f"rebuild it with `fmha build --force {name}`",
            expected=end,
            found=size,
        )
