"""The load's client against servers that behave, and servers that do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from virtgrid.core.errors import UsageError
from virtgrid.lab.load.client import Load, Target, _Connection
from virtgrid.lab.load.profile import Profile

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[Target]:
    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(closing, "127.0.0.1", 0)
    try:
        yield Target("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()


def answering(*answers: bytes) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()

    return serve


def body(data: bytes, extra: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n%s" % (len(data), extra, data)


async def test_a_connection_is_kept_for_the_next_request() -> None:
    async with serving(answering(body(b"x" * 5), body(b"y" * 7))) as target:
        connection = _Connection(target, 5)
        one = await connection.get("/1", "page", 0)
        other = await connection.get("/2", "image", 0)
        connection.close()
    assert (one.ok, one.count_bytes, other.ok, other.count_bytes) == (True, 5, True, 7)
    assert one.connection == other.connection


async def test_chunked_answers_are_read() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    async with serving(answering(chunked, body(b"z"))) as target:
        connection = _Connection(target, 5)
        assert (await connection.get("/", "page", 0)).count_bytes == 5
        assert (await connection.get("/", "page", 0)).count_bytes == 1
        connection.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        body(b"abc")[:-1],
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 9000,
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
    ],
    ids=["nothing", "not HTTP", "cut short", "endless head", "no number"],
)
async def test_a_broken_answer_is_a_failure_and_the_connection_is_opened_anew(answer: bytes) -> None:
    async with serving(answering(answer)) as target:
        connection = _Connection(target, 5)
        broken = await connection.get("/", "page", 0)
        again = await connection.get("/", "page", 0)
        connection.close()
    assert not broken.ok
    assert broken.error
    assert again.connection != broken.connection


async def test_a_silent_server_is_given_up_after_the_time_out() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(silent) as target:
        found = await _Connection(target, 0.1).get("/", "page", 0)
    assert found.error == "no answer within 0.1 s"


async def test_nobody_listening_is_a_failure() -> None:
    async with serving(answering()) as target:
        pass
    found = await _Connection(target, 1).get("/", "page", 0)
    assert found.error is not None
    assert "Connection" in found.error


async def test_a_download_is_read_no_faster_than_the_line() -> None:
    async with serving(answering(body(b"x" * 60_000))) as target:
        found = await _Connection(target, 5, line_bytes_s=200_000).get("/", "download", 0)
    assert found.ok
    assert found.duration_s >= 0.25  # 60 kB at 200 kB/s, less the first piece


async def test_all_sessions_begin_and_stop_when_told() -> None:
    async def forever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(body(b"x" * 100))

    chosen = Profile(sessions=5, think_s=0.01, on_s=None, off_s=None, download_share=0)
    async with serving(forever) as target:
        load, stop = Load(target, chosen, 1), asyncio.Event()
        running = asyncio.create_task(load.run(30, stop))
        await asyncio.wait_for(load.ready.wait(), 10)
        stop.set()
        await asyncio.wait_for(running, 10)
    assert {record.session for record in load.records} == set(range(5))
    assert all(record.ok for record in load.records)


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:99999", "http://x/path", "x"])
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        Target.parse(url)
