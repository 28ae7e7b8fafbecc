"""Where a program listens: ``unix:/run/virtgrid/crm.sock`` or ``tls://crm.site-a.example:7430``. Dialling
it, and listening there.

Over TLS both sides have shown a certificate before a word is said (``virtgrid.wire.tls``), and a host whose
clock is wrong is refused (``virtgrid.wire.skew``). Who calls is ``line.peer``; what such a one may ask is
decided from the listener's table before its handler hears of it (``virtgrid.wire.identity``).
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import os
import re
import socket
import ssl
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from virtgrid.core.errors import NotAdmittedError, PeerUnreachableError, RefusedError, UsageError
from virtgrid.wire import skew
from virtgrid.wire.identity import Identity, Rights, Role
from virtgrid.wire.line import Handler, Line, LineLostError
from virtgrid.wire.reception import Manner, Reception, Serve
from virtgrid.wire.tls import Tls, peer_certificate, reason

CONNECT_DEADLINE_S: Final = 10.0
_BACKLOG: Final = 128
_SOCKET_PATH_LIMIT: Final = 107
"""sockaddr_un has 108 bytes, one of them the end."""
_UNIX: Final = re.compile(r"unix:(/[^\0]*)")
_TLS: Final = re.compile(
    r"tls://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?):([0-9]{1,5})"
)


@dataclass(frozen=True, slots=True)
class HostPort:
    """A host's name or address, and a TCP port. Port 0, for listening only: any that is free."""

    host: str
    port: int


_LOOK: Final = "virtgrid pki show, here and there, says whose certificates are in use"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A unix socket's path, or a host and port where TLS is spoken."""

    place: Path | HostPort

    @staticmethod
    def parse(text: str) -> Endpoint:
        """``unix:/PATH`` or ``tls://HOST:PORT``. Errors: UsageError."""
        if found := _TLS.fullmatch(text):
            host, port = found[1], int(found[3])
            if port < 1 << 16 and _is_host(host):
                return Endpoint(HostPort(host.strip("[]"), port))
        found = _UNIX.fullmatch(text)
        if found is None:
            raise UsageError(
                f"'{text[:200]}' is no endpoint",
                hint="unix:/run/virtgrid/crm.sock or tls://crm.example:7430, for instance",
            )
        path = Path(found[1])
        if len(os.fsencode(path)) > _SOCKET_PATH_LIMIT:
            raise UsageError(f"the path of a socket has at most {_SOCKET_PATH_LIMIT} bytes: {path}")
        return Endpoint(path)

    def __str__(self) -> str:
        if isinstance(self.place, Path):
            return f"unix:{self.place}"
        host = f"[{self.place.host}]" if ":" in self.place.host else self.place.host
        return f"tls://{host}:{self.place.port}"

    @property
    def is_network(self) -> bool:
        """Whether TLS is spoken there, for which certificates are needed."""
        return isinstance(self.place, HostPort)

    @property
    def path(self) -> Path:
        """Of the unix socket. Errors: UsageError for what is spoken to only on this host."""
        if not isinstance(self.place, Path):
            raise UsageError(f"{self} is no unix socket", hint="unix:/run/virtgrid/host.sock, for instance")
        return self.place


def _is_host(text: str) -> bool:
    if not text.startswith("["):
        return True
    try:
        ipaddress.IPv6Address(text[1:-1])
    except ValueError:
        return False
    return True


async def dial(
    where: Endpoint,
    handler: Handler,
    *,
    name: str,
    tls: Tls | None = None,
    expect: Role | None = None,
    site: str | None = None,
    deadline_s: float = CONNECT_DEADLINE_S,
) -> Line:
    """Connect. For TLS endpoints: tls, who we are, and expect, the role the other side must have, are needed
    there; site: of which it must be, if that matters.

    Errors: PeerUnreachableError: nobody there, or TLS failed (NotAdmittedError: it is not who we mean, and
    asking again changes nothing); RefusedError: the clocks do not agree.
    """
    if isinstance(where.place, HostPort):
        if tls is None or expect is None:
            raise RefusedError(f"{where} needs a certificate", hint="docs/reference/pki.md")
        line = await _open_tls(where, where.place, handler, name, tls, deadline_s)
        try:
            await _require_peer(line, where, expect, site, deadline_s)
        except BaseException:
            await line.close()
            raise
        return line
    try:
        async with asyncio.timeout(deadline_s):
            reader, writer = await asyncio.open_unix_connection(where.path)
    except TimeoutError as error:
        raise _late(name, where, deadline_s) from error
    except OSError as error:
        raise _absent(name, where, error) from error
    return Line(reader, writer, handler, name=name)


def _late(name: str, where: Endpoint, deadline_s: float) -> PeerUnreachableError:
    return PeerUnreachableError(f"{name} at {where} did not take the call within {deadline_s:g} s")


def _absent(name: str, where: Endpoint, error: OSError) -> PeerUnreachableError:
    return PeerUnreachableError(
        f"{name} cannot be reached at {where}", cause=error.strerror or str(error), hint="is it running?"
    )


