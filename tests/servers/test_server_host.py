"""The server host itself: what it promises to tests and benches."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from following import until

from virtgrid.lab import processes
from virtgrid.lab.servers import layout, web
from virtgrid.lab.servers.freezer import Freezer
from virtgrid.lab.servers.host import ServerHost
from virtgrid.net import netns

pytestmark = pytest.mark.lab

_OWNER = """
import sys
from virtgrid.lab.servers import web
from virtgrid.lab.servers.freezer import Freezer
from virtgrid.lab.servers.host import ServerHost
host = ServerHost(sys.argv[1])
host.start(web.nginx(host.directory))
print(host.directory, flush=True)
sys.stdin.read()
"""


def test_nothing_is_left_when_it_is_closed(host_name: str) -> None:
    with ServerHost(host_name) as host:
        host.start(web.nginx(host.directory))
        names = (host.layout.guest, host.layout.client)
        assert all(netns.exists(name) for name in names)
    assert not any(netns.path(name).exists() for name in names)
    assert not host.directory.exists()
    assert not Freezer(host.layout.guest).directory.exists()


def test_nothing_is_left_when_its_owner_is_killed(host_name: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER, host_name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        directory = Path(owner.stdout.readline().strip())
        names = netns.names(f"vgs-{host_name}-")
        namespaces = {identity for name in names if (identity := netns.identity(netns.path(name)))}
        assert len(namespaces) == 2
        assert processes.find(processes.Signs(namespaces=namespaces))
        os.kill(owner.pid, signal.SIGKILL)
    until(lambda: not directory.exists(), "the directory is removed")
    assert not netns.names(f"vgs-{host_name}-")
    assert not processes.find(processes.Signs(namespaces=namespaces))


def test_a_guest_that_is_held_answers_nothing_and_loses_nothing(host: ServerHost) -> None:
    answers: list[float] = []

    def ask() -> None:
        with host.connect(web.NGINX_PORT) as sock:
            sock.sendall(b"GET /small HTTP/1.1\r\nHost: guest\r\n\r\n")
            assert sock.recv(15) == b"HTTP/1.1 200 OK"
            answers.append(time.monotonic())

    host.hold()
    client = threading.Thread(target=ask)
    client.start()
    client.join(0.25)
    assert client.is_alive()
    released_s = time.monotonic()
    host.go_on()
    client.join(20)
    (answered_s,) = answers
    # The SYN waited in the TAP's queue: nobody had to send it again after a second.
    assert 0 < answered_s - released_s < 0.7


def test_no_server_of_a_held_guest_runs(host: ServerHost) -> None:
    namespace = netns.identity(netns.path(host.layout.guest))
    assert namespace
    freezer = Freezer(host.layout.guest)
    host.hold()
    try:
        servers = processes.find(processes.Signs(namespaces={namespace}))
        members = {int(word) for word in (freezer.directory / "cgroup.procs").read_text().split()}
        assert servers
        assert servers == members
        assert "frozen 1" in (freezer.directory / "cgroup.events").read_text()
    finally:
        host.go_on()
    with host.connect(web.NGINX_PORT) as sock:
        sock.sendall(b"GET /small HTTP/1.1\r\nHost: guest\r\n\r\n")
        assert sock.recv(15) == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize("address", [layout.GUEST_V4, layout.GUEST_V6])
@pytest.mark.parametrize("port", [21, 25, 80, 110, 143, 443, 993, 995, 8080])
def test_every_server_answers_on_both_address_families(host: ServerHost, address: str, port: int) -> None:
    with host.connect(port, address=address) as sock:
        assert sock.getpeername()[:2] == (address, port)
        assert sock.family == (socket.AF_INET6 if ":" in address else socket.AF_INET)
