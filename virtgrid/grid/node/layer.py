"""Files of a sandbox, written and read from outside.

Whoever is inside may have put links where we write: every directory is opened without following links,
and a file is written beside its place and renamed into it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from typing import Final

from virtgrid.core.errors import NotFoundError, UsageError
from virtgrid.grid.node import keys, root
from virtgrid.grid.node.keys import PublicKeys
from virtgrid.grid.node.spec import SandboxSpec

HOSTFILE: Final = "/etc/virtgrid/hostfile"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LIMIT_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What SET_KEYS gives, each the whole text of a file.

    known_hosts, authorized_keys: below ~/.ssh. hostfile: /etc/virtgrid/hostfile, for mpirun and the like.
    hosts: the cluster's (address, name), added to /etc/hosts.
    """

    known_hosts: str
    authorized_keys: str
    hostfile: str = ""
    hosts: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        sizes = (len(self.known_hosts), len(self.authorized_keys), len(self.hostfile), 64 * len(self.hosts))
        if sum(sizes) > _LIMIT_BYTES:
            raise UsageError("the keys and hosts of a cluster are at most 16 MiB")
        for address, name in self.hosts:
            if (
                not set(address) <= root.ADDRESS_CHARACTERS
                or not set(name) <= root.NAME_CHARACTERS
                or not name
            ):
                raise UsageError(f"{address[:60]!r} {name[:60]!r} cannot be a line of /etc/hosts")


def write_new(path: str, text: str, *, mode: int = 0o600, uid: int = 0, gid: int = 0) -> None:
    """A file that must not be there yet."""
    descriptor = os.open(path, _NEW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, mode)
        os.fchown(descriptor, uid, gid)
        file.write(text)


def write_keys(directory: str, name: str, user: str, account: root.Account, base: int) -> None:
    """Both key pairs into a layer that nobody has used yet; the user may log in to itself."""
    host, own = keys.make(name), keys.make(f"{user}@{name}")
    upper = f"{directory}/over/upper"
    write_new(f"{upper}/{keys.HOST_KEY}", host.private, uid=base, gid=base)
    write_new(f"{upper}/{keys.HOST_KEY}.pub", f"{host.public}\n", mode=0o644, uid=base, gid=base)
    ssh = f"{directory}/ssh"
    for file, text, mode in (
        (keys.USER_KEY, own.private, 0o600),
        (f"{keys.USER_KEY}.pub", f"{own.public}\n", 0o644),
        ("authorized_keys", f"{own.public}\n", 0o600),
        ("known_hosts", f"{name} {' '.join(host.public.split()[:2])}\n", 0o644),
    ):
        write_new(f"{ssh}/{file}", text, mode=mode, uid=account.uid, gid=account.gid)


def read_keys(home: str) -> PublicKeys:
    """The public halves. Errors: NotFoundError."""
    return PublicKeys(
        host=_read_line(f"{home}/root/etc/ssh", f"{os.path.basename(keys.HOST_KEY)}.pub"),
        user=_read_line(f"{home}/layer/ssh", f"{keys.USER_KEY}.pub"),
    )


def _read_line(directory: str, name: str) -> str:
    try:
        with _opened(directory) as place:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=place)
            with os.fdopen(file, "rb") as opened:
                text = opened.read(4096).decode(errors="replace").strip()
    except OSError as error:
        raise NotFoundError("the sandbox has no keys yet", cause=str(error)) from error
    if len(text.split()) < 2 or "\n" in text or not text.startswith("ssh-ed25519 "):
        raise NotFoundError(f"the sandbox's {name} is no public key")
    return text


def write_trust(home: str, spec: SandboxSpec, uid: int, gid: int, base: int, trust: Trust) -> None:
    """Replace known_hosts, authorized_keys, hostfile and hosts."""
    with _opened(f"{home}/layer/ssh") as ssh:
        _replace(ssh, "known_hosts", trust.known_hosts, 0o644, uid, gid)
        _replace(ssh, "authorized_keys", trust.authorized_keys, 0o600, uid, gid)
    lines = [f"{address} {name}" for address, name in trust.hosts if name != spec.name]
    hosts = "\n".join(
        ["127.0.0.1 localhost", "::1 localhost ip6-localhost", f"{spec.ip} {spec.name}", *lines]
    )
    with _opened(f"{home}/root/etc") as etc:
        _replace(etc, "hosts", f"{hosts}\n", 0o644, base, base)
    with _opened(f"{home}/root/etc/virtgrid") as ours:
        _replace(ours, os.path.basename(HOSTFILE), trust.hostfile, 0o644, base, base)


@contextlib.contextmanager
def _opened(directory: str):  # type: ignore[no-untyped-def]
    """A directory's descriptor; below ROOT/ no component may be a link."""
    top, _, below = directory.partition("/root/")
    descriptor = os.open(f"{top}/root" if below else top, _DIRECTORY)
    try:
        for part in filter(None, below.split("/")):
            inner = os.open(part, _DIRECTORY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _replace(directory: int, name: str, text: str, mode: int, uid: int, gid: int) -> None:
    fresh = f".{name}.{secrets.token_hex(6)}"
    descriptor = os.open(fresh, _NEW, 0o600, dir_fd=directory)
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, mode)
            os.fchown(descriptor, uid, gid)
            file.write(text)
        os.rename(fresh, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(fresh, dir_fd=directory)
        raise
