# SPDX-License-Identifier: Apache-2.0
"""What every record says of its origin."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from . import config


def now() -> str:
    """The present moment, ISO 8601, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> str | None:
    """The checkout's current commit: FMHA_COMMIT, for a copy without ``.git``, else read there; None if neither is."""
    named = config.commit()
    if named:
        return named
    root = Path(__file__).resolve().parent.parent / ".git"
    try:
        if root.is_file():  # a worktree: the file names its folder
            root = Path(root.read_text().removeprefix("gitdir: ").strip())
        head = (root / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        ref = head[len("ref: ") :]
        common = root / "commondir"
        base = (root / common.read_text().strip()) if common.is_file() else root
        loose = base / ref
        if loose.is_file():
            return loose.read_text().strip()
        packed = (base / "packed-refs").read_text().splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {ref}"))
    except (OSError, StopIteration):
        return None
