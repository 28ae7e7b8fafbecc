"""The checker itself: it knows who waits, claims nothing it cannot know, and catches wrong verdicts."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checker import Claim, claims, clocked, errors, rests
from tracker_wire import Talk

from virtgrid.tracker.pcap import Frame

LARGE = 4 << 20
UP, DOWN = True, False


class Recorder:
    """Takes frames in a tracker's place."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def feed(self, frame: bytes, wire_len: int, at_s: float) -> None:
        self.frames.append(Frame(at_s, wire_len, frame))


def recorded(port: int = 80, **more: Any) -> tuple[Talk, list[Frame]]:
    recorder = Recorder()
    return Talk(recorder, server_port=port, at_s=0.0, **more), recorder.frames  # type: ignore[arg-type]


def waiting(
    steps: list[tuple[bool, bytes]], port: int, large_bytes: int = LARGE
) -> dict[str, list[tuple[int, int]]]:
    """Step k happens k seconds after the handshake; who waited, from which step until which."""
    talk, frames = recorded(port)
    talk.open()
    for to_server, data in steps:
        talk.later(1)
        (talk.ask if to_server else talk.answer)(data, 1 << 16)
    return {
        c.what: [(round(a - 1), round(b - 1)) for a, b in c.spans]
        for c in claims(clocked(frames), large_bytes)
    }


