# SPDX-License-Identifier: Apache-2.0
"""What is inside one kernel: resources, identity, instruction mix. What ``fmha inspect`` prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .. import records
from ..errors import BuildError, ToolchainError
from ..kernels import catalog, manifest, sources, store
from ..kernels.spec import KernelSpec
from ..kernels.store import State
from ..toolchain import disassembly, ptx
from . import report


@dataclass(frozen=True)
class Inspection:
    """Everything known about a kernel; ``mix`` counts instructions of ``mix_of`` (SASS or PTX)."""

    spec: KernelSpec
    state: State
    mix: Counter[str]
    mix_of: str
    note: str  # why the mix is not the cubin's, empty when it is

    def item(self) -> dict[str, Any]:
        """One item of ``fmha inspect --json``."""
        tile, row = catalog.tile(self.spec), self.state.row
        facts = row.to_json() if row else {}
        return {
            **report.axes(self.spec),
            "tile": str(tile),
            "threads": tile.threads,
            "smem_bytes": catalog.smem_bytes(self.spec, tile),
            **{key: value for key, value in facts.items() if key not in ("name", "tile")},
            "state": self.state.word,
            "reason": self.state.reason,
            "path": str(row.path) if row and row.path else None,
            "key": row.path.parent.name if row and row.path and row.root == "cache" else None,
            "present_code": sources.code(self.spec, tile),
            "mix_of": self.mix_of or None,
            "mix": dict(self.mix.most_common()),
            "note": self.note or None,
        }

    def lines(self, most: int = 16) -> list[str]:
        """The text form, with the ``most`` frequent instructions."""
        item = self.item()
        row = self.state.row
        rows = [
            ("state", f"{self.state.word}: {self.state.reason}"),
            ("tile", f"{item['tile']}, {item['threads']} threads"),
            ("smem", f"{item['smem_bytes']} bytes of {self.spec.arch.smem_limit} per CTA"),
        ]
        if row is not None:
            rows += [
                ("registers", f"{row.registers} per thread"),
                ("spills", f"{row.spill_bytes} bytes"),
                ("params", f"{row.params_size} bytes, ABI {row.abi}"),
                ("cubin", f"{row.size} bytes, {row.path or 'not here'}"),
                ("key", str(item["key"] or "-")),
                ("sha256", row.sha256),
                ("nvcc", f"{row.nvcc} {row.flags}"),
            ]
        rows.append(("code", item["present_code"]))
        if self.mix:
            total = sum(self.mix.values())
            top = self.mix.most_common(most)
            rows.append((self.mix_of, f"{total} instructions: " + _listed(top)))
        if self.note:
            rows.append(("note", self.note))
        return [self.spec.name, *(f"  {line}" for line in records.table(rows))]


def _listed(counts: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts)


def inspect(spec: KernelSpec) -> Inspection:
    """Look at a kernel: its cubin's SASS where a disassembler is found, else its PTX.

    Raises:
        ArtifactError: the cubin is not the one that was built.
    """
    state = store.state(spec)
    note = ""
    if state.word == "ready" and state.row is not None:
        image = manifest.load_image(state.row)
        try:
            return Inspection(spec, state, disassembly.instruction_mix(disassembly.disassemble(image)), "SASS", "")
        except ToolchainError as error:
            note = f"the mix is of the PTX: {error}"
    else:
        note = "the mix is of the PTX: there is no current cubin"
    try:
        text = ptx.compile_ptx(spec).decode(errors="replace")
    except (ToolchainError, BuildError) as error:
        return Inspection(spec, state, Counter(), "", f"no instruction mix: {error}")
    return Inspection(spec, state, disassembly.instruction_mix(text), "PTX", note)
