"""A block is its frames for every protocol: mail, FTP with its data connections, TLS and the unknown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tracker_blocks import SETTINGS, Row, assert_equal
from test_tracker_protocols import conversations
from tracker_wire import GUEST_MAC, Talk, get, response


class Sink:
    """Takes frames as a tracker does, and keeps them."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def feed(self, frame: bytes, wire_len: int, at_s: float) -> None:
        self.rows.append((at_s, wire_len, frame))


class Rows(list[Row]):
    """Many frames, with a short name for when a test fails."""

    def __repr__(self) -> str:
        return f"<{len(self)} frames>"


Steps = Iterator[Talk]
Opened = Callable[[int, int], Talk]


def _mail(talk: Talk, turns: list[tuple[bool, bytes, bool]], size: int, rng: Random) -> Steps:
    for to_server, data, _ in turns:
        if not rng.randint(0, 19):
            talk.lose(to_server=to_server, length=len(data))
        else:
            (talk.ask if to_server else talk.answer)(data, size)
        yield talk


def _transfers(control: Talk, opened: Opened, size: int, rng: Random) -> Steps:
    control.answer(b"220 x\r\n").ask(b"USER a\r\n").answer(b"230 in\r\n")
    for _ in range(rng.randint(1, 3)):
        port = rng.randint(50_000, 50_002)
        control.ask(b"EPSV\r\n").answer(b"229 x (|||%d|)\r\n" % port)
        data = opened(rng.randint(41_000, 60_000), port)
        yield control
        length = rng.choice([10, 3000, 40_000])
        control.ask(b"RETR a\r\n")
        if rng.randint(0, 1):
            control.answer(b"150 x (%d bytes)\r\n" % length)
        for _ in range(length // 5000 + 1):
            data.answer(b"d" * min(length, 5000), size)
            yield data
        if rng.randint(0, 2):
            data.fin(to_server=False)
            yield data
            data.fin(to_server=True)
        control.answer(b"226 done\r\n")
        yield control


def _records(talk: Talk, port: int, size: int, rng: Random) -> Steps:
    for _ in range(rng.randint(1, 6)):
        length = rng.choice([1, 200, 9000])
        record = (b"\x17\x03\x03%c%c" % divmod(length, 256)) + b"r" * length if port == 443 else b"u" * length
        if not rng.randint(0, 9):
            talk.lose(to_server=False, length=rng.choice([3, 500]))
        (talk.ask if rng.randint(0, 1) else talk.answer)(record, size)
        yield talk


@st.composite
def traffic(draw: st.DrawFn) -> Rows:
    rng = Random(draw(st.integers(0, 1 << 32)))
    sink: Any = Sink()
    size = draw(st.sampled_from([60, 1448, 60_000]))

    def opened(client_port: int, server_port: int) -> Talk:
        talk = Talk(sink, client_port=client_port, server_port=server_port).open()
        talks.append(talk)
        return talk

    talks: list[Talk] = []
    under_way: list[Steps] = []
    for number in range(draw(st.integers(1, 4))):
        match draw(st.integers(0, 3)):
            case 0:
                port, turns = draw(conversations())
                under_way.append(_mail(opened(40_000 + number, port), turns, size, rng))
            case 1:
                under_way.append(_transfers(opened(40_000 + number, 21), opened, size, rng))
            case _:
                port = draw(st.sampled_from([443, 7777]))
                under_way.append(_records(opened(40_000 + number, port), port, size, rng))
    pauses = draw(st.sampled_from([[0.0], [0.0, 0.0, 0.4, 2.1, 11.0], [0.0, 31.0, 61.0]]))
    while under_way:
        steps = rng.choice(under_way)
        if next(steps, None) is None:
            under_way.remove(steps)
        pause_s = rng.choice(pauses)
        for talk in talks:
            talk.later(pause_s)
    return Rows(sink.rows)


@SETTINGS
@given(
    rows=traffic(),
    sizes=st.lists(st.sampled_from([1, 3, 10, 1000]), min_size=1, max_size=3),
    large_bytes=st.sampled_from([500, 3000, 4 << 20]),
    mine=st.booleans(),
)
def test_frames_of_all_protocols_fed_together_do_what_they_do_one_by_one(
    rows: Rows, sizes: list[int], large_bytes: int, mine: bool
) -> None:
    options = {"large_bytes": large_bytes, "guest_macs": [GUEST_MAC] if mine else None, "tells": not mine}
    assert_equal(rows, [False] * len(rows), sizes, options)


@pytest.mark.parametrize("port", [1080, 80])
@pytest.mark.parametrize("sizes", [[3], [1000]])
def test_a_connection_that_is_looked_at_again_is_so_in_a_block_too(port: int, sizes: list[int]) -> None:
    sink: Any = Sink()
    talk = Talk(sink, server_port=port).open().ask(b"\x05\x01\x00").answer(b"\x05\x00")
    talk.ask(b"\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50").answer(b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x50")
    for _ in range(40):
        talk.ask(get("/x")).answer(response(5000) + b"x" * 5000)
    assert_equal(sink.rows, [False] * len(sink.rows), sizes, {})
