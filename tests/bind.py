"""A real BIND 9 for tests: its own directory, a port nobody else has, ended by its process.

It dies with the test run, however that ends (``setpriv --pdeathsig``).
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from virtgrid.wire.dns.key import TsigKey, read_key
from virtgrid.wire.dns.records import ServerAddress
from virtgrid.wire.dns.server import NameServer

ZONE = "svc.test"
NAME = f"web.{ZONE}"
OLD, NEW, OTHER = "10.77.0.10", "198.51.100.10", "203.0.113.9"
OLD6, NEW6, OTHER6 = "fd00::10", "2001:db8::10", "2001:db8::bad"
TTL_S = 300
_START_DEADLINE_S = 20.0

_ZONE = f"""$TTL 60
@ SOA ns hostmaster 1 60 60 600 5
@ NS ns
ns A 127.0.0.1
web {TTL_S} A {OLD}
web {TTL_S} AAAA {OLD6}
v4only {TTL_S} A {OLD}
brief 4 A {OLD}
several A {OLD}
several A {OTHER}
alias CNAME web
locked A {OLD}
sub NS ns.sub
ns.sub A 127.0.0.1
"""
_CONFIGURATION = """include "{home}/virtgrid.key";
include "{home}/stranger.key";
options {{
    directory "{home}"; managed-keys-directory "{home}";
    pid-file none; lock-file none; session-keyfile none;
    listen-on port {port} {{ {listen4} }}; listen-on-v6 port {port} {{ {listen6} }};
    recursion no; dnssec-validation no; allow-query {{ any; }};
}};
controls {{ }};
zone "svc.test" {{
    type primary; file "svc.db";
    update-policy {{
        grant virtgrid name web.svc.test. A AAAA; grant virtgrid name v4only.svc.test. A AAAA;
        grant virtgrid name brief.svc.test. A AAAA;
        grant stranger subdomain svc.test. ANY;
    }};
}};
"""


class Bind:
    """named with a zone. ``key`` may change some names, ``stranger`` all: that one is somebody else."""

    def __init__(
        self,
        home: Path,
        *,
        listen: tuple[str, ...],
        there: Callable[[Sequence[str]], list[str]],
    ) -> None:
        self.home = home
        self.port = 0
        self._listen = listen
        self._there = there
        self._process: subprocess.Popen[bytes] | None = None
        for name in ("virtgrid", "stranger"):
            made = subprocess.run(["tsig-keygen", "-a", "hmac-sha256", name], capture_output=True, check=True)
            self.key_file(name).touch(mode=0o600)
            self.key_file(name).write_bytes(made.stdout)
        (home / "svc.db").write_text(_ZONE)

    def key_file(self, name: str = "virtgrid") -> Path:
        return self.home / f"{name}.key"

    @property
    def key(self) -> TsigKey:
        return read_key(self.key_file())

    @property
    def address(self) -> ServerAddress:
        return ServerAddress(self._listen[0], self.port)

    @property
    def address6(self) -> ServerAddress:
        return ServerAddress("::1", self.port)

    def server(self, *, deadline_s: float = 10.0) -> NameServer:
        return NameServer(self.address, self.key, deadline_s=deadline_s)

    def stranger(self) -> NameServer:
        return NameServer(self.address, read_key(self.key_file("stranger")), deadline_s=10)

    # --- running --------------------------------------------------------------------------

    def start(self) -> None:
        """Start it and wait until it answers; again on the same port once it had one."""
        end_s = time.monotonic() + _START_DEADLINE_S
        while True:
            port = self.port or _free_port()
            self._spawn(port)
            while self._process is not None and time.monotonic() < end_s:
                if self._answers(port):
                    self.port = port
                    return
                if self._process.poll() is not None or "address in use" in self._log().read_text():
                    self.kill()  # somebody was faster: another port
                time.sleep(0.02)
            assert time.monotonic() < end_s, f"named does not start: {self._log().read_text()[-1500:]}"

    def _spawn(self, port: int) -> None:
        four = "".join(f"{one}; " for one in self._listen if ":" not in one)
        six = "".join(f"{one}; " for one in self._listen if ":" in one)
        text = _CONFIGURATION.format(
            home=self.home, port=port, listen4=four or "none;", listen6=six or "none;"
        )
        (self.home / "named.conf").write_text(text)
        words = ["setpriv", "--pdeathsig", "KILL", "--", "named", "-g", "-n", "1", "-c", "named.conf"]
        with self._log().open("wb") as log:
            self._process = subprocess.Popen(
                self._there(words), cwd=self.home, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _log(self) -> Path:
        return self.home / "named.log"

    def _answers(self, port: int) -> bool:
        """Whether it is ready; asked by the program a person would ask with."""
        words = ["dig", "+short", "+time=1", "+tries=1", "+tcp", "-p", str(port), f"@{self._listen[0]}"]
        words += ["-k", str(self.key_file()), ZONE, "SOA"]
        asked = subprocess.run(self._there(words), capture_output=True, timeout=10, check=False)
        return asked.returncode == 0 and asked.stdout.startswith(b"ns.")

    def kill(self) -> None:
        """kill -9, and its end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It takes calls and answers none for as long as this lasts."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    # --- what clients see -----------------------------------------------------------------

    def resolve(self, name: str = NAME, kind: str = "A") -> list[tuple[str, int]]:
        """What a client gets: (address, time to live) each."""
        lines = [line.split() for line in self._dig("+noall", "+answer", name, kind).splitlines()]
        return sorted((data, int(ttl)) for _, ttl, _, told, data in lines if told == kind)

    def serial(self) -> int:
        """The zone's serial number: it grows with every change."""
        return int(self._dig("+short", ZONE, "SOA").split()[2])

    def _dig(self, *words: str) -> str:
        where = [f"@{self._listen[0]}", "-p", str(self.port)]
        return subprocess.run(
            self._there(["dig", "+time=5", "+tries=2", *where, *words]),
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout  # fmt: skip


@contextmanager
def running(
    home: Path,
    *,
    listen: tuple[str, ...] = ("127.0.0.1", "::1"),
    there: Callable[[Sequence[str]], list[str]] = list,
) -> Iterator[Bind]:
    """A BIND that answers, with its files in this directory."""
    if shutil.which("named", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("named (Debian's bind9) is not installed")
    bind = Bind(home, listen=listen, there=there)
    try:
        bind.start()
        yield bind
    finally:
        bind.kill()


def _free_port() -> int:
    """A port free on both loopback addresses at this moment."""
    while True:
        with closing(socket.create_server(("127.0.0.1", 0))) as four:
            port = int(four.getsockname()[1])
            try:
                socket.create_server(("::1", port), family=socket.AF_INET6).close()
            except OSError:
                continue
            return port
