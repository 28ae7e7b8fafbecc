"""The lab's smaller parts: netem's words, orders over a socket, certificates, telling processes apart."""

from __future__ import annotations

import ipaddress
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from virtgrid.core.errors import LabError, RefusedError
from virtgrid.lab import control, pki, processes
from virtgrid.lab import lab as lab_module
from virtgrid.net import shaping
from virtgrid.wire.pki.authority import Authority


def test_netem_is_told_rate_delay_queue_and_loss() -> None:
    words = shaping.netem_arguments(rate_bytes_s=12.5e6, delay_s=0.05, queue_s=0.1, loss=0.1)
    assert words == ["netem", "limit", "1250", "rate", "100000000bit", "delay", "50000us", "loss", "10%"]


def test_netem_without_a_rate_is_only_a_delay_and_a_cut_is_all_lost() -> None:
    words = shaping.netem_arguments(rate_bytes_s=0, delay_s=0, queue_s=0.1, loss=1.0)
    assert words == ["netem", "limit", "100000", "loss", "100%"]


def test_netem_counters_are_read_from_json() -> None:
    text = json.dumps(
        [{"kind": "netem", "root": True, "bytes": 1514, "packets": 1, "drops": 3, "options": {}}]
    )
    assert shaping.parse_counters(text) == {"frames": 1, "bytes": 1514, "dropped": 3}
    assert shaping.parse_counters("[]") == {"frames": 0, "bytes": 0, "dropped": 0}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    """A control server that doubles numbers."""

    def handle(order: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"twice": 2 * order["number"]}

    where = tmp_path / "s"
    server = control.ControlServer(where, handle)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            for descriptor in select.select(server.descriptors(), [], [], 0.05)[0]:
                server.ready(descriptor)

    thread = threading.Thread(target=serve)
    thread.start()
    yield where
    stop.set()
    thread.join()


def test_an_order_is_answered_and_the_listener_known(served: Path) -> None:
    assert control.ask(served, {"do": "double", "number": 21}) == {"twice": 42}
    assert control.listener_pid(served) == os.getpid()
    assert control.ask(served, {"do": "double", "number": 1}) == {"twice": 2}


def test_a_senseless_order_is_refused_and_the_server_goes_on(served: Path) -> None:
    with pytest.raises(LabError) as caught:
        control.ask(served, {"do": "double"})
    assert "not an order" in (caught.value.cause or "")
    assert control.ask(served, {"do": "double", "number": 1}) == {"twice": 2}


def test_only_the_owner_may_give_orders(served: Path) -> None:
    assert served.stat().st_mode & 0o077 == 0


def test_nobody_at_the_socket_is_an_error_not_a_hang(tmp_path: Path) -> None:
    assert control.listener_pid(tmp_path / "none") is None
    with pytest.raises(LabError):
        control.ask(tmp_path / "none", {"do": "x"})


def test_certificates_stand_for_the_sites_names_and_only_under_their_own_authority(tmp_path: Path) -> None:
    authority, foreign = pki.authority(tmp_path / "ca", "ours"), pki.authority(tmp_path / "other", "theirs")
    pki.furnish(authority, tmp_path, "bob", ("bob", "bob.lab.lab", "10.99.0.2"))
    certificate = x509.load_pem_x509_certificate((tmp_path / "libvirt/servercert.pem").read_bytes())

    def verify(trusted: Authority, name: x509.verification.Subject) -> None:
        builder = PolicyBuilder().store(Store([trusted.hosts.certificate]))
        builder.build_server_verifier(name).verify(certificate, [])

    verify(authority, x509.DNSName("bob"))
    verify(authority, x509.DNSName("bob.lab.lab"))
    verify(authority, x509.IPAddress(ipaddress.ip_address("10.99.0.2")))
    with pytest.raises(VerificationError):
        verify(authority, x509.DNSName("alice"))
    with pytest.raises(VerificationError):
        verify(foreign, x509.DNSName("bob"))


def test_private_keys_are_private_and_the_authority_can_be_read_back(tmp_path: Path) -> None:
    authority = pki.authority(tmp_path / "ca", "ours")
    pki.furnish(authority, tmp_path / "pki", "bob", ("bob",))
    keys = [*tmp_path.rglob("*key.pem")]
    assert len(keys) == 2 + 4 + 3
    assert all(key.stat().st_mode & 0o077 == 0 for key in keys)
    assert pki.authority(tmp_path / "ca", "ours").certificates == authority.certificates
    assert pki.furnished(tmp_path / "pki")


def test_a_lock_names_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "daemon.pid"
    path.write_text("1")
    assert processes.lock_owner(path) is None
    script = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print(flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert processes.lock_owner(path) == holder.pid
        assert holder.stdin is not None
        holder.stdin.close()
    assert processes.lock_owner(path) is None


def test_a_process_is_known_by_its_mark_and_its_children_by_descent(tmp_path: Path) -> None:
    signs = processes.Signs(mark=f"{processes.MARKER}={tmp_path}".encode())
    assert processes.find(signs) == set()
    script = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'print(flush=True); input()'], env={})\n"
        "child.wait()\n"
    )
    environment = {**os.environ, processes.MARKER: str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        found = processes.find(signs)
        assert parent.pid in found
        assert len(found) == 2
        assert processes.kill_all(signs) == 2
    assert processes.find(signs) == set()


def test_without_root_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in (lab_module.obstacle() or "")
    with pytest.raises(RefusedError) as caught:
        lab_module.require_possible()
    assert caught.value.exit_status == 3
    with pytest.raises(RefusedError):
        lab_module.take_down("nothere")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab_module.shutil, "which", lambda *_, **__: None)
    assert "libvirt-daemon" in (lab_module.obstacle() or "")
