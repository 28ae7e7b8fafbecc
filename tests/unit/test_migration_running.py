"""One driver for a domain; its lock goes with it, however it ends. Talking to it is one line each way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import uuid as uuids
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from virtgrid.core.errors import NotFoundError, PeerUnreachableError, RefusedError, UsageError
from virtgrid.migration import control, running
from virtgrid.migration.control import ControlServer, ask

UUID = str(uuids.UUID(int=7))
OTHER = str(uuids.UUID(int=8))

HOLDER = """
import sys
from virtgrid.migration import running
with running.exclusive(sys.argv[1], "20260101T000000-web1"):
    print("held", flush=True)
    sys.stdin.read()
"""


ANSWERER = """
import socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.bind(sys.argv[1])
    server.listen(1)
    print("up", flush=True)
    peer, _ = server.accept()
    peer.recv(4096)
    peer.sendall(bytes.fromhex(sys.argv[2]))
    peer.close()
"""


@pytest.fixture(autouse=True)
def run_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("VIRTGRID_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[bytes]]:
    """Another process that drives a migration of UUID."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, UUID], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_driver_is_refused_and_told_of_the_first(holder: subprocess.Popen[bytes]) -> None:
    assert running.running_migration(UUID) == "20260101T000000-web1"
    with pytest.raises(RefusedError, match="20260101T000000-web1") as caught, running.exclusive(UUID, "mine"):
        pass
    assert caught.value.exit_status == 3
    with running.exclusive(OTHER, "mine"):
        assert running.running_migration(OTHER) == "mine"


def test_a_driver_killed_with_9_leaves_no_lock(holder: subprocess.Popen[bytes]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert running.running_migration(UUID) is None
    with running.exclusive(UUID, "mine"):
        assert running.running_migration(UUID) == "mine"
    assert running.running_migration(UUID) is None


def test_two_drivers_in_one_process_are_two_too() -> None:
    with running.exclusive(UUID, "first"), pytest.raises(RefusedError), running.exclusive(UUID, "second"):
        pass


def test_the_lock_is_let_go_when_the_migration_fails() -> None:
    with pytest.raises(ZeroDivisionError), running.exclusive(UUID, "first"):
        1 / 0  # noqa: B018
    with running.exclusive(UUID, "second"):
        pass


def test_nobody_else_may_read_the_directory_or_the_lock(run_dir: Path) -> None:
    with running.exclusive(UUID, "mine"):
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((run_dir / f"{UUID}.lock").stat().st_mode) == 0o600


@pytest.mark.parametrize("uuid", ["../x", "a/b", "", "X", "1c6ac5d8\0"])
def test_what_is_no_uuid_makes_no_file(run_dir: Path, uuid: str) -> None:
    if uuid:
        with pytest.raises(ValueError, match="not a UUID"):
            running.socket_path(uuid)
    assert not run_dir.exists()


def test_a_lock_that_is_a_link_is_not_followed(run_dir: Path, tmp_path: Path) -> None:
    run_dir.mkdir()
    (tmp_path / "victim").write_text("precious")
    (run_dir / f"{UUID}.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"), running.exclusive(UUID, "mine"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


# --- the control socket ---------------------------------------------------------------------


async def handled(command: str, by: str) -> dict[str, Any]:
    return {"ok": True, "text": f"{command} by {by}"}


async def raw(path: Path, data: bytes, *, end: bool = True) -> bytes:
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        writer.write(data)
        if end:
            writer.write_eof()
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("command", control.COMMANDS)
async def test_a_command_reaches_the_driver_and_its_answer_comes_back(tmp_path: Path, command: str) -> None:
    async with ControlServer(tmp_path / "run" / "c.sock", handled) as _:
        answer = await asyncio.to_thread(ask, tmp_path / "run" / "c.sock", command, by="ops")
    assert answer == {"ok": True, "text": f"{command} by ops"}


async def test_only_its_own_user_reaches_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "run" / "c.sock"
    before = os.umask(0o022)
    try:
        async with ControlServer(path, handled):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert os.umask(0o022) == 0o022, "the process's umask is put back"
    finally:
        os.umask(before)
    assert not path.exists()


@pytest.mark.parametrize(
    "garbage",
    [b"\n", b"{}\n", b"[]\n", b"null\n", b"release\n", b'{"command": 5}\n', b'{"command": "format"}\n',
     b"\xff\n", b'{"command": {"release": 1}}\n', b'"release"\n'],
)  # fmt: skip
async def test_nonsense_gets_a_refusal_and_changes_nothing(tmp_path: Path, garbage: bytes) -> None:
    heard: list[str] = []

    async def handler(command: str, by: str) -> dict[str, Any]:
        heard.append(command)
        return {"ok": True}

    async with ControlServer(tmp_path / "c.sock", handler):
        answer = json.loads(await raw(tmp_path / "c.sock", garbage))
    assert answer["ok"] is False
    assert heard == []


@pytest.mark.parametrize("data", [b"x" * 100_000, b"x" * 100_000 + b"\n", b""])
async def test_too_much_and_nothing_at_all_end_the_conversation_and_the_next_is_answered(
    tmp_path: Path, data: bytes
) -> None:
    async with ControlServer(tmp_path / "c.sock", handled):
        await raw(tmp_path / "c.sock", data)
        answer = await asyncio.to_thread(ask, tmp_path / "c.sock", "status", by="\U0001f600" * 5000)
        assert answer["ok"]
        assert len(answer["text"]) < 300


async def test_who_says_nothing_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_DEADLINE_S", 0.05)
    async with ControlServer(tmp_path / "c.sock", handled):
        assert await raw(tmp_path / "c.sock", b"", end=False) == b""
        answer = await asyncio.to_thread(ask, tmp_path / "c.sock", "status", by="ops")
    assert answer["ok"]


async def test_a_socket_left_by_a_driver_that_died_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(NotFoundError, match="not running"):
        ask(path, "status", by="")
    async with ControlServer(path, handled):
        assert (await asyncio.to_thread(ask, path, "status", by=""))["ok"]


def test_asking_nobody_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        ask(tmp_path / "none.sock", "release", by="")
    assert caught.value.exit_status == 4


def test_an_unknown_command_is_not_even_sent(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        ask(tmp_path / "none.sock", "explode", by="")


@pytest.mark.parametrize("answer", [b"", b"garbage\n", b"[]\n"])
def test_an_answer_that_is_none_is_said(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "c.sock"
    child = subprocess.Popen(
        [
            sys.executable, "-c",
            ANSWERER, str(path), answer.hex(),
        ],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(PeerUnreachableError):
            ask(path, "status", by="")
    finally:
        child.kill()
        child.communicate()
