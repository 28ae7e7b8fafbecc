"""The qemu hook: never in a domain's way, says what virtgridd did not hear, and adapts what arrives."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtgrid.host import incoming, notices, qemu_hook
from virtgrid.host.hooks import program

DOMAIN = b"""\
<domain type="kvm" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
  <!-- kept -->
  <name>web1</name>
  <metadata><a:b xmlns:a="urn:a"/></metadata>
  <devices>
    <disk type="file"><source file="/srv/a/images/web1.qcow2"/></disk>
    <disk type="file"><source file="/srv/aa/images/web1.qcow2"/></disk>
    <interface type="bridge"><source bridge="br-a"/></interface>
    <interface type="bridge"><source bridge="br-x"/></interface>
  </devices>
  <qemu:commandline/>
</domain>
"""
MAPS = ({"br-a": "br-b"}, {"/srv/a": "/srv/b", "/srv/a/images": "/pool"})


@pytest.fixture
def posted(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(str(tmp_path / "notice"))
        line.setblocking(False)
        yield line


@pytest.mark.parametrize("name", ["web1", 'we"b', "wéb", "a b", "x" * 200])
def test_a_notice_is_what_virtgridd_reads(name: str, posted: socket.socket, tmp_path: Path) -> None:
    assert qemu_hook.post(qemu_hook.notice(name, "started", "begin"), str(tmp_path / "notice")) is None
    assert notices.read(posted.recv(4096)) == notices.Notice(
        driver="qemu", domain=name, operation="started", sub_operation="begin"
    )


def test_without_virtgridd_the_reason_is_told(tmp_path: Path, posted: socket.socket) -> None:
    assert qemu_hook.post(b"{}", str(tmp_path / "absent")) == "virtgridd does not run"
    # Hung: nobody takes what is posted, so its queue fills up.
    told = [qemu_hook.post(b"{}", str(tmp_path / "notice")) for _ in range(40)]
    assert told[0] is None
    assert told[-1] is not None
    assert told[-1].startswith("virtgridd does not take notices")
    posted.close()
    assert qemu_hook.post(b"{}", str(tmp_path / "notice")) == "virtgridd does not run", "it died"


def test_the_reason_is_a_line_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(tmp_path / "log"))
        qemu_hook.log("web1: started was not told", str(tmp_path / "log"))
        said = log.recv(1000).decode()
    assert said.startswith("<28>virtgrid-hook[")
    assert said.endswith("]: web1: started was not told")
    qemu_hook.log("again", str(tmp_path / "log"))
    assert capsys.readouterr().err == "virtgrid-hook: again\n"


@pytest.mark.parametrize("virtgridd", ["absent", "hung", "a stream", "a directory"])
def test_a_domain_goes_on_whatever_became_of_virtgridd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, virtgridd: str
) -> None:
    path, kind = tmp_path / "at", socket.SOCK_STREAM if virtgridd == "a stream" else socket.SOCK_DGRAM
    monkeypatch.setattr(qemu_hook, "NOTICE_SOCKET", str(path))
    monkeypatch.setattr(qemu_hook, "LOG_SOCKET", str(tmp_path / "log"))
    monkeypatch.setattr(qemu_hook, "CONFIGURATION", str(tmp_path / "none.toml"))
    if virtgridd == "a directory":
        path.mkdir()
    with socket.socket(socket.AF_UNIX, kind) as line, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(tmp_path / "log"))
        if virtgridd in ("hung", "a stream"):
            line.bind(str(path))
        for step in ("prepare", "started", "migrate") * (20 if virtgridd == "hung" else 1):
            monkeypatch.setattr("sys.argv", ["hook", "web1", step, "begin"])
            assert qemu_hook.main() == 0
            if virtgridd == "hung":
                log.setblocking(False)
                continue
            said = log.recv(1000).decode()
            assert f": web1: {step} begin was not told: virtgridd " in said
        if virtgridd == "hung":
            assert "was not told: virtgridd does not take notices" in log.recv(1000).decode()


def test_the_program_itself_lets_a_domain_start_without_virtgridd(tmp_path: Path) -> None:
    link = tmp_path / "qemu.d/50-virtgrid"
    link.parent.mkdir()
    link.symlink_to(program())
    for step in ("prepare", "start", "started", "stopped", "release", "reconnect", "attach"):
        done = subprocess.run(
            [link, "nobody's", step, "begin", "-"], input=DOMAIN, capture_output=True, timeout=20, check=False
        )
        assert (done.returncode, done.stdout) == (0, b""), done.stderr


# -- what arrives ----------------------------------------------------------------------------------


def test_bridges_and_paths_get_this_host_s_names_and_all_else_stays() -> None:
    changed = incoming.adapt(DOMAIN, MAPS)
    assert changed is not None
    expected = DOMAIN.replace(b"/srv/a/images/", b"/pool/").replace(b'"br-a"', b'"br-b"')
    assert ElementTree.canonicalize(changed.decode(), with_comments=True) == ElementTree.canonicalize(
        expected.decode(), with_comments=True
    )
    assert b"<qemu:commandline" in changed


def test_what_nothing_is_said_about_is_not_touched() -> None:
    assert incoming.adapt(DOMAIN, ({"br0": "br1"}, {"/srv/b": "/srv/c"})) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"<!DOCTYPE domain [<!ENTITY a 'b'>]><domain/>", "document type"),
        ("<!DOCTYPE domain [<!ENTITY a 'b'>]><domain/>".encode("utf-16"), "document type"),
        (b"<domain>", "cannot be read"),
        (b"<network/>", "no domain but <network>"),
        (b"<domain>" + b"<a>" * 100 + b"</a>" * 100 + b"</domain>", "nested too deep"),
        (b" " * (incoming.LIMIT_BYTES + 1), "too large"),
        (DOMAIN.replace(b"/srv/a/images", b"/srv/a/../../etc"), "no plain path"),
    ],
)
def test_what_is_made_to_harm_does_not_arrive(text: bytes, words: str) -> None:
    with pytest.raises(incoming.IncomingError, match=words):
        incoming.adapt(text, MAPS)


@given(st.binary(max_size=200))
def test_whatever_arrives_is_adapted_or_refused(text: bytes) -> None:
    for data in (text, b"<domain>" + text + b"</domain>"):
        try:
            changed = incoming.adapt(data, MAPS)
        except incoming.IncomingError:
            continue
        assert changed is None or changed.startswith(b"<domain")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[incoming]\nbridges = {"a/b" = "c"}', "is no bridge"),
        ('[incoming]\nbridges = {"a" = "an-interface-too-long"}', "is no bridge"),
        ('[incoming]\npaths = {"/a" = "b"}', "no plain absolute path"),
        ('[incoming]\npaths = {"/a/../b" = "/b"}', "no plain absolute path"),
        ('[incoming]\npaths = 3', "has the tables"),
        ('incoming = "yes"', "has the tables"),
        ("[incoming", "cannot be read"),
    ],
)  # fmt: skip
def test_a_map_that_cannot_work_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "virtgrid.toml"
    path.write_text(text)
    with pytest.raises(incoming.IncomingError, match=words) as caught:
        incoming.configured(str(path))
    assert str(path) in str(caught.value)


def test_without_a_map_nothing_is_done(tmp_path: Path) -> None:
    path = tmp_path / "virtgrid.toml"
    path.write_text("[migration]\n")
    assert incoming.configured(str(path)) is None
    path.write_text(f"[incoming]\nbridges = {json.dumps({})}".replace(":", "="))
    assert incoming.configured(str(path)) is None
