# SPDX-License-Identifier: Apache-2.0
"""``code``: a hash of what the compiler sees of a kernel, without comments, spacing, line numbers or file names.

The translation unit and the files that it includes are flattened in the order of inclusion, each file once, and cut
into preprocessing tokens. Two kernels of equal ``code`` (and equal flags) compile to equal bytes; a comment, a moved
header or a reformat changes nothing. The test of this module holds the lexer against ``g++ -fpreprocessed -E -P``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArtifactError

# A comment or a spliced line is space; a new line ends a directive and is nothing elsewhere.
_TOKEN = re.compile(
    r"""
    (?P<space>(?:[ \t\r\f\v]|\\\n|//[^\n]*|/\*.*?\*/)+)
    |(?P<token>
        \n
        |(?:u8|[uUL])?R"(?P<mark>[^()\\\s]{0,16})\(.*?\)(?P=mark)"
        |"(?:[^"\\\n]|\\.)*"
        |\.?\d(?:[eEpP][+-]|'\w|[\w.])*
        |[A-Za-z_$]\w*
        |'(?:[^'\\\n]|\\.)+'
        |%:%:|<<=|>>=|\.\.\.|->\*|<=>|::|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|\#\#|[^\s\w"'\\]
    )
    """,
    re.VERBOSE | re.DOTALL,
)
_SYSTEM = ("<stddef.h>", "<stdint.h>", "<string.h>", "<math.h>")


def tokens(text: str, origin: str = "the text") -> list[list[str]]:
    """The preprocessing tokens of C++ source text, line by line, comments and empty lines left out.

    Raises:
        ArtifactError: the text holds something that this lexer does not read, such as a trigraph or a comment that ends
            in a backslash.
    """
    lines: list[list[str]] = []
    line: list[str] = []
    at = 0
    for match in _TOKEN.finditer(text):
        if match.start() != at:
            break
        at = match.end()
        token = match["token"]
        if token == "\n":
            if line:
                lines.append(line)
                line = []
        elif token is not None:
            line.append(token)
        elif match[0].endswith("\\"):  # a comment that would go on in the next line
            break
    if at != len(text) or "??" in text:
        at = min(at, text.find("??")) if "??" in text else at
        number = text.count("\n", 0, at) + 1
        raise ArtifactError(
            f"{origin}:{number} cannot be read near {text[max(0, at - 10) : at + 20]!r}: the code hash knows "
            "C++ tokens, no trigraphs, and no comment that ends in a backslash"
        )
    return [*lines, line] if line else lines


class Flattener:
    """Source text with its includes in place, as tokens. Files that were read are remembered.

    Args:
        folders: where ``<name>`` and ``"name"`` are looked up, in this order; ``"name"`` beside its file first.
        system: whether any other ``<name>`` is left as it stands; else only the few headers that kernels may use.
    """

    def __init__(self, folders: Sequence[Path], *, system: bool = False) -> None:
        self._folders = [folder.resolve() for folder in folders]
        self._system = system
        self._lines: dict[Path, list[list[str]]] = {}
        self._whole: dict[str, tuple[Any, tuple[Path, ...]]] = {}  # by name: the hash so far, and the files
        self._digests: dict[object, str] = {}

    def files(self, header: str) -> list[Path]:
        """Every file that a header reaches, itself included, in the order of inclusion.

        Raises:
            ArtifactError: a file is missing, or an include is written so that it cannot be followed.
        """
        return list(self._header(header)[1])

    def digest(self, text: str, *, leave_out: str = "", more: Iterable[str] = ()) -> str:
        """SHA-256 (hex) of a translation unit's tokens.

        Args:
            text: the unit.
            leave_out: an identifier of the unit that does not count: the kernel's name, which is its key anyhow and
                would hide that two archs run the same code.
            more: further parts of the identity, for example flags.
        """
        key = (text, leave_out, tuple(more))
        if key not in self._digests:
            self._digests[key] = self._digest(*key)
        return self._digests[key]

    def _digest(self, text: str, leave_out: str, more: tuple[str, ...]) -> str:
        result = hashlib.sha256()
        first, _, rest = text.partition("\n")
        seen: set[Path] = set()
        # Nearly every unit is one include and a few lines: that header is hashed once.
        if first.startswith('#include "'):
            whole, files = self._header(first.removeprefix('#include "').rstrip().removesuffix('"'))
            result = whole.copy()
            seen.update(files)
            text = rest
        for token in self._flat(tokens(text), None, seen, "the unit"):
            result.update((b"@" if token == leave_out else token.encode()) + b"\0")
        for part in more:
            result.update(b"\1" + part.encode())
        return result.hexdigest()

    def _header(self, name: str) -> tuple[Any, tuple[Path, ...]]:
        if name not in self._whole:
            path = self._find(f'"{name}"', None, "the unit")
            assert path is not None
            seen: dict[Path, None] = {}
            joined = "\0".join(self._file(path, seen)).encode() + b"\0"
            self._whole[name] = hashlib.sha256(joined), tuple(seen)
        return self._whole[name]

    def _file(self, path: Path, seen: dict[Path, None] | set[Path]) -> Iterator[str]:
        if path in seen:
            return
        if isinstance(seen, dict):
            seen[path] = None
        else:
            seen.add(path)
        if path not in self._lines:
            self._lines[path] = _read(path)
        yield from self._flat(self._lines[path], path, seen, str(path))

    def _flat(
        self, lines: Iterable[list[str]], path: Path | None, seen: dict[Path, None] | set[Path], origin: str
    ) -> Iterator[str]:
        for line in lines:
            if line[0] != "#":
                yield from line
            elif line[1:] == ["pragma", "once"]:
                continue
            elif line[1:2] == ["include"]:
                name = "".join(line[2:])
                found = self._find(name, path, origin)
                if found is None:
                    yield from (*line, "\n")
                else:
                    yield from self._file(found, seen)
            else:
                yield from (*line, "\n")

    def _find(self, name: str, path: Path | None, origin: str) -> Path | None:
        """The file of an include; None for a system header, which stays as it stands."""
        quoted = name.startswith('"')
        beside = [path.parent] if quoted and path is not None else []
        for folder in (*beside, *self._folders):
            candidate = folder / name[1:-1]
            if name[:1] in '"<' and candidate.is_file():
                return candidate.resolve()
        if not quoted and name.startswith("<") and (self._system or name in _SYSTEM):
            return None
        if quoted or name.startswith("<ptx/"):
            raise ArtifactError(
                f"kernel source {name[1:-1]}, included by {origin}, is missing; reinstall fmha-runtime or restore the "
                "checkout",
                path=(path.parent if path else self._folders[-1]) / name[1:-1],
            )
        raise ArtifactError(
            f'{origin} includes {name or "a computed name"}, which the code hash cannot follow; use "file" for '
            f"headers of this project, <ptx/file> for wrappers, or {', '.join(_SYSTEM)}",
            path=path,
        )


def _read(path: Path) -> list[list[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            f"kernel source {path} cannot be read ({error.strerror}); reinstall fmha-runtime or restore the checkout",
            path=path,
        ) from None
    lines = tokens(text, str(path))
    if path.suffix in (".h", ".cuh") and ["#", "pragma", "once"] not in lines:
        raise ArtifactError(f"{path} lacks #pragma once, which the code hash relies on: it takes each file once")
    return lines
