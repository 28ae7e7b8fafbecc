"""virtgridd lets in who holds a ticket, and takes notices for what they are."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.agent_parts import KEY, agent
from tests.unit.scripted_host import HOSTS, INIT, ticket
from tests.wire_ends import dialled, until
from virtgrid.core.errors import RefusedError
from virtgrid.grid.messages import frames
from virtgrid.grid.messages import ticket as tickets
from virtgrid.grid.messages.network import SEGMENTS
from virtgrid.grid.messages.node import Init, SetKeys
from virtgrid.grid.node import sshfiles
from virtgrid.host import qemu_hook, runner
from virtgrid.host.guests import GRACE_S, spec_of
from virtgrid.host.notices import Notice, NoticeSocket, read
from virtgrid.host.tenancies import Tenancies, Tenancy
from virtgrid.wire import seal
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.message import RemoteError


@pytest.fixture
def somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtgrid.wire.line.Line.peer_uid", lambda _: 5001)


def _text(**changes: Any) -> str:
    now_s = time.time()
    return tickets.issue(ticket(**{"begins_at_s": now_s - 1, "ends_at_s": now_s + 60, **changes}), KEY)


async def test_without_a_ticket_nothing_is_done(tmp_path: Path) -> None:
    async with agent(tmp_path), dialled(Endpoint(tmp_path / "host")) as line:
        for method, params in (("look", {}), ("remove", {}), ("exec", {"argv": ["true"]})):
            with pytest.raises(RemoteError, match="say hello with a ticket first"):
                await line.call(method, params)
        with pytest.raises(RemoteError, match="no method"):
            await line.call("reboot")
        with pytest.raises(RefusedError, match=f"of user 5001, and user {os.geteuid()}"):
            await line.call("hello", {"ticket": _text()})
        assert (tmp_path / "host").stat().st_mode & 0o777 == 0o666


@pytest.mark.usefixtures("somebody")
async def test_a_ticket_is_for_one_sandbox_in_its_time(tmp_path: Path) -> None:
    async with agent(tmp_path), dialled(Endpoint(tmp_path / "host")) as line:
        with pytest.raises(RefusedError, match="has ended"):
            await line.call("hello", {"ticket": _text(begins_at_s=1.0, ends_at_s=2.0)})
        with pytest.raises(RefusedError, match="nobody trusted"):
            await line.call("hello", {"ticket": tickets.issue(ticket(), seal.new_key())})
        assert (await line.call("hello", {"ticket": _text()}))["stage"] == "absent"
        with pytest.raises(RemoteError, match="hello is said once"):
            await line.call("hello", {"ticket": _text()})
        for method in ("start", "set_keys"):
            with pytest.raises(RefusedError, match="was not prepared"):
                await line.call(method, HOSTS if method == "set_keys" else {})
        with pytest.raises(RefusedError, match="does not run"):
            await line.call("exec", {"argv": ["true"]})
        async with dialled(Endpoint(tmp_path / "host")) as other:
            with pytest.raises(RefusedError, match="another ticket"):
                await other.call("hello", {"ticket": _text(id="ticket-0002")})
        assert await line.call("remove") == {}, "what is not there is removed"


@pytest.mark.usefixtures("somebody")
async def test_before_its_time_nothing_starts(tmp_path: Path) -> None:
    later_s = time.time() + 500
    async with agent(tmp_path), dialled(Endpoint(tmp_path / "host")) as line:
        await line.call("hello", {"ticket": _text(begins_at_s=later_s, ends_at_s=later_s + 60)})
        with pytest.raises(RefusedError, match=r"begins in (499|500) s"):
            await line.call("start")


async def test_there_is_one_virtgridd(tmp_path: Path) -> None:
    async with agent(tmp_path):
        with pytest.raises(RefusedError, match="somebody does already"):
            await agent(tmp_path).__aenter__()
    assert not (tmp_path / "host").exists()
    assert not (tmp_path / "notice").exists()


@pytest.mark.usefixtures("somebody")
async def test_only_root_and_network_managers_say_which_segments_there_are(tmp_path: Path) -> None:
    async with agent(tmp_path), dialled(Endpoint(tmp_path / "host")) as line:
        with pytest.raises(RefusedError, match="user 5001 of this host may not ask segments"):
            await line.call(SEGMENTS, {})


async def test_the_newer_line_of_a_manager_counts(tmp_path: Path) -> None:
    said = {
        "network": "net", "site": "a", "address": "192.0.2.1", "hosts": {"a": ["192.0.2.1"]}, "reach": {},
        "segments": [],
    }  # fmt: skip
    async with agent(tmp_path), dialled(Endpoint(tmp_path / "host")) as old:
        assert await old.call(SEGMENTS, said) == {"problems": {}}
        with pytest.raises(RemoteError, match="segments: address"):
            await old.call(SEGMENTS, {**said, "address": "nowhere"})
        async with dialled(Endpoint(tmp_path / "host")) as new:
            assert await new.call(SEGMENTS, said) == {"problems": {}}
            await old.wait_ended()
            assert await new.call(SEGMENTS, said) == {"problems": {}}


# -- notices -------------------------------------------------------------------------------------


async def test_no_notice_is_lost_while_the_loop_is_busy(tmp_path: Path) -> None:
    heard: list[Notice] = []
    notices = NoticeSocket(tmp_path / "notice", heard.append)
    try:
        # In the loop's own time: nothing else is done by it until all have been posted.
        told = [
            qemu_hook.post(qemu_hook.notice(f"web{number}", "started", "begin"), str(tmp_path / "notice"))
            for number in range(300)
        ]
        assert told == [None] * 300
        assert heard == []
        await until(lambda: len(heard) == 300)
        assert [one.domain for one in heard] == [f"web{number}" for number in range(300)]
    finally:
        notices.close()


async def test_a_notice_of_the_hook_is_heard_and_rubbish_is_not(tmp_path: Path) -> None:
    heard: list[Notice] = []
    notices = NoticeSocket(tmp_path / "notice", heard.append)
    said = {"v": 1, "driver": "lxc", "domain": "a", "operation": "release", "sub_operation": "end"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hook:
        for data in (b"", b"\xff", b"[]", b"{}", b"[" * 3000, json.dumps({**said, "domain": 7}).encode()):
            hook.sendto(data, str(tmp_path / "notice"))
        hook.sendto(json.dumps(said).encode(), str(tmp_path / "notice"))
    await until(lambda: bool(heard))
    assert heard == [Notice(driver="lxc", domain="a", operation="release", sub_operation="end")]
    assert (tmp_path / "notice").stat().st_mode & 0o777 == 0o600
    notices.close()


def test_a_notice_has_bounds() -> None:
    said = {"driver": "lxc", "domain": "a" * 300, "operation": "release", "sub_operation": "end"}
    assert read(json.dumps(said).encode()) is None


# -- what is made of a ticket --------------------------------------------------------------------


def test_a_ticket_s_limits_are_the_sandbox_s() -> None:
    given = ticket(cpus="0-1", processes=99)
    spec = spec_of(given, Init(**INIT), account="kenji", bridge="br42", mtu=1450, now_s=given.ends_at_s - 100)
    assert (spec.name, spec.user, spec.account, spec.address) == ("r-42-1", "gridu", "kenji", "10.77.0.21/24")
    assert (spec.limits.memory_bytes, spec.limits.processes, spec.limits.cpuset) == (256 << 20, 99, "0-1")
    assert (spec.mtu, spec.user_namespace) == (1450, True)
    assert spec.limits.walltime_s == 100 + GRACE_S, "it ends even when nobody is left to end it"


def test_every_node_knows_and_trusts_every_other() -> None:
    keys = SetKeys.model_validate_json(json.dumps(HOSTS))
    trust = sshfiles.render(keys.hosts)
    assert trust.known_hosts.splitlines()[1] == f"r-42-2,10.77.0.22 {keys.hosts[1].host_key}"
    assert trust.authorized_keys.splitlines() == [host.user_key for host in keys.hosts]
    assert trust.hostfile == "r-42-1 slots=1\nr-42-2 slots=2\n"
    assert trust.hosts == (("10.77.0.21", "r-42-1"), ("10.77.0.22", "r-42-2"))


def test_a_tenancy_survives_and_half_a_file_is_none(tmp_path: Path) -> None:
    store = Tenancies(tmp_path)
    given = ticket()
    spec = spec_of(given, Init(**INIT), account="kenji", bridge="br42", mtu=1500, now_s=given.begins_at_s)
    tenancy = Tenancy(ticket=given, init=Init(**INIT), spec=spec.as_dict())
    store.save(tenancy)
    assert Tenancies(tmp_path).all() == [tenancy]
    assert tenancy.sandbox == spec
    (tmp_path / "torn.json").write_text('{"v": 1, "ticket"')
    (tmp_path / "other.new").write_text("x")
    assert store.load("torn") is None
    assert store.all() == [tenancy]
    store.remove("r-42-1")
    store.remove("r-42-1")
    assert store.all() == []


# -- the process that carries a program's output -------------------------------------------------


class Ran:
    """A program under the runner, and the pilot's end of its connection."""

    def __init__(self, argv: list[str], env: dict[str, str] | None = None) -> None:
        self.line, theirs = socket.socketpair()
        order = {"argv": argv, "env": env or {"PATH": os.environ["PATH"]}, "answer": "{}\n"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(runner.__file__)), str(theirs.fileno())],
                stdin=subprocess.PIPE, pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        assert self.process.stdin is not None
        with self.process.stdin as stdin:
            stdin.write(json.dumps(order).encode())
        self.line.settimeout(30)
        self.file = self.line.makefile("rb")

    def frames(self) -> list[tuple[bytes, bytes]]:
        assert self.file.readline() == b"{}\n"
        found = []
        while header := self.file.read(frames.HEADER.size):
            kind, length = frames.unpack_header(header)
            found.append((kind, self.file.read(length)))
        self.close()
        return found

    def close(self) -> int:
        self.file.close()
        self.line.close()
        return self.process.wait(30)


