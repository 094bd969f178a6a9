#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A wheel that carries its cubins, for machines that have a GPU and no nvcc.

    make wheel ARCHS="sm90a sm89"                                every kernel of these archs
    python tools/wheel.py --kernel fmha_fwd_sm89_bf16_d64        some kernels only

Builds what is not up to date, makes the ordinary wheel, adds the cubins where the package looks for its own, and reads
the result back: every cubin must have the SHA-256 of its row. The version gets the archs as a local part
(0.1.0+sm89.sm90a), so that pip and people can tell it from the wheel without cubins.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import re
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fmha_runtime import config  # noqa: E402
from fmha_runtime.cli.progress import BuildProgress  # noqa: E402
from fmha_runtime.errors import ArtifactError, FmhaError, InputError, ToolchainError  # noqa: E402
from fmha_runtime.kernels import catalog, manifest  # noqa: E402
from fmha_runtime.kernels.manifest import KernelRow  # noqa: E402
from fmha_runtime.kernels.spec import Arch, KernelSpec  # noqa: E402
from fmha_runtime.toolchain import build  # noqa: E402

INSIDE = "fmha_runtime/_data/cubins"
"""Where an installed package looks for its cubins (config.package_root)."""
_DATE = (1980, 1, 1, 0, 0, 0)  # of added files: the same content gives the same wheel


@dataclass(frozen=True)
class Made:
    """A wheel and what it carries; sizes are bytes."""

    path: Path
    rows: tuple[KernelRow, ...]
    size: int
    cubins: int  # before compression


def select(archs: Sequence[str], names: Sequence[str]) -> list[KernelSpec]:
    """The kernels of the catalogue that these words mean.

    Raises:
        InputError: no word, or one that is no arch or no kernel.
    """
    known = [arch.value for arch in Arch]
    wrong = [word for word in archs if word not in known]
    if wrong:
        raise InputError(f"arch {wrong[0]!r} is unknown; it is one of {', '.join(known)}")
    if not archs and not names:
        raise InputError(f'which cubins? Write make wheel ARCHS="sm90a sm89"; the archs are {", ".join(known)}')
    specs = [spec for spec in catalog.enumerate_specs() if spec.arch.value in archs]
    for name in names:
        spec = KernelSpec.parse(name)
        if not catalog.exists(spec):
            raise InputError(f"{name} is not in the catalogue; `fmha list` shows what is")
        specs.append(spec)
    return list(dict.fromkeys(specs))


def compiled(specs: Sequence[KernelSpec]) -> list[KernelRow]:
    """The rows of these kernels, built where they are not up to date.

    Raises:
        ToolchainError: something must be compiled and there is no nvcc.
        BuildError: a kernel did not compile.
    """
    with BuildProgress() as progress:
        results = build.build(specs, on_event=progress)
    for result in results:
        if result.error is not None:
            raise result.error
    return [result.row for result in results if result.row is not None]


def make(rows: Sequence[KernelRow], out: Path) -> Made:
    """Write the wheel with the cubins of these rows into ``out``.

    Raises:
        ArtifactError: a cubin is not the one of its row, or the wheel that was written is not whole.
        ToolchainError: hatchling is not installed.
    """
    images = {f"{INSIDE}/{row.spec.arch.value}/{row.spec.name}.cubin": manifest.load_image(row) for row in rows}
    label = ".".join(sorted({row.spec.arch.value for row in rows}))
    with tempfile.TemporaryDirectory() as folder:
        plain = _plain_wheel(Path(folder))
        version = plain.name.split("-")[1]
        files = _renamed(plain, version, f"{version}+{label}")
        name = plain.name.replace(f"-{version}-", f"-{version}+{label}-", 1)
    files |= {path: text.encode() for path, text in _tables(rows).items()} | images
    out.mkdir(parents=True, exist_ok=True)
    path = out / name
    _write(path, files)
    check(path, rows)
    return Made(path, tuple(rows), path.stat().st_size, sum(map(len, images.values())))


