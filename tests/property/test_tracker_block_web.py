"""A block is its frames for what web servers mostly see: short connections, and requests answered at once."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from test_tracker_blocks import CHUNKED, SETTINGS, Ends, assert_equal, spoil, woven
from tracker_wire import GUEST_MAC, get, response

from virtgrid.tracker.decode import ACK, FIN, RST, SYN

MASK = 0xFFFFFFFF
EXCHANGES = [
    *[(get("/a"), response(40) + b"d" * 40)] * 6,
    (get("/b"), response(4000) + b"d" * 4000),
    (get("/b"), response(0)),
    (get("/c"), response(None, "200 OK", CHUNKED) + b"5\r\nabcde\r\n3\r\nabc\r\n0\r\n\r\n"),
    (get("/c"), response(None, "200 OK", CHUNKED) + b"5\r\nabcde\r\n0\r\nX: y\r\n\r\n"),
    (get("/d", "HEAD"), response(700)),
    (get("/e"), response(700, "304 Not Modified")),
    (get("/f", "POST", "Content-Length: 9") + b"u" * 9, response(3) + b"abc"),
    (get("/g"), response(None, "100 Continue") + response(3) + b"abc"),
    (get("/h") + get("/h"), response(3) + b"abc" + response(3) + b"abc"),
    (get("/i"), response(700) + b"short"),
    (b"POST / HTTP/1.1\r\n", response(0, "400 Bad Request")),
    (b"no request\r\n\r\n", b"no answer\r\n"),
]
USUAL = EXCHANGES[:9]


class Web(Ends):
    """One connection after the other between the same ports."""

    def life(self, rng: Random, dirty: bool) -> None:
        size = rng.choice([600, 1448, 60_000])
        self.put(True, SYN)
        if dirty and not rng.randint(0, 3):
            self.put(rng.random() < 0.5, rng.choice([SYN, ACK, RST, SYN | ACK]), rng.choice([b"", b"x"]))
        self.put(False, SYN | ACK)
        self.put(True, ACK)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 4, 8])):
            question, answer = rng.choice(EXCHANGES if dirty else USUAL)
            if dirty and not rng.randint(0, 3):
                self._miss(rng, len(question), len(answer))
                continue
            self.say(True, question, size, rng)
            self.say(False, answer, size, rng)
        first = rng.random() < 0.5
        if not rng.randint(0, 9):
            self.next[first] += rng.choice([1, -1, 100])
        self.put(first, FIN | ACK)
        if rng.randint(0, 1):
            self.put(not first, ACK)
        if dirty:
            self._end(first, rng)
        self.put(not first, FIN | ACK)
        self.put(first, ACK)
        # The next one begins elsewhere.
        self.next = {side: at + rng.choice([64_000, 1 << 20]) for side, at in self.next.items()}

    def _miss(self, rng: Random, asked: int, answered: int) -> None:
        """A whole exchange was not captured, or bytes of one side that nobody had asked for."""
        match rng.randint(0, 2):
            case 0:
                self.next[True] += asked
                self.next[False] += answered
            case 1:
                self.next[rng.random() < 0.5] += rng.choice([1, -1, 100])
            case 2:
                self.next[False] += answered

    def _end(self, first: bool, rng: Random) -> None:
        """What may come between the end of one side and of the other."""
        match rng.randint(0, 6):
            case 0:
                self.put(not first, ACK, b"HTTP/1.1 408 Late\r\n\r\n")
            case 1:
                self.out.append(self.out[-1])
            case 2:
                self.put(rng.random() < 0.5, RST)
            case 3:
                self.next[not first] += rng.choice([1, -1, 100])
            case 4:
                self.put(not first, FIN | ACK, b"x")
            case 5:
                self.put(first, FIN | ACK)


@st.composite
def short(draw: st.DrawFn) -> list[Any]:
    """Connections that come and go; some with what is not usual in them."""
    rng = Random(draw(st.integers(0, 1 << 32)))
    guests = draw(st.sampled_from([0.0, 0.0, 0.3]))
    ends: list[Ends] = []
    for number in range(draw(st.integers(1, 5))):
        near = rng.choice([1000, MASK - 2000])
        port = rng.choice([80, 80, 80, 80, 21, 8081])
        one = Web(
            rng.random() < 0.2,
            rng.random() < guests,
            (40000 + number, port),
            {True: near, False: near + 7000},
        )
        for _ in range(rng.randint(1, 4)):
            one.life(rng, rng.random() < 0.25)
        if not rng.randint(0, 4):
            spoil(rng.randint(0, 3), rng, one.out)
        ends.append(one)
    pauses = draw(st.sampled_from([[0.0, 0.001], [0.001, 0.001, 0.001, 0.4], [0.0, 0.01, 0.01, 2.0, 40.0]]))
    return woven(ends, pauses, draw(st.sampled_from([[1 << 17], [1 << 17], [1 << 17, 300, 60]])), rng)


@SETTINGS
@given(
    rows=short(),
    sizes=st.lists(st.sampled_from([7, 40, 1000, 1000]), min_size=1, max_size=3),
    options=st.fixed_dictionaries(
        {
            "large_bytes": st.sampled_from([4, 3000, 4 << 20, 4 << 20]),
            "count_outgoing": st.booleans(),
            "connections_max": st.sampled_from([2, 1000, 1000]),
            "guest_macs": st.sampled_from([None, [GUEST_MAC]]),
            "tells": st.booleans(),
        }
    ),
)
def test_short_connections_fed_together_do_what_they_do_one_by_one(
    rows: list[Any], sizes: list[int], options: dict[str, Any]
) -> None:
    assert_equal(rows, [False] * len(rows), sizes, options)
