"""A tap, a guest behind it and a web server in the guest: namespaces of one test's own."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from virtgrid.net.capture import TapWatcher
from virtgrid.tracker.tracker import Change
from virtgrid.tracker.views import Snapshot

GUEST_MAC = "52:54:00:0a:0b:0c"
GUEST = "192.0.2.2"
GUEST_6 = "2001:db8:77::2"
T = TypeVar("T")
Watcher = TapWatcher[Snapshot, Change]

_CONFIGURATION = """
daemon off; worker_processes 1; pid {dir}/pid; error_log {dir}/error.log; user root;
events {{ worker_connections 256; }}
http {{
  access_log off; client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/f;
  uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s; default_type text/plain; keepalive_timeout 600;
  gzip on; gzip_types text/plain; gzip_min_length 1000; gzip_comp_level 1;
  server {{
    listen {guest}:80; listen [{guest_6}]:80; root {dir}/www;
    location /slow/ {{ limit_rate 20k; alias {dir}/www/; }}
    location /paced/ {{ limit_rate 2m; alias {dir}/www/; }}
  }}
}}
"""


def in_namespace(name: str, action: Callable[[], T]) -> T:
    """Run ``action`` in a thread that lives in a network namespace."""
    out: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with open(f"/run/netns/{name}") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):
                    raise OSError(ctypes.get_errno(), "setns")
            out.append(action())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if failed:
        raise failed[0]
    return out[0]


def until(condition: Callable[[], bool], what: str, limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited {limit_s} s for: {what}"
        time.sleep(0.01)


class Site:
    """A host's namespace with a ``tap`` and a guest's namespace behind it."""

    def __init__(self, tag: str, directory: Path) -> None:
        self.host, self.guest = f"vgc{tag}h", f"vgc{tag}g"
        self.directory = directory

    def ip(self, *words: str, where: str) -> None:
        subprocess.run(["ip", "-n", where, *words], check=True, timeout=30)

    def connect(self, address: str = GUEST, port: int = 0) -> socket.socket:
        """A client's connection from the host; port: the one to come from."""
        source = ("::" if ":" in address else "", port)
        return in_namespace(
            self.host, lambda: socket.create_connection((address, 80), timeout=20, source_address=source)
        )

    def wire(self) -> socket.socket:
        """A packet socket in the guest that sends whole frames."""

        def make() -> socket.socket:
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            wire.bind(("eth0", 0))
            return wire

        return in_namespace(self.guest, make)


@contextmanager
def site_up() -> Iterator[Site]:
    """Everything up, and taken down again."""
    for program in ("ip", "nginx"):
        if not shutil.which(program) and not Path(f"/usr/sbin/{program}").exists():
            pytest.skip(f"{program} is not installed")
    directory = Path(tempfile.mkdtemp(prefix="vg-capture-"))
    site = Site(f"{os.getpid()}", directory)
    server: subprocess.Popen[bytes] | None = None
    try:
        for name in (site.host, site.guest):
            subprocess.run(["ip", "netns", "add", name], check=True, timeout=30)
        site.ip(
            "link",
            "add",
            "tap0",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            site.guest,
            where=site.host,
        )
        site.ip("addr", "add", "192.0.2.1/24", "dev", "tap0", where=site.host)
        site.ip("link", "set", "tap0", "up", where=site.host)
        site.ip("link", "set", "eth0", "address", GUEST_MAC, where=site.guest)
        site.ip("addr", "add", f"{GUEST}/24", "dev", "eth0", where=site.guest)
        site.ip("link", "set", "eth0", "up", where=site.guest)
        site.ip("addr", "add", "2001:db8:77::1/64", "dev", "tap0", "nodad", where=site.host)
        site.ip("addr", "add", f"{GUEST_6}/64", "dev", "eth0", "nodad", where=site.guest)
        (directory / "www").mkdir()
        (directory / "www/small").write_bytes(b"x" * 1000)
        (directory / "www/page").write_bytes(b"x" * 40_000)
        (directory / "www/mixed").write_bytes(os.urandom(300_000))
        (directory / "www/large").write_bytes(b"x" * (8 << 20))
        (directory / "nginx.conf").write_text(
            _CONFIGURATION.format(dir=directory, guest=GUEST, guest_6=GUEST_6)
        )
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        server = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                site.guest,
                nginx,
                "-p",
                str(directory),
                "-c",
                str(directory / "nginx.conf"),
            ]
        )

        def listening() -> bool:
            assert server is not None
            assert server.poll() is None, "nginx ended"
            try:
                site.connect().close()
            except ConnectionRefusedError:
                return False
            return True

        until(listening, "nginx listens")
        yield site
    finally:
        if server is not None:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait(10)
        for name in (site.host, site.guest):
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=30)
        shutil.rmtree(directory, ignore_errors=True)


def ask(sock: socket.socket, path: str, *fields: str) -> None:
    lines = [f"GET {path} HTTP/1.1", "Host: guest", *fields, "", ""]
    sock.sendall("\r\n".join(lines).encode())


def read_answer(sock: socket.socket) -> int:
    """Read one answer with a counted body; its body's length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    got = len(body)
    while got < length:
        part = sock.recv(1 << 20)
        assert part, "the server closed in the middle"
        got += len(part)
    return length
