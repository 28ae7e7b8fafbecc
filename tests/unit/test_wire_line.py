"""A line keeps its promises whatever the other side does: deadlines, bounds, and one end for everybody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.wire_ends import dialled, listening, nothing, raw, until
from virtgrid.core.errors import DeadlineError, PeerUnreachableError, RefusedError, UsageError
from virtgrid.wire import line as lines
from virtgrid.wire.endpoint import Endpoint, dial, listen
from virtgrid.wire.line import Line, LineLostError
from virtgrid.wire.message import RemoteError, no_such_method


async def echo(line: Line, method: str, params: Mapping[str, Any]) -> Any:
    match method:
        case "ECHO":
            return dict(params)
        case "REFUSE":
            raise RefusedError("not now", hint="later")
        case "BUG":
            raise ZeroDivisionError
        case "HANG":
            await asyncio.Event().wait()
        case "END":
            line.hang_up("enough")
            return {}
    raise no_such_method(method)


async def test_questions_are_answered_in_their_order_and_both_ways(tmp_path: Path) -> None:
    asked_back: list[Any] = []

    async def asking(line: Line, method: str, params: Mapping[str, Any]) -> Any:
        asked_back.append(await line.call("ECHO", {"back": params["n"]}))
        return params["n"]

    async with listening(tmp_path / "s", asking) as where, dialled(where, echo) as line:
        answers = await asyncio.gather(*(line.call("ASK", {"n": n}) for n in range(50)))
    assert answers == list(range(50))
    assert asked_back == [{"back": n} for n in range(50)]


async def test_refusals_bugs_and_unknown_methods_are_told_apart(tmp_path: Path) -> None:
    async with listening(tmp_path / "s", echo) as where, dialled(where) as line:
        with pytest.raises(RefusedError, match="not now") as refused:
            await line.call("REFUSE")
        assert refused.value.hint == "later"
        with pytest.raises(RemoteError, match="there is no method WHAT"):
            await line.call("WHAT")
        with pytest.raises(RemoteError, match="answering failed"):
            await line.call("BUG")
        assert await line.call("ECHO", {"still": "there"}) == {"still": "there"}


async def test_a_question_has_a_deadline_and_the_line_outlives_it(tmp_path: Path) -> None:
    async with listening(tmp_path / "s", echo) as where, dialled(where) as line:
        with pytest.raises(DeadlineError):
            await line.call("HANG", deadline_s=0.05)
        assert "at" in await line.call("PING", deadline_s=5)


async def test_everybody_who_waits_hears_of_the_end(tmp_path: Path) -> None:
    async with listening(tmp_path / "s", echo) as where, dialled(where) as line:
        results = await asyncio.gather(line.call("END"), line.call("ECHO"), return_exceptions=True)
        assert isinstance(results[1], LineLostError)
        with pytest.raises(LineLostError):
            await line.call("ECHO")
        assert "hung up" in await line.wait_ended()


async def test_bad_lines_are_answered_and_the_good_one_after_them_too(tmp_path: Path) -> None:
    async with listening(tmp_path / "s", echo) as where, raw(where) as bad:
        await bad.say(b"\xff\n{\n" + b"[" * 3000 + b"\n")
        for _ in range(3):
            answer = json.loads(await bad.hear())
            assert answer["error"]["code"] == -32700
            assert answer["id"] is None
        await bad.say(b'{"jsonrpc":"2.0","method":"ECHO","params":[],"id":"mine"}\n')
        assert json.loads(await bad.hear())["id"] == "mine"
        await bad.say(b'{"jsonrpc":"2.0","method":"ECHO","params":{"a":1},"id":5}\n')
        assert json.loads(await bad.hear())["result"] == {"a": 1}


async def test_who_goes_on_sending_rubbish_is_hung_up_on(tmp_path: Path) -> None:
    async with listening(tmp_path / "s", echo) as where, raw(where) as bad:
        await bad.say(b"rubbish\n" * lines.BAD_LIMIT)
        for _ in range(lines.BAD_LIMIT):
            assert b"-32700" in await bad.hear()
        assert await bad.hear() == b""


async def test_a_line_of_two_mib_is_refused_and_ends_the_connection(tmp_path: Path) -> None:
    async with listening(tmp_path / "s", echo) as where, raw(where) as bad:
        with contextlib.suppress(ConnectionError):  # it may be gone before all is sent
            await bad.say(b'{"jsonrpc":"2.0","method":"ECHO","params":{"x":"' + b"y" * (2 << 20) + b'"}}\n')
        heard = await bad.hear()
        assert heard == b"" or b"longer than" in heard
        async with dialled(where) as line:
            assert "at" in await line.call("PING")


async def test_half_a_line_does_nothing(tmp_path: Path) -> None:
    done: list[str] = []

    async def note(line: Line, method: str, params: Mapping[str, Any]) -> Any:
        done.append(method)

    async with listening(tmp_path / "s", note) as where:
        async with raw(where) as bad:
            await bad.say(b'{"jsonrpc":"2.0","method":"SHUT_DOWN","params":{},"id":1}')
            bad.writer.write_eof()
            assert await bad.hear() == b""
        async with dialled(where) as line:
            await line.call("AFTER")
    assert done == ["AFTER"]


async def test_too_many_questions_at_once_are_refused_as_busy(tmp_path: Path) -> None:
    async with listening(tmp_path / "s", echo) as where, raw(where) as bad:
        ask = b'{"jsonrpc":"2.0","method":"HANG","id":%d}\n'
        await bad.say(b"".join(ask % n for n in range(lines.WAITING_LIMIT + 3)))
        answer = json.loads(await bad.hear())
        assert answer["error"]["code"] == -32001


async def test_a_peer_that_takes_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "WRITE_DEADLINE_S", 0.1)
    served: list[Line] = []

    async def serve(line: Line) -> None:
        served.append(line)
        await line.wait_ended()

    where = Endpoint(tmp_path / "s")
    listener = await listen(where, nothing, name="deaf", serve=serve)
    async with raw(where):
        await until(lambda: bool(served))
        with contextlib.suppress(LineLostError):
            for _ in range(1000):
                await served[0].notify("TELL", {"x": "y" * 100_000})
        assert "took nothing" in (served[0].lost or "")
    await listener.close()


async def test_a_silent_peer_is_asked_and_hung_up_on(tmp_path: Path) -> None:
    where = Endpoint(tmp_path / "s")
    server = await asyncio.start_unix_server(lambda *_: None, where.path)  # takes calls, says nothing
    line = await dial(where, nothing, name="mute")
    await asyncio.wait_for(line.keep_alive(idle_s=0.02, deadline_s=0.05), 5)
    assert "did not answer PING" in (line.lost or "")
    await line.close()
    server.close()


async def test_the_kernel_says_who_calls(tmp_path: Path) -> None:
    async def who(line: Line, method: str, params: Mapping[str, Any]) -> Any:
        return line.peer_uid()

    async with listening(tmp_path / "s", who) as where, dialled(where) as line:
        assert await line.call("WHO") == os.geteuid()


async def test_a_socket_of_the_dead_is_taken_over_and_one_of_the_living_is_not(tmp_path: Path) -> None:
    where = Endpoint(tmp_path / "s")
    server = await asyncio.start_unix_server(lambda *_: None, where.path)
    with pytest.raises(RefusedError, match="somebody does already"):
        await listen(where, nothing, name="x")
    server.close()
    await server.wait_closed()
    assert where.path.exists()
    listener = await listen(where, nothing, name="x", mode=0o600)
    assert stat.S_IMODE(where.path.stat().st_mode) == 0o600
    await listener.close()
    assert not where.path.exists()
    where.path.write_text("a file")
    with pytest.raises(RefusedError, match="no socket"):
        await listen(where, nothing, name="x")


async def test_nobody_at_home_is_told_as_unreachable(tmp_path: Path) -> None:
    with pytest.raises(PeerUnreachableError, match="cannot be reached"):
        await dial(Endpoint(tmp_path / "s"), nothing, name="nobody")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/run/x",
        "unix:run/x",
        "tls://h",
        "tls://h:65536",
        "tls://[h]:1",
        "tls://-h:1",
        "unix:/" + "x" * 200,
        "unix:/a\0b",
    ],
)
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Endpoint.parse(text)


@pytest.mark.parametrize("text", ["unix:/run/x", "tls://crm.a.example:7430", "tls://[2001:db8::1]:1"])
def test_an_endpoint_is_read_as_it_is_written(text: str) -> None:
    assert str(Endpoint.parse(text)) == text
