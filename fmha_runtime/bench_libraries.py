# SPDX-License-Identifier: Apache-2.0
"""Adapters of the attention libraries that one may have installed; each refuses what its library cannot run."""

from __future__ import annotations

from .bench_provider import Peer


def peers() -> tuple[Peer, ...]:
    """The libraries."""
    return ()
