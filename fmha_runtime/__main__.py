# SPDX-License-Identifier: Apache-2.0
"""``python -m fmha_runtime`` is the program ``fmha``."""

from .cli.program import main

if __name__ == "__main__":
    main(prog_name="fmha")
