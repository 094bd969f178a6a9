# SPDX-License-Identifier: Apache-2.0
"""What several test files share, each thing once."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
"""The checkout."""