def _plain_wheel(folder: Path) -> Path:
    """The ordinary wheel, by the back end itself: no isolated environment, so no network."""
    try:
        from hatchling.build import build_wheel
    except ImportError:
        raise ToolchainError(
            "a wheel needs hatchling: pip install 'fmha-runtime[test]', or pip install hatchling"
        ) from None
    before = Path.cwd()
    os.chdir(ROOT)  # the back end builds the project of the working folder
    try:
        return folder / build_wheel(str(folder))
    finally:
        os.chdir(before)


def _renamed(wheel: Path, version: str, new: str) -> dict[str, bytes]:
    """The files of a wheel, as those of another version; without RECORD, which is written last."""
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            data = archive.read(name)
            top, _, rest = name.partition("/")
            if top.endswith(".dist-info"):
                if rest == "RECORD":
                    continue
                name = f"{top.replace(f'-{version}.', f'-{new}.')}/{rest}"
                if rest == "METADATA":
                    data = re.sub(rb"(?m)^Version: .*$", f"Version: {new}".encode(), data, count=1)
            files[name] = data
    return files


def _tables(rows: Iterable[KernelRow]) -> dict[str, str]:
    """The packaged tables with these rows in the place of the locked ones: equal where nvcc is the manifest's."""
    present, broken = manifest.read(config.package_root())
    if broken:
        raise broken[0]
    merged = {row.spec: row for row in present} | {row.spec: row for row in rows}
    texts = manifest.write(Path(INSIDE), merged.values())
    return {path.as_posix(): text for path, text in texts.items()}


def _write(path: Path, files: dict[str, bytes]) -> None:
    (info,) = {name.partition("/")[0] for name in files if name.partition("/")[0].endswith(".dist-info")}
    lines = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in files.items()]
    record = f"{info}/RECORD"
    files = {**files, record: "\n".join([*lines, f"{record},,", ""]).encode()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)


def _digest(data: bytes) -> str:
    """A hash as RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def check(path: Path, rows: Iterable[KernelRow]) -> None:
    """Read a wheel back: every file against RECORD, every cubin against its row.

    Raises:
        ArtifactError: one of them is missing or has other bytes.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
        said = dict(line.split(",")[:2] for line in archive.read(record).decode().split())
        for name in names:
            if name != record and said.get(name) != f"sha256={_digest(archive.read(name))}":
                raise ArtifactError(f"{path}: {name} is not what its RECORD says; build the wheel again", path=path)
        for row in rows:
            name = f"{INSIDE}/{row.spec.arch.value}/{row.spec.name}.cubin"
            found = hashlib.sha256(archive.read(name)).hexdigest() if name in names else "no file"
            if found != row.sha256:
                raise ArtifactError(
                    f"{path}: {name} has SHA-256 {found}, its row says {row.sha256}; build the wheel again",
                    path=path,
                    expected=row.sha256,
                    found=found,
                )


def main(arguments: Sequence[str] | None = None) -> int:
    """Make one wheel; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="*", default=[], metavar="ARCH", help="every kernel of these")
    parser.add_argument("--kernel", nargs="*", default=[], metavar="NAME", help="these kernels")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist")
    given = parser.parse_args(arguments)
    begin = time.perf_counter()
    try:
        made = make(compiled(select(given.arch, given.kernel)), given.out)
    except FmhaError as error:
        print(f"error: {error}", file=sys.stderr)
        return {InputError: 2, ToolchainError: 3}.get(type(error), 1)
    megabytes = 2**20
    for arch in sorted({row.spec.arch.value for row in made.rows}):
        mine = [row for row in made.rows if row.spec.arch.value == arch]
        print(f"  {arch}  {len(mine)} cubins, {sum(row.size for row in mine) / megabytes:.1f} MiB")
    print(
        f"{made.path}  {made.size / megabytes:.1f} MiB with {len(made.rows)} cubins, {made.cubins / megabytes:.1f} MiB "
        f"unpacked; every SHA-256 checked; {time.perf_counter() - begin:.0f} s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