async def _open_tls(
    where: Endpoint, place: HostPort, handler: Handler, name: str, tls: Tls, deadline_s: float
) -> Line:
    try:
        tls.require_own()
    except RefusedError as error:
        raise NotAdmittedError(f"{name} at {where} is not called: {error.what}", hint=error.hint) from error
    try:
        async with asyncio.timeout(deadline_s):
            reader, writer = await asyncio.open_connection(
                place.host, place.port, ssl=tls.client_context(), server_hostname=place.host
            )
    except TimeoutError as error:
        raise _late(name, where, deadline_s) from error
    except ssl.SSLCertVerificationError as error:
        raise NotAdmittedError(f"{name} at {where} is not spoken to: {reason(error)}", hint=_LOOK) from error
    except (ssl.SSLError, ConnectionResetError, ConnectionAbortedError) as error:
        raise PeerUnreachableError(f"{name} at {where} is not spoken to: {reason(error)}") from error
    except OSError as error:
        raise _absent(name, where, error) from error
    try:
        shown = tls.examine(peer_certificate(writer.get_extra_info("ssl_object")))
    except RefusedError as error:
        writer.transport.abort()
        raise NotAdmittedError(
            f"{name} at {where} is not spoken to: {error.what}", hint=error.hint or _LOOK
        ) from error
    good = functools.partial(tls.require_good, shown)
    return Line(reader, writer, handler, name=name, clock=tls.clock, peer=shown.identity, still_good=good)


async def _require_peer(line: Line, where: Endpoint, role: Role, site: str | None, deadline_s: float) -> None:
    """Whom we meant, who takes us too, and whose clock is right."""
    who = line.peer
    assert isinstance(who, Identity)
    if who.role is not role or site not in (None, who.site):
        meant = f"no {role}" if site is None else f"no {role} of site {site}"
        raise NotAdmittedError(
            f"{line.name} at {where} is not spoken to: {who} answers, which is {meant}",
            hint="the address, or the certificate there, is another one's",
        )
    try:
        # Only now is it known that the other side takes our certificate: TLS 1.3 has the client finish first.
        ahead_s = await line.skew_s(deadline_s=deadline_s)
    except LineLostError as error:
        raise PeerUnreachableError(
            f"{line.name} at {where} does not let us in",
            cause=error.cause,
            hint="its log says why; virtgrid pki show looks at our certificate",
        ) from error
    skew.require_agreement(f"{line.name} at {where}", ahead_s)


class Listener:
    """A place that is listened at. where: the same, with the port that was free."""

    def __init__(self, where: Endpoint, reception: Reception) -> None:
        self.where, self._reception = where, reception

    async def close(self) -> None:
        """Stop listening, hang up on everybody, remove the socket."""
        await self._reception.close()
        if isinstance(self.where.place, Path):
            self.where.place.unlink(missing_ok=True)


async def listen(
    where: Endpoint,
    handler: Handler,
    *,
    name: str,
    mode: int = 0o600,
    limit: int = 512,
    serve: Serve | None = None,
    tls: Tls | None = None,
    rights: Rights | None = None,
) -> Listener:
    """Listen for at most ``limit`` callers at a time.

    name: what a caller is, for the log. mode: of the unix socket's file. serve: called with each line as it
    begins; the line is closed when it returns, or else when the caller hangs up. rights: who may ask what;
    nothing else reaches the handler. tls and rights are needed at TLS endpoints.
    Errors: RefusedError when somebody listens there already or the place cannot be used.
    """
    if isinstance(where.place, HostPort):
        if tls is None or rights is None:
            raise RefusedError(f"{where} needs a certificate and a table of rights")
    else:
        tls = None
    sock, where = await bind(where, mode=mode)
    manner = Manner(handler=handler, name=name, limit=limit, serve=serve, tls=tls, rights=rights)
    return Listener(where, Reception(sock, manner))


async def bind(where: Endpoint, *, mode: int = 0o600) -> tuple[socket.socket, Endpoint]:
    """A listening socket, and where it listens: with the port that was free. mode: of a unix socket's file.

    Errors: RefusedError when somebody listens there already or the place cannot be used.
    """
    if isinstance(where.place, HostPort):
        sock = await _bind_port(where, where.place)
        host, port = sock.getsockname()[:2]
        return sock, Endpoint(HostPort(host, port))
    return _bind_path(where, mode), where


async def _bind_port(where: Endpoint, place: HostPort) -> socket.socket:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
    except OSError as error:
        raise RefusedError(f"cannot listen at {where}", cause=error.strerror) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise RefusedError(f"cannot listen at {where}", cause=error.strerror) from error
    return sock


def _bind_path(where: Endpoint, mode: int) -> socket.socket:
    """A listening socket. A file left by a program that is gone is taken over; a living one is refused."""
    path = where.path
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        found = path.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise RefusedError(f"cannot listen at {where}", cause=error.strerror) from error
    else:
        if not stat.S_ISSOCK(found.st_mode):
            raise RefusedError(f"cannot listen at {where}: there is something that is no socket")
        if _answers(path):
            raise RefusedError(f"cannot listen at {where}: somebody does already")
        path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # Made without any rights and given them afterwards: nobody gets in between.
        before = os.umask(0o777)
        try:
            sock.bind(os.fspath(path))
        finally:
            os.umask(before)
        path.chmod(mode)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise RefusedError(f"cannot listen at {where}", cause=error.strerror) from error
    return sock


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # slow is not gone
        return True
