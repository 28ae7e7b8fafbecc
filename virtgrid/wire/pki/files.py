"""Writing keys and certificates: whole or not at all, and private from the first byte."""

from __future__ import annotations

import stat
from pathlib import Path

from virtgrid.core.errors import RefusedError
from virtgrid.core.files import replace_file


def put(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Write a file, its directory too where there is none (``replace_file``).

    secret: mode 0600. An owner, a group and a group's right to read that somebody gave the file before are
    kept: QEMU, for one, does not run as root. Errors: RefusedError.
    """
    try:
        _public_directory(path.parent)
        before = path.stat() if path.exists() else None
        kept = stat.S_IMODE(before.st_mode) & 0o640 if before is not None else 0
        replace_file(
            path,
            data,
            mode=(0o600 | kept) if secret else 0o644,
            owner=None if before is None else (before.st_uid, before.st_gid),
        )
    except OSError as error:
        raise RefusedError(f"{path} cannot be written", cause=error.strerror) from error


def _public_directory(path: Path) -> None:
    """Made if it is not there, and then for everybody to enter, whatever the umask."""
    if path.is_dir():
        return
    _public_directory(path.parent)
    path.mkdir()
    path.chmod(0o755)


def private_directory(path: Path) -> None:
    """Made if it is not there, and then for its owner alone. Errors: RefusedError."""
    try:
        if not path.is_dir():
            _public_directory(path.parent)
            path.mkdir(mode=0o700)
    except OSError as error:
        raise RefusedError(f"the directory {path} cannot be made", cause=error.strerror) from error
