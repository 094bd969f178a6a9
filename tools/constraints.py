# SPDX-License-Identifier: Apache-2.0
"""Writes tests/constraints.txt: the exact packages of the environment that runs this, which its tests passed with.

`make constraints` runs it in the environment of `make test-newest`. torch, what only torch needs and the CUDA toolkit
are left to the machine: the Makefile chooses them.
"""

from __future__ import annotations

import datetime
import platform
import re
from importlib import metadata
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "tests" / "constraints.txt"
MACHINES = re.compile(
    r"torch|triton|nvidia-.*|cuda-(?!bindings$|pathfinder$).*|sympy|mpmath|networkx|setuptools|pip|fmha-runtime"
)


def packages() -> dict[str, str]:
    """Name and version of everything that is installed and not left to the machine."""
    found = {}
    for dist in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", dist.metadata["Name"]).lower()
        if not MACHINES.fullmatch(name):
            found[name] = dist.version
    return dict(sorted(found.items()))


def text() -> str:
    """The file. Python 3.10 lacks some of these versions and takes what pip finds."""
    where = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    lines = [
        f"# Tested with these on {datetime.date.today()}, {where}. Written by `make constraints`; torch and the CUDA",
        "# toolkit are left to the machine. pyproject.toml has the ranges for users.",
    ]
    lines += [f'{name}=={version} ; python_version >= "3.11"' for name, version in packages().items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
    print(f"wrote {FILE}")
