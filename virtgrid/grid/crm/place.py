"""A pilot's place: a directory with its ticket, its record and its log, below one of its hold.

The place is its account's, who may do there what they like, make links for instance; all above it is ours. So
what we make is made beside the place and moved in, and what we open in it must be theirs already.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from pathlib import Path

from virtgrid.core.errors import RefusedError
from virtgrid.grid.crm.backend import PilotOrder
from virtgrid.wire import seal
from virtgrid.wire.endpoint import Endpoint


def account_of(name: str) -> pwd.struct_passwd:
    """Who a pilot is to run as. Errors: RefusedError."""
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise RefusedError(f"this host has no account '{name}'") from None
    if found.pw_uid == 0:
        raise RefusedError("a pilot is a user's, and root is none")
    return found


def place_of(directory: Path, order: PilotOrder) -> Path:
    return directory / order.hold / order.sandbox


def furnish(directory: Path, order: PilotOrder, account: pwd.struct_passwd) -> Path:
    """Make the place, with its ticket, where it is not there yet. Errors: RefusedError."""
    place = place_of(directory, order)
    ticket = ticket_of(place)
    try:
        place.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        place.mkdir(mode=0o700, exist_ok=True)
        os.chown(place, account.pw_uid, account.pw_gid, follow_symlinks=False)
        if not ticket.exists():
            fresh = place.parent / f".{place.name}.ticket"
            fresh.unlink(missing_ok=True)
            seal.write_private(fresh, order.ticket)
            os.chown(fresh, account.pw_uid, account.pw_gid, follow_symlinks=False)
            fresh.rename(ticket)
    except OSError as error:
        raise RefusedError(
            f"the pilot of {order.sandbox} cannot have its ticket in {place}", cause=error.strerror
        ) from error
    return place


def ticket_of(place: Path) -> Path:
    return place / "ticket"


def log_of(place: Path) -> Path:
    return place / "log"


def open_log(place: Path, account: pwd.struct_passwd) -> int:
    """A descriptor to append to the log with, for whoever does not open it as the account.

    Errors: OSError; RefusedError when it is somebody else's file under this name.
    """
    path = log_of(place)
    more = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, more | os.O_CREAT | os.O_EXCL, 0o600)
        os.fchown(descriptor, account.pw_uid, account.pw_gid)
    except FileExistsError:
        descriptor = os.open(path, more)
        if os.fstat(descriptor).st_uid != account.pw_uid:
            os.close(descriptor)
            raise RefusedError(f"{path} is not its account's") from None
    return descriptor


def command(program: Sequence[str], order: PilotOrder, place: Path, host: Endpoint) -> list[str]:
    """The pilot's words; what it must keep secret is in a file that they name."""
    return [
        *program, "serve", "node", "--crm", str(order.crm), "--ticket", str(ticket_of(place)),
        "--directory", str(place / "record"), "--host", str(host),
    ]  # fmt: skip


def names_below(directory: Path) -> list[str]:
    """The directories in a directory; none where there is no such one."""
    try:
        return sorted(path.name for path in directory.iterdir() if path.is_dir())
    except OSError:
        return []
