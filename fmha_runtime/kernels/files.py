# SPDX-License-Identifier: Apache-2.0
"""Files that hold code: written whole or not at all, sealed where nothing else tells their hash, and read only from
folders that nobody else can write to.

Who may write to a folder of kernels may run code in the processes that load them. So a folder has to belong to the
user or to root, and neither group nor others may write to it. The folders above it count too, because who can rename
one can put another in its place. Those may be writable where they are sticky, as /tmp is, and by a private group, which
many systems give to every user. A folder is looked at once a process.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import re
import shlex
import stat
import tempfile
from pathlib import Path

from ..errors import ArtifactError

SCRATCH = ".tmp-fmha-"
"""What the names of unfinished files and folders begin with."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_SEAL = b"\nfmha_runtime sha256 "
_SEAL_BYTES = len(_SEAL) + 64
_NOBODY = 65534  # whom a container shows in place of users that it does not know, root among them
_trusted: set[Path] = set()


def make_folder(path: Path) -> None:
    """Create a folder and those above it where they are missing; nobody but the user may write to what is new."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for each in reversed(missing):
        each.mkdir(mode=0o755, exist_ok=True)


def protect(path: Path) -> None:
    """Take the right to write from group and others, which a lax umask gave them."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & _OTHERS_WRITE:
        path.chmod(mode & ~_OTHERS_WRITE)


def sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file in one step; its folder is created when it does not exist."""
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(prefix=SCRATCH, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's files are private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(path.parent)


def sealed(content: bytes) -> bytes:
    """Content with its SHA-256 behind it. Loaders and linkers of ELF files do not look there."""
    return content + _SEAL + hashlib.sha256(content).hexdigest().encode()


def is_sealed(path: Path) -> bool:
    """Whether a file is what ``sealed`` made, to the last byte.

    Raises:
        OSError: it cannot be read.
    """
    whole = path.read_bytes()
    return len(whole) > _SEAL_BYTES and sealed(whole[:-_SEAL_BYTES]) == whole


def check_seal(path: Path) -> None:
    """Refuse a library or object file that is not, byte by byte, the one that was compiled here.

    Raises:
        ArtifactError: it is damaged, cannot be read, or others can write to it.
    """
    check_file(path)
    try:
        intact = is_sealed(path)
    except OSError as error:
        raise ArtifactError(f"cannot read {path} ({error.strerror})", path=path) from None
    if not intact:
        raise ArtifactError(
            f"{path} is damaged: its content is not what its SHA-256 says; remove the file, the next use compiles it "
            "again",
            path=path,
        )


def check_folder(folder: Path, variable: str) -> None:
    """Refuse a folder of kernels that somebody else could put code into. One that does not exist is fine.

    Args:
        folder: an absolute path.
        variable: the environment variable that can name another folder.

    Raises:
        ArtifactError: it, or a folder above it, is not safe; the message has the command that helps.
    """
    if folder in _trusted:
        return
    try:
        found = os.lstat(folder)
        above: list[tuple[Path, os.stat_result]] = []
        if folder.parent not in _trusted or stat.S_ISLNK(found.st_mode):
            found = os.stat(folder)
            paths = dict.fromkeys((*folder.parents, *Path(os.path.realpath(folder)).parents))
            above = [(path, os.stat(path)) for path in paths]
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise ArtifactError(
            f"cannot look at {folder} ({error.strerror}); set {variable} to a folder that you can read", path=folder
        ) from None
    remedy = f"set {variable} to a folder of your own"
    _judge(folder, found.st_uid, found.st_mode, remedy)
    for path, facts in above:
        _judge_above(folder, path, facts, remedy)
    _trusted.add(folder)


def check_file(path: Path) -> None:
    """Refuse a file of code that somebody else could write to. One that does not exist is fine.

    Raises:
        ArtifactError: it is not safe; the message has the command that helps.
    """
    try:
        found = os.stat(path)
    except OSError:
        return
    _judge(path, found.st_uid, found.st_mode, "remove it and build again")


def _judge(path: Path, owner: int, mode: int, otherwise: str) -> None:
    """Whether a folder or file is the user's or root's, and for nobody else to write to."""
    own = os.geteuid()
    if owner not in (0, own):
        command = f"chown -R {own} {shlex.quote(os.fspath(path))}"
        danger = f"{path} belongs to {_name(owner)}, not to you ({_name(own)}) or root"
    elif mode & _OTHERS_WRITE:
        command = f"chmod -R go-w {shlex.quote(os.fspath(path))}"
        danger = f"{path} can be written by {_writers(mode)}"
    else:
        return
    raise ArtifactError(
        f"{danger}, and kernels in it are code: if you trust what is there, run `{command}`; else {otherwise}",
        path=path,
        command=command,
    )


def _judge_above(folder: Path, path: Path, found: os.stat_result, otherwise: str) -> None:
    """Whether nobody but the user and root can put another folder in the place of ``folder``."""
    mode, command = found.st_mode, ""
    private = found.st_gid in (0, found.st_uid)  # root's group, or the one that a user has for himself
    open_to = mode & (stat.S_IWOTH if private else _OTHERS_WRITE)
    if found.st_uid not in (0, os.geteuid(), _NOBODY):
        danger = f"belongs to {_name(found.st_uid)}"
    elif open_to and not mode & stat.S_ISVTX:
        command = f"chmod go-w {shlex.quote(os.fspath(path))}"
        danger = f"can be written by {_writers(open_to)}"
    else:
        return
    remedy = f"run `{command}`, or {otherwise}" if command else otherwise
    raise ArtifactError(
        f"{path} {danger}, who could replace {folder}, and kernels in it are code: {remedy}",
        path=folder,
        command=command,
    )


def _writers(mode: int) -> str:
    return "everybody" if mode & stat.S_IWOTH else "its group"


def _name(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def is_sha256(text: str) -> bool:
    """Whether a text is a SHA-256 in hex."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None
