"""Which migrations run on this host: a lock file per domain, and a control socket beside it.

The lock is held by the kernel (flock) for as long as the driver lives, so a driver killed with
-9 leaves none behind. Its content names the journal, for people and for `migration recover`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from virtgrid.core.errors import RefusedError
from virtgrid.core.journal import state_dir


def run_dir() -> Path:
    """Where locks and sockets live: $VIRTGRID_RUN_DIR, /run/virtgrid as root, else the state directory.

    /run is emptied at boot, as locks and sockets should be.
    """
    if configured := os.environ.get("VIRTGRID_RUN_DIR"):
        return Path(configured)
    return Path("/run/virtgrid") if os.geteuid() == 0 else state_dir() / "run"


def _lock_path(uuid: str) -> Path:
    if not all(character in "0123456789abcdef-" for character in uuid):
        raise ValueError(f"not a UUID: {uuid!r}")
    return run_dir() / f"{uuid}.lock"


def socket_path(uuid: str) -> Path:
    """The control socket of the migration of this domain."""
    return _lock_path(uuid).with_suffix(".sock")


@contextmanager
def exclusive(uuid: str, migration_id: str) -> Iterator[None]:
    """Be the only driver of this domain on this host. Errors: RefusedError when there is one."""
    path = _lock_path(uuid)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = running_migration(uuid) or "unknown"
            raise RefusedError(
                f"this domain is being migrated already ({other})",
                hint=f"virtgrid migration show {other}",
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"id": migration_id, "pid": os.getpid()}).encode())
        yield
    finally:
        # Emptied, not unlinked: unlinking would let two drivers lock two files of the same name.
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
        os.close(handle)


def running_migration(uuid: str) -> str | None:
    """The id of the migration whose driver holds this domain's lock, or None."""
    try:
        handle = os.open(_lock_path(uuid), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            try:
                return str(json.loads(os.pread(handle, 4096, 0))["id"])
            except (ValueError, KeyError, TypeError):
                return "unknown"
        return None
    finally:
        os.close(handle)
