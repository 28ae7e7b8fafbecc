"""A server host: real servers in a namespace of their own, and their clients in another.

What is made is known to the keeper process (keeper.py), which also clears up when the owner crashes.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

from virtgrid.core.errors import DeadlineError, LabError, RefusedError
from virtgrid.lab import pki
from virtgrid.lab.layout import LinkSpec
from virtgrid.lab.servers import layout
from virtgrid.lab.servers.freezer import Freezer, hierarchy
from virtgrid.lab.servers.layout import HostLayout
from virtgrid.net import netns

T = TypeVar("T")

_PROBE_S: Final = 0.01
_START_S: Final = 20.0
#: Programs and the Debian packages they come from (packages.txt).
PROGRAMS: Final = {
    "nginx": "nginx-light",
    "apache2": "apache2-bin",
    "vsftpd": "vsftpd",
    "dovecot": "dovecot-imapd, dovecot-pop3d",
    "exim4": "exim4-daemon-light",
    "curl": "curl",
    "lftp": "lftp",
    "swaks": "swaks",
    "wget": "wget",
}
_PATH: Final = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"


def obstacle(programs: Iterable[str] = PROGRAMS) -> str | None:
    """Why this user on this machine cannot have a server host; None when nothing is in the way."""
    if os.geteuid() != 0:
        return "a server host needs root: it makes namespaces and network interfaces"
    missing = sorted({PROGRAMS[name] for name in programs if not shutil.which(name, path=_PATH)})
    if missing:
        return f"Debian packages are missing: {', '.join(missing)} (tools/setup installs them)"
    if not Path("/dev/net/tun").exists():
        return "the kernel has no TAP devices (/dev/net/tun)"
    if hierarchy() is None:
        return "no control groups of version 2 are mounted (cgroup2)"
    return None


def require_possible() -> None:
    """RefusedError when ``obstacle`` names one."""
    if reason := obstacle():
        raise RefusedError(reason, hint="make setup" if os.geteuid() == 0 else "run it with sudo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server to start: in the foreground, everything it writes below the host's directory.

    ports: TCP ports that answer once it is ready. files: contents by path, written before. directories:
    path -> owner (None: root). log: shown when it does not start.
    """

    name: str
    argv: tuple[str, ...]
    ports: tuple[int, ...]
    files: Mapping[Path, str | bytes] = field(default_factory=dict)
    directories: Mapping[Path, str | None] = field(default_factory=dict)
    log: Path | None = None