HTTP = [
    (UP, b"GET /a HTTP/1.1\r\nHost: h\r\n"),  # 1: half a head waits already
    (UP, b"\r\nHEAD /b HTTP/1.1\r\n\r\n"),
    (DOWN, b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab"),
    (DOWN, b"cd"),  # 4: the first is answered
    (DOWN, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"),
    (UP, b"POST /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n"),
    (UP, b"0\r\n\r\n"),
    (DOWN, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\n"),
    (DOWN, b"Trailer: t\r\n\r\n"),
]
FTP = [
    (DOWN, b"220-hello\r\n220 there\r\n"),
    (UP, b"USER a\r\nPA"),
    (DOWN, b"331-not\r\n 331 yet\r\n331 now\r\n"),
    (UP, b"SS b\r\n"),
    (DOWN, b"230 in\r\n"),
    (UP, b"RETR f\r\n"),
    (DOWN, b"150 coming\r\n"),
    (DOWN, b"226 done\r\n"),
]
SMTP = [
    (DOWN, b"220 h ESMTP\r\n"),
    (UP, b"EHLO c\r\n"),
    (DOWN, b"250-PIPELINING\r\n250 AUTH\r\n"),
    (UP, b"AUTH LOGIN\r\n"),
    (DOWN, b"334 VXNl\r\n"),
    (UP, b"abc\r\n"),
    (DOWN, b"235 in\r\n"),
    (UP, b"MAIL FROM:<a>\r\nDATA\r\n"),
    (DOWN, b"250 ok\r\n354 go\r\n"),
    (UP, b"QUIT\r\n.\r\n"),
    (DOWN, b"250 kept\r\n"),
    (UP, b"BDAT 6 LAST\r\nQUIT\r\n"),
    (DOWN, b"250 kept\r\n"),
]
POP3 = [
    (DOWN, b"+OK hi\r\n"),
    (UP, b"LIST\r\nNOOP\r\n"),
    (DOWN, b"+OK\r\n1 20\r\n"),
    (DOWN, b".\r\n+OK\r\n"),
    (UP, b"LIST 1\r\n"),
    (DOWN, b"+OK 1 20\r\n"),
    (UP, b"RETR 1\r\n"),
    (DOWN, b"+OK 20 octets\r\n..\r\n+OK no end\r\n"),
    (DOWN, b".\r\n"),
    (UP, b"RETR 9\r\n"),
    (DOWN, b"-ERR none\r\n"),
]
IMAP = [
    (DOWN, b"* OK hi\r\n"),
    (UP, b"a NOOP\r\nb SELECT x\r\n"),
    (DOWN, b"* 1 EXISTS\r\nb OK\r\n"),  # the second comes first
    (DOWN, b"a OK\r\n"),
    (UP, b"c APPEND x {4}\r\n"),
    (DOWN, b"+ go\r\n"),
    (UP, b"c OK\r\n"),
    (DOWN, b"c OK\r\n"),
    (UP, b"d IDLE\r\n"),
    (DOWN, b"+ idling\r\n"),
    (DOWN, b"* 2 EXISTS\r\n"),
    (UP, b"DONE\r\n"),
    (DOWN, b"d OK\r\n"),
    (UP, b"e FETCH 1 BODY[]\r\n"),
    (DOWN, b"* 1 FETCH (BODY[] {7}\r\ne OK\r\nx)\r\n"),
    (DOWN, b"e OK\r\n"),
]


@pytest.mark.parametrize(
    ("port", "steps", "expected"),
    [
        (
            80,
            HTTP,
            {"GET /a HTTP/1.1": (1, 4), "HEAD /b HTTP/1.1": (2, 5), "POST /c HTTP/1.1": (6, 9)},
        ),
        (21, FTP, {"USER a": (2, 3), "PASS b": (2, 5), "RETR f": (6, 8)}),
        (
            25,
            SMTP,
            {
                "EHLO c": (2, 3),
                "AUTH LOGIN": (4, 5),
                "AUTH, a line of it": (6, 7),
                "MAIL FROM:<a>": (8, 9),
                "DATA": (8, 11),
                "BDAT 6 LAST": (12, 13),
            },
        ),
        (110, POP3, {"LIST": (2, 4), "NOOP": (2, 4), "LIST 1": (5, 6), "RETR 1": (7, 9), "RETR 9": (10, 11)}),
        (
            143,
            IMAP,
            {
                "a NOOP": (2, 4),
                "b SELECT x": (2, 3),
                "c APPEND x {4}": (5, 8),
                "d IDLE": (9, 10),
                "DONE": (12, 13),
                "e FETCH 1 BODY[]": (14, 16),
            },
        ),
    ],
    ids=["http", "ftp", "smtp", "pop3", "imap"],
)
def test_it_knows_from_when_to_when_a_client_waits(
    port: int, steps: list[tuple[bool, bytes]], expected: dict[str, tuple[int, int]]
) -> None:
    assert waiting(steps, port) == {what: [span] for what, span in expected.items()}


def test_it_knows_when_nobody_waits() -> None:
    talk, frames = recorded(25)
    talk.open()
    for to_server, data in SMTP:
        talk.later(1)
        (talk.ask if to_server else talk.answer)(data, 1 << 16)
    (rest,) = rests(clocked(frames))
    assert [(round(a - 1), round(b - 1)) for a, b in rest.spans] == [(3, 4), (7, 8), (11, 12)]


def test_a_large_transfer_is_excused_and_only_while_it_is_under_way() -> None:
    get = (UP, b"GET /l HTTP/1.1\r\n\r\n")
    head = (DOWN, b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
    steps = [get, get, head, (DOWN, b"x" * 60), (DOWN, b"x" * 40), (DOWN, head[1]), (DOWN, b"x" * 100)]
    assert waiting(steps, 80, 101) == {"GET /l HTTP/1.1": [(2, 7)]}
    talk, frames = recorded()
    talk.open()
    for to_server, data in steps:
        talk.later(1)
        (talk.ask if to_server else talk.answer)(data)
    first, second = claims(clocked(frames), 100)
    assert [(round(a - 1), round(b - 1)) for a, b in first.spans] == [(1, 3)]
    assert [(round(a - 1), round(b - 1)) for a, b in second.spans] == [(2, 3), (5, 6)]


def test_a_large_upload_is_excused_for_itself_alone() -> None:
    steps = [
        (UP, b"GET /s HTTP/1.1\r\n\r\n"),
        (UP, b"PUT /l HTTP/1.1\r\nContent-Length: 100\r\n\r\n"),
        (UP, b"x" * 50),
        (UP, b"x" * 50),
        (DOWN, b"HTTP/1.1 204 No\r\n\r\n"),
        (DOWN, b"HTTP/1.1 204 No\r\n\r\n"),
    ]
    assert waiting(steps, 80, 100) == {"GET /s HTTP/1.1": [(1, 5)], "PUT /l HTTP/1.1": [(2, 3), (4, 6)]}


def test_a_large_ftp_transfer_is_excused_while_its_connection_lives() -> None:
    recorder = Recorder()
    control = Talk(recorder, server_port=21, at_s=0.0).open().answer(b"220 hi\r\n")  # type: ignore[arg-type]
    control.ask(b"USER a\r\n").answer(b"230 in\r\n").later(1).ask(b"RETR f\r\n").later(1).answer(
        b"150 coming\r\n"
    )
    data = Talk(recorder, server_port=5000, client_port=40023, at_s=3.0).open()  # type: ignore[arg-type]
    data.answer(b"x" * 6000).later(1).fin(to_server=False)
    control.later(3).answer(b"226 done\r\n")
    for large, spans in ((6000, [(1, 2), (4, 5)]), (6001, [(1, 5)])):
        _, claim = claims(clocked(recorder.frames), large)
        assert [(round(a - 1), round(b - 1)) for a, b in claim.spans] == spans


def test_it_claims_nothing_that_the_capture_leaves_open() -> None:
    def until(change: Any) -> int:
        talk, frames = recorded()
        talk.open().later(1).ask(b"GET /a HTTP/1.1\r\n\r\n").later(1)
        change(talk)
        talk.later(10).ask(b"x")
        ((_, end),) = claims(clocked(frames), LARGE)[0].spans
        return round(end - 1)

    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n"
    assert until(lambda t: t.answer(ok).later(1).lose(to_server=False, length=20).answer(b"x" * 3)) == 3
    assert until(lambda t: t.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 5x\r\n\r\n")) == 2
    assert until(lambda t: t.answer(b"what?\r\n")) == 2
    assert until(lambda t: t.reset(to_server=False)) == 2
    assert until(lambda t: t.answer(b"HTTP/1.1 200 OK\r\n\r\nabc").later(2).fin(to_server=False)) == 4
    assert until(lambda t: t.answer(b"HTTP/1.1 101 Go\r\n\r\n")) == 2


def test_a_request_from_a_servers_port_is_no_claim_where_the_beginning_was_not_seen() -> None:
    for seen in (True, False):
        talk, frames = recorded(port=40007, client_port=80)
        if seen:
            talk.open()
        talk.ask(b"GET /x HTTP/1.1\r\nHTTP/1.1 204 No\r\n\r\n", 1)
        assert bool(claims(clocked(frames), LARGE)) is seen


def test_repeated_and_late_segments_do_not_disturb_it() -> None:
    talk, frames = recorded()
    talk.open().later(1).ask(b"GET /a HTTP/1.1\r\n\r\n")
    talk.later(1).answer(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabcdefghi", 16)
    mixed = [*frames[:3], *frames[5:], frames[3], frames[4], *frames[5:]]
    (claim,) = claims(clocked(mixed), LARGE)
    ((begin, end),) = claim.spans
    assert (round(begin - 1), round(end - 1)) == (1, 2)
    assert end == clocked(mixed)[len(frames) - 1].at_s


@dataclass(frozen=True)
class Said:
    at_s: float
    verdict: str


CLAIM = Claim(client="c", server="s", protocol="http", what="GET", spans=((2.0, 3.0), (5.0, 6.0)))
RIGHT = [Said(0, "unsuitable"), Said(1, "suitable"), Said(2, "unsuitable"), Said(3, "suitable"),
         Said(5, "unknown"), Said(6, "suitable")]  # fmt: skip


def wrong(line: list[Said]) -> list[tuple[float, float, str]]:
    return [(e.from_s, e.until_s, e.said) for e in errors([CLAIM], {("c", "s"): line})]


def test_a_right_timeline_passes_and_every_wrong_one_is_caught() -> None:
    assert wrong(RIGHT) == []
    assert wrong([]) == [(2, 3, "nothing"), (5, 6, "nothing")]
    assert wrong([*RIGHT[:2], Said(2.000001, "unsuitable"), *RIGHT[3:]]) == [(2, 2.000001, "suitable")]
    assert wrong([*RIGHT[:3], Said(2.9, "suitable"), *RIGHT[4:]]) == [(2.9, 3, "suitable")]
    assert wrong([*RIGHT[:4], Said(5.5, "unsuitable"), Said(6, "suitable")]) == [(5, 5.5, "suitable")]
    assert wrong([*RIGHT[:5], Said(5.2, "closed")]) == [(5.2, 6, "closed")]
    assert wrong([Said(0, "suitable")]) == [(2, 3, "suitable"), (5, 6, "suitable")]


def test_a_timeline_under_the_other_direction_is_found() -> None:
    assert errors([CLAIM], {("s", "c"): RIGHT}) == []


def test_it_shares_no_code_with_what_it_checks() -> None:
    here = Path(__file__).parent
    parts = sorted(here.glob("checker*.py"))
    assert len(parts) == 6
    for part in parts:
        for node in ast.walk(ast.parse(part.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("virtgrid"):
                assert (node.module, [a.name for a in node.names]) == ("virtgrid.tracker.pcap", ["Frame"])
            elif isinstance(node, ast.Import):
                assert not any(a.name.startswith("virtgrid") for a in node.names)
