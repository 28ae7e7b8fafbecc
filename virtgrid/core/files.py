"""Writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def replace_file(path: Path, data: bytes, *, mode: int = 0o600, owner: tuple[int, int] | None = None) -> None:
    """Write a file by renaming: who reads meanwhile sees the old or the new one. On the disk when it returns.

    mode: of the new one; until it is whole it is its writer's alone. owner: (uid, gid), where we may give
    it away. One writer at a time. Errors: OSError (no rights, disk full): the old one is as it was.
    """
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        if owner is not None:
            with contextlib.suppress(PermissionError):
                os.fchown(descriptor, *owner)
        os.fchmod(descriptor, mode)
        file.flush()
        os.fsync(descriptor)
    fresh.replace(path)
