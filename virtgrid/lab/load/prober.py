"""What clients of a guest feel of a pause: pings, requests on open connections, new connections, timed.

A program to be run where the clients are: ``python -m virtgrid.lab.load.prober ADDRESS``. It says ``ready``
when everything answers, probes until its standard input ends, waits for answers that are still to come, and
prints one JSON object: for each kind of probe a list of [begun, ended or null], CLOCK_MONOTONIC seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Final

PING_EVERY_S: Final = 0.01
_NEW_EVERY_S: Final = 0.05
_KEPT: Final = 4
_KEPT_EVERY_S: Final = 0.02
#: Longer than any retransmission a pause can cause.
_PATIENCE_S: Final = 20.0
#: After the end of probing; a ping answered later counts as lost.
_LAST_ANSWERS_S: Final = 3.0
_ECHO: Final = struct.Struct("!BBHHH")
_REQUEST: Final = b"GET / HTTP/1.1\r\nHost: guest\r\n\r\n"

Times = dict[str, list[list[float | None]]]


def echo(identity: int, number: int) -> bytes:
    """An ICMP echo request (RFC 792) with its checksum."""
    payload = b"virtgrid" * 4
    head = _ECHO.pack(8, 0, 0, identity, number)
    words = struct.unpack(f"!{len(head + payload) // 2}H", head + payload)
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    return _ECHO.pack(8, 0, ~(total + (total >> 16)) & 0xFFFF, identity, number) + payload


class Pings:
    """One echo request every 10 ms, whether or not the last one was answered."""

    def __init__(self, address: str) -> None:
        self.times: list[list[float | None]] = []
        self.answered = asyncio.Event()
        self._identity = os.getpid() & 0xFFFF
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.connect((address, 0))
        asyncio.get_running_loop().add_reader(self._socket, self._take)

    def send(self) -> None:
        self.times.append([time.monotonic(), None])
        with contextlib.suppress(OSError):  # lost here already
            self._socket.send(echo(self._identity, (len(self.times) - 1) & 0xFFFF))

    def _take(self) -> None:
        now_s = time.monotonic()
        with contextlib.suppress(OSError):
            while packet := self._socket.recv(2048):
                kind, _, _, identity, number = _ECHO.unpack_from(packet, (packet[0] & 0xF) * 4)
                if (kind, identity) != (0, self._identity):
                    continue
                # Numbers have 16 bits: the latest sent with this one.
                at = number + (len(self.times) - 1 - number) // 0x10000 * 0x10000
                if self.times[at][1] is None:
                    self.times[at][1] = now_s
                self.answered.set()


async def _answer(reader: asyncio.StreamReader) -> None:
    """One response, to its end."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.partition(b":")[2])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length:")
    )
    await reader.readexactly(length)


async def _timed(times: list[list[float | None]], work: Callable[[], Awaitable[None]]) -> bool:
    """Time ``work``; false when it failed or nobody answered."""
    one: list[float | None] = [time.monotonic(), None]
    times.append(one)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await work()
    except (OSError, TimeoutError, EOFError, asyncio.IncompleteReadError, StopIteration):
        return False
    one[1] = time.monotonic()
    return True


async def _new(address: str, times: list[list[float | None]]) -> None:
    """A connection made, one request on it, and closed."""

    async def work() -> None:
        reader, writer = await asyncio.open_connection(address, 80)
        try:
            writer.write(_REQUEST)
            await _answer(reader)
        finally:
            writer.close()

    await _timed(times, work)


async def _kept(address: str, times: list[list[float | None]], ending: asyncio.Event) -> None:
    """Requests, one after the other, on a connection that stays open; made anew when it breaks."""
    while not ending.is_set():
        try:
            async with asyncio.timeout(_PATIENCE_S):
                reader, writer = await asyncio.open_connection(address, 80)
        except (OSError, TimeoutError):
            await asyncio.sleep(_KEPT_EVERY_S)
            continue
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        async def work(reader: asyncio.StreamReader = reader, writer: asyncio.StreamWriter = writer) -> None:
            writer.write(_REQUEST)
            await _answer(reader)

        while await _timed(times, work):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_KEPT_EVERY_S):
                    await ending.wait()
                    break
        writer.close()


async def _probe(address: str) -> Times:
    found: Times = {"new": [], "kept": []}
    pings, ending = Pings(address), asyncio.Event()
    found["pings"] = pings.times
    loop = asyncio.get_running_loop()
    stdin = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    async with asyncio.TaskGroup() as tasks:

        async def every(interval_s: float, act: Callable[[], None]) -> None:
            began_s = loop.time()
            for number in itertools.count(1):
                if ending.is_set():
                    return
                act()
                await asyncio.sleep(max(0.0, began_s + number * interval_s - loop.time()))

        def begin_new() -> None:
            tasks.create_task(_new(address, found["new"]))

        for _ in range(_KEPT):
            tasks.create_task(_kept(address, found["kept"], ending))
        tasks.create_task(every(_NEW_EVERY_S, begin_new))
        tasks.create_task(every(PING_EVERY_S, pings.send))
        await pings.answered.wait()
        print("ready", flush=True)
        await stdin.read()
        ending.set()
    await asyncio.sleep(_LAST_ANSWERS_S)
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_probe(sys.argv[1]))), flush=True)