class ServerHost:
    """Two namespaces and a cable that exist until ``close``; use as a context manager.

    link: between guest and clients. offload: whether frames may be of up to 64 KB (layout.py).
    directory: of this host alone, for its servers' files; world-readable, since servers give up root.
    Errors: LabError when the host cannot be made or a server does not start.
    """

    def __init__(self, name: str, *, link: LinkSpec = layout.CABLE, offload: bool = True) -> None:
        directory = Path(tempfile.mkdtemp(prefix=f"vgs-{name}-"))
        directory.chmod(0o755)
        self.layout = HostLayout(name=name, directory=directory, link=link, offload=offload)
        self.directory = directory
        self._freezer = Freezer(self.layout.guest)
        self._servers: list[subprocess.Popen[bytes]] = []
        # A session of its own: Ctrl-C at a terminal is the owner's business.
        self._keeper = subprocess.Popen(
            [sys.executable, "-m", "virtgrid.lab.servers.keeper", self.layout.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            env={"PATH": _PATH, "PYTHONPATH": str(Path(__file__).parents[3])},
        )
        try:
            self._answer("the server host")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ServerHost:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything in the namespaces and remove them."""
        if self._keeper.stdin is not None and not self._keeper.stdin.closed:
            self._keeper.stdin.close()
        self._keeper.wait(60)
        for server in self._servers:
            server.wait(10)
        if self._keeper.stdout is not None:
            self._keeper.stdout.close()

    # -- the guest -----------------------------------------------------------------------------

    def start(self, *servers: Server) -> None:
        """Start servers at once and wait until all their ports answer."""
        for server in servers:
            for path, owner in server.directories.items():
                path.mkdir(parents=True, exist_ok=True)
                if owner:
                    shutil.chown(path, owner)
            for path, content in server.files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        started = [
            (server, self._popen(self.layout.guest, self._freezer.started_in(server.argv), server.name))
            for server in servers
        ]
        self._servers += [process for _, process in started]
        deadline_s = time.monotonic() + _START_S
        for server, process in started:
            for port in server.ports:
                self._await_port(server, process, port, deadline_s)

    def hold(self) -> None:
        """Stop the guest: no frame in or out, no server runs (keeper.py)."""
        self._order(b"hold\n")

    def go_on(self) -> None:
        """The guest runs again."""
        self._order(b"go on\n")

    def in_guest(self, function: Callable[[], T]) -> T:
        """Call a function in a thread that lives in the guest's namespace."""
        return netns.run_in(self.layout.guest, function)

    # -- the clients ---------------------------------------------------------------------------

    def in_client(self, function: Callable[[], T]) -> T:
        """Call a function in a thread that lives in the clients' namespace."""
        return netns.run_in(self.layout.client, function)

    def connect(
        self, port: int, *, address: str = layout.GUEST_V4, timeout_s: float = 20.0, receive_bytes: int = 0
    ) -> socket.socket:
        """A connection from the clients' namespace. receive_bytes: a small buffer stalls a download."""

        def make() -> socket.socket:
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
            sock.settimeout(timeout_s)
            if receive_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            sock.connect((address, port))
            return sock

        return self.in_client(make)

    def client(self, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a program in the clients' namespace."""
        return self._popen(self.layout.client, argv, Path(argv[0]).name, **options)

    # ------------------------------------------------------------------------------------------

    def _popen(
        self, namespace: str, argv: Sequence[str], name: str, **options: Any
    ) -> subprocess.Popen[bytes]:
        environment = {"PATH": _PATH, "HOME": str(self.directory), "LC_ALL": "C.UTF-8"}
        options = {"stdin": subprocess.DEVNULL, "cwd": self.directory, "env": environment, **options}
        if "stdout" not in options:
            with (self.directory / f"{name}.out").open("ab") as output:
                return netns.run_in(
                    namespace, lambda: subprocess.Popen(argv, stdout=output, stderr=output, **options)
                )
        return netns.run_in(namespace, lambda: subprocess.Popen(argv, **options))

    def _await_port(
        self, server: Server, process: subprocess.Popen[bytes], port: int, deadline_s: float
    ) -> None:
        def answers() -> bool:
            # From within the guest: the tap sees nothing of it.
            with socket.socket() as sock:
                sock.settimeout(1.0)
                return sock.connect_ex((layout.GUEST_V4, port)) == 0

        while not self.in_guest(answers):
            if process.poll() is not None:
                raise LabError(f"{server.name} ended at once", cause=self._tail(server))
            if time.monotonic() > deadline_s:
                raise DeadlineError(
                    f"{server.name} did not answer on port {port} in time", cause=self._tail(server)
                )
            time.sleep(_PROBE_S)

    def _tail(self, server: Server) -> str:
        texts = []
        for path in (self.directory / f"{server.name}.out", server.log):
            if path is not None and path.exists():
                texts.append(path.read_text(errors="replace").strip()[-500:])
        return " | ".join(text for text in texts if text) or "it said nothing"

    def _order(self, order: bytes) -> None:
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(order)
        self._keeper.stdin.flush()
        self._answer("its keeper")

    def _answer(self, who: str) -> None:
        assert self._keeper.stdout is not None
        descriptor = self._keeper.stdout.fileno()
        if not select.select([descriptor], [], [], _START_S)[0] or os.read(descriptor, 100) != b"done\n":
            raise LabError(f"{who} did not answer", hint="what it said is on standard error")


def certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate and its key for the guest's addresses, below the directory: two paths."""
    pem, key = pki.single(["guest.test", layout.GUEST_V4, layout.GUEST_V6])
    paths = directory / "tls.pem", directory / "tls.key"
    for path, content, mode in zip(paths, (pem, key), (0o644, 0o600), strict=True):
        path.touch(mode)
        path.write_bytes(content)
    return paths
