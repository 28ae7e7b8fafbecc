"""The short way of ordinary segments (quick.py) ends where the machine's long way does."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tracker_block_protocols import Rows, Sink
from test_tracker_block_protocols import traffic as other_traffic
from test_tracker_blocks import SETTINGS, Recording, Row, everything, traffic
from tracker_wire import GUEST_MAC, Talk, get, response

from virtgrid.core.frames import block_of
from virtgrid.tracker.definition import builtin, parse


def assert_equal(rows: list[Row], options: dict[str, Any]) -> int:
    """Frames through a tracker, and through one that knows no short way; how often the first took it.

    And all at once through a third, where messages that follow each other are taken together.
    """
    usual, slow, together = Recording(**options), Recording(**options), Recording(**options)
    changes: list[Any] = []
    taken = 0
    quick = usual.quick.take

    def take(*segment: Any) -> bool:
        nonlocal taken
        done = quick(*segment)
        taken += done
        return done

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(usual.quick, "take", take)
        patched.setattr(slow.quick, "take", lambda *_: False)
        for at_s, wire_len, data in rows:
            usual.feed(data, wire_len, at_s)
            slow.feed(data, wire_len, at_s)
            found = everything(slow)
            assert everything(usual) == found
            changes += found["changes"]
        patched.setattr("virtgrid.tracker.tracker._FEW_FRAMES", 1)
        together.feed_block(block_of(rows))
        assert everything(together) == everything(slow) | {"changes": changes}
        end_s = usual.now_s + 1000
        assert usual.snapshot(end_s) == slow.snapshot(end_s)
        assert everything(usual) == everything(slow)
    return taken


OPTIONS = st.fixed_dictionaries(
    {
        "large_bytes": st.sampled_from([1, 500, 3000, 4 << 20]),
        "count_outgoing": st.booleans(),
        "guest_macs": st.sampled_from([None, [GUEST_MAC]]),
        "tells": st.booleans(),
    }
)


@SETTINGS
@given(rows=traffic(), options=OPTIONS)
def test_the_short_way_changes_nothing_about_any_traffic(rows: list[Row], options: dict[str, Any]) -> None:
    assert_equal(rows, options)


@SETTINGS
@given(rows=other_traffic(), options=OPTIONS)
def test_the_short_way_changes_nothing_about_other_protocols(rows: Rows, options: dict[str, Any]) -> None:
    assert_equal(rows, options)


asked = st.sampled_from(
    [
        *[get()] * 9,
        get("/h", "HEAD"),
        get("/u", "POST", "Content-Length: 30") + b"u" * 30,
        get("/u", "POST", "content-length : 3") + b"abc",
        get("/u", "PUT", "X-Content-Length: 9", "Expect:"),
        get("/u", "PUT", "Content-Length: 3", "Expect: 100-continue") + b"abc",
        get() + get("/two"),
        b"\r\n" + get(),
        b"\r\r" + get(),
        b"GET /bare HTTP/1.1\nHost: a\n\n",
        b"GET /mixed HTTP/1.1\nHost: a\n\r\n",
        b"GET /half HTTP/1.1\r\nHost: a\n\nmore\r\n\r\n",
        b"GET /old\r\n\r\n",
        b"no request\r\n\r\n",
        b"greeting /\r\n\r\n",
        b"G",
        get("/" + "l" * 300),
        get("/large", "GET", "X: " + "y" * 5000),
        get("a:1", "CONNECT"),
        get("/ws", "GET", "Upgrade: websocket"),
    ]
)
told = st.sampled_from(
    [
        *[response(40) + b"d" * 40] * 9,
        *[response(4000) + b"d" * 4000] * 6,
        response(0),
        response(40) + b"d" * 41,
        response(40) + b"d" * 30,
        response(3) + b"abc" + response(2) + b"de",
        response(None, "204 No Content"),
        response(700, "304 Not Modified"),
        response(700, "304 " + "z" * 100),
        response(None, "100 Continue"),
        response(None, "101 Switching"),
        response(None) + b"until the end",
        response(None, "200 OK", "content-length:7 ") + b"d" * 7,
        response(None, "200 OK", "content-length :7") + b"d" * 7,
        response(None, "200 OK", "Content-Length: 7, 7") + b"d" * 7,
        response(None, "200 OK", "Content-Length: x", "Content-Length: 7") + b"d" * 7,
        response(None, "200 OK", "Content-Length: 7\r9") + b"d" * 7,
        response(None, "200 OK", "Content-Length:\r7") + b"d" * 7,
        response(None, "200 OK", "Content-Length: -7") + b"d" * 7,
        response(None, "200 OK", "X-Content-Length: 7") + b"d" * 7,
        response(None, "200 OK", "Content-Length-X: 9", "Content-Length: 7") + b"d" * 7,
        response(7, "200 OK", "Content-Length: 9") + b"d" * 7,
        response(7, "200 OK", "Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\n\r\n",
        response(7, "200 OK", "Transfer-Encoding: identity") + b"d" * 7,
        response(10**17),
        b"HTTP/1.0 200 bare\nContent-Length: 2\n\nab",
        b"\r\n" + response(0),
        b"\r" + response(0),
        b"HTTP/1.1 x\r\n\r\n",
        b"HT",
    ]
)

#: A protocol that reads heads as HTTP does, and says of them what the built-in definitions do not.
OWN = """protocol own
unit head max 1KiB
detect client /^[A-Za-z]+ /
detect server /^HTTP/
field length content-length
field mode mode
pause new hold 5s
pause idle {idle}
pause busy hold
pause moving ok
pause opaque quiet 2s
client /^(?P<word>GET|greeting) / -> push word
client /^(?P<word>HEAD|P[A-Z]+) / -> push word ; await mode late ; body bytes length | none
client /^(?P<word>C?)ONNECT/ -> push word
server /^HTTP.1.. 2/ if GET -> pop ; body bytes length | none
server /^HTTP.1.. 2/ if HEAD POST -> pop ; body bytes length | close
server /^HTTP.1.. 2/ -> pop ; body none
server /^HTTP/ -> note
"""


@SETTINGS
@given(
    turns=st.lists(st.tuples(asked, told), min_size=1, max_size=8),
    size=st.sampled_from([1448, 1448, 60_000, 45]),
    snap=st.sampled_from([65_536, 65_536, 200]),
    idle=st.sampled_from(["", "", "ok", "ok", "quiet 2s"]),
    seed=st.integers(0, 1 << 32),
    options=OPTIONS,
)
def test_heads_of_every_kind_do_the_same_the_short_way(
    turns: list[tuple[bytes, bytes]], size: int, snap: int, idle: str, seed: int, options: dict[str, Any]
) -> None:
    rng = Random(seed)
    sink: Any = Sink()
    talk = Talk(sink, snap=snap, by_guest=not rng.randint(0, 4))
    if rng.randint(0, 4):
        talk.open()
    for question, answer in turns:
        match rng.randint(0, 12):
            case 0:
                talk.lose(to_server=True, length=len(question)).answer(answer, size)
            case 1:
                talk.ask(question, size).lose(to_server=False, length=len(answer))
            case 2:
                talk.answer(answer, size).ask(question, size)
            case 3:
                talk.ask(question, size).ask(question, size).answer(answer, size).answer(answer, size)
            case _:
                talk.ask(question, size).answer(answer, size)
        talk.later(rng.choice([0.0, 0.01, 1.5, 40.0]))
    definitions = [parse(OWN.format(idle=idle), "own")] if idle else builtin()
    assert_equal(sink.rows, options | {"definitions": definitions})


def test_the_short_way_is_taken() -> None:
    sink: Any = Sink()
    talk = Talk(sink).open()
    for length in (0, 100, 5000):
        talk.ask(get()).answer(response(length) + b"d" * length)
    # All but what opens the connection.
    assert assert_equal(sink.rows, {}) == len(sink.rows) - 2