def test_output_and_end_are_carried_whole() -> None:
    words = "head -c 300000 /dev/zero; echo oops >&2; exit 3"
    found = Ran(["sh", "-c", words]).frames()
    assert b"".join(data for kind, data in found if kind == frames.STDOUT) == bytes(300_000)
    assert b"".join(data for kind, data in found if kind == frames.STDERR) == b"oops\n"
    end = frames.unpack_end(found[-1][1])
    assert (end.status, end.problem) == (3, None)
    assert end.max_rss_bytes > 1 << 18
    assert [kind for kind, _ in found].count(frames.END) == 1


def test_a_signal_is_told_as_a_shell_tells_it() -> None:
    assert frames.unpack_end(Ran(["sh", "-c", "kill -9 $$"]).frames()[-1][1]).status == 137


def test_a_program_that_cannot_be_started_is_told() -> None:
    end = frames.unpack_end(Ran(["/nowhere/at/all"]).frames()[-1][1])
    assert end.status is None
    assert "could not be started" in (end.problem or "")


def test_a_child_that_holds_the_output_open_is_not_waited_for() -> None:
    found = Ran(["sh", "-c", "echo out; sleep 20 & echo $!"]).frames()
    out = b"".join(data for kind, data in found if kind == frames.STDOUT).split()
    assert out[0] == b"out"
    os.kill(int(out[1]), 9)


def test_a_pilot_that_hangs_up_ends_the_program(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    ran = Ran(["sh", "-c", f"echo $$ > {mark}; exec sleep 1000"])
    assert ran.file.readline() == b"{}\n"
    asyncio.run(until(lambda: mark.exists() and mark.read_text().endswith("\n")))
    assert ran.close() == 1
    assert not Path(f"/proc/{mark.read_text().strip()}").exists()


def test_a_pilot_that_takes_nothing_makes_the_program_wait(tmp_path: Path) -> None:
    mark = tmp_path / "written"
    ran = Ran(["sh", "-c", f"head -c 20000000 /dev/zero; touch {mark}"])
    assert ran.file.readline() == b"{}\n"

    def asleep() -> bool:
        return Path(f"/proc/{ran.process.pid}/wchan").exists() and _blocked(ran.process.pid)

    asyncio.run(until(asleep))
    assert not mark.exists()
    ran.close()


def _blocked(pid: int) -> bool:
    """In a write to its socket, with nothing left to do: it waits, and has written more than a little."""
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "S" and "sock" in Path(f"/proc/{pid}/wchan").read_text()
