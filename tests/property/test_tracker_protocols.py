"""FTP, POP3, SMTP and IMAP: however a conversation is cut, the same end, and nobody waiting is suitable."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tracker_wire import GUEST_MAC, Talk

from virtgrid.core.errors import RefusedError
from virtgrid.tracker.definition import builtin
from virtgrid.tracker.tracker import Tracker
from virtgrid.tracker.views import ConnectionView

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

#: (to the server?, bytes, whether the client waits when they have come)
Turn = tuple[bool, bytes, bool]

text = st.binary(max_size=300).map(lambda b: b.replace(b"\r", b"x").replace(b"\n", b"\r\n"))
#: Lines that look like commands, answers and ends, with dots stuffed.
mail = st.lists(
    st.sampled_from([b"QUIT", b"250 ok", b"..", b"", b"+OK", b"a OK", b"226 x", b"{5}", b"x" * 900]),
    max_size=6,
).map(lambda lines: b"".join(line + b"\r\n" for line in lines))


def simple(command: bytes, reply: bytes) -> list[Turn]:
    return [(True, command + b"\r\n", True), (False, reply + b"\r\n", False)]


def smtp_data(body: bytes) -> list[Turn]:
    return [
        (True, b"DATA\r\n", True),
        (False, b"354 go\r\n", True),
        (True, body + b".\r\n", True),
        (False, b"250 queued\r\n", False),
    ]


def smtp_chunk(body: bytes) -> list[Turn]:
    return [(True, b"BDAT %d\r\n" % len(body) + body, True), (False, b"250 ok\r\n", False)]


SMTP = st.one_of(
    st.just(simple(b"NOOP", b"250-a\r\n250-b\r\n250 c")),
    st.builds(smtp_data, mail),
    st.builds(smtp_chunk, text),
    st.just([*simple(b"AUTH LOGIN", b"334 x")[:1], (False, b"334 x\r\n", True), *simple(b"QUITx", b"235 y")]),
    st.just(simple(b"DATA", b"503 no")),
)
POP3 = st.one_of(
    st.just(simple(b"DELE 1", b"+OK")),
    st.builds(lambda body: simple(b"RETR 1", b"+OK 3 octets\r\n" + body + b"."), mail),
    st.just(simple(b"LIST", b"+OK\r\n1 20\r\n2 30\r\n.")),
    st.just(simple(b"TOP 9 0", b"-ERR no")),
)
IMAP = st.one_of(
    st.just(simple(b"b NOOP", b"* 1 EXISTS\r\nb OK")),
    st.builds(
        lambda body: simple(b"c FETCH 1 ALL", b"* 1 FETCH (X {%d}\r\n%s Y)\r\nc OK" % (len(body), body)), text
    ),
    st.builds(
        lambda body: [
            (True, b"d APPEND x {%d}\r\n" % len(body), True),
            (False, b"+ go\r\n", True),
            (True, body + b"\r\n", True),
            (False, b"d OK\r\n", False),
        ],
        text,
    ),
    st.builds(lambda body: simple(b"e APPEND x {%d+}\r\n" % len(body) + body, b"e NO"), text),
    st.just(simple(b"f APPEND x {9}", b"f BAD")),
)
FTP = st.one_of(
    st.just(simple(b"PWD", b"257 /")),
    st.just(simple(b"FEAT", b"211-Features:\r\n 226 x\r\n212 y\r\n211-z\r\n211 end")),
    st.just([(True, b"LIST\r\n", True), (False, b"150 go\r\n", True), (False, b"226 done\r\n", False)]),
    st.just(simple(b"PASV", b"227 x (10,0,0,1,200,1)")),
)
GREETINGS = {21: b"220 x\r\n", 25: b"220 x\r\n", 110: b"+OK x\r\n", 143: b"* OK x\r\n"}
FIRST = {21: b"USER a\r\n", 25: b"EHLO a\r\n", 110: b"USER a\r\n", 143: b"a LOGIN b c\r\n"}
ANSWER = {21: b"331 x\r\n", 25: b"250-x\r\n250 y\r\n", 110: b"+OK\r\n", 143: b"a OK\r\n"}


@st.composite
def conversations(draw: st.DrawFn) -> tuple[int, list[Turn]]:
    port, parts = draw(st.sampled_from([(21, FTP), (25, SMTP), (110, POP3), (143, IMAP)]))
    turns: list[Turn] = [
        (False, GREETINGS[port], True),
        (True, FIRST[port], True),
        (False, ANSWER[port], False),
    ]
    for part in draw(st.lists(parts, max_size=5)):
        turns += part
    return port, turns


def cut(data: bytes, draw: st.DrawFn) -> list[bytes]:
    out = []
    while data:
        size = draw(st.sampled_from([1, 2, 3, 7, 40, 200, 1448, 60_000])) if len(out) < 40 else len(data)
        out.append(data[:size])
        data = data[size:]
    return out


def numbers(view: ConnectionView) -> tuple[object, ...]:
    return view.state, view.verdict, view.requests, view.responses, view.gaps, view.large_transfers


@SETTINGS
@given(conversation=conversations(), data=st.data())
def test_cutting_changes_nothing_and_nobody_who_waits_is_suitable(
    conversation: tuple[int, list[Turn]], data: st.DataObject
) -> None:
    port, turns = conversation
    whole = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=port).open()
    parts = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=port).open()
    for to_server, payload, waits in turns:
        (whole.ask if to_server else whole.answer)(payload, 1 << 17)
        pieces = cut(payload, data.draw)
        for index, piece in enumerate(pieces):
            (parts.ask if to_server else parts.answer)(piece, 1 << 17)
            waiting = waits or index + 1 < len(pieces)
            if not waiting:
                for talk in (whole, parts):  # long enough to be between two commands of any protocol
                    talk.later(0.3)
            assert parts.view.suitable is not waiting
        assert numbers(parts.view) == numbers(whole.view)
    assert whole.view.gaps == 0


@SETTINGS
@given(conversation=conversations(), size=st.sampled_from([700, 1448, 60_000]), snap=st.integers(60, 2000))
def test_frames_cut_short_change_nothing_where_their_rest_can_be_had(
    conversation: tuple[int, list[Turn]], size: int, snap: int
) -> None:
    port, turns = conversation
    whole = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=port).open()
    parts = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=port, snap=snap, rests=True).open()
    for to_server, payload, _ in turns:
        for talk in (whole, parts):
            (talk.ask if to_server else talk.answer)(payload, size)
        assert numbers(parts.view) == numbers(whole.view)


@SETTINGS
@given(conversation=conversations(), data=st.data())
def test_nobody_who_waits_is_called_suitable_when_frames_are_lost(
    conversation: tuple[int, list[Turn]], data: st.DataObject
) -> None:
    port, turns = conversation
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=port).open()
    for to_server, payload, waits in turns:
        if data.draw(st.integers(0, 9)):
            (talk.ask if to_server else talk.answer)(payload, 1 << 17)
        else:
            talk.lose(to_server=to_server, length=len(payload))
            talk.tracker.frames_lost(talk.at_s)
        if waits:
            assert not talk.view.suitable


@SETTINGS
@given(
    port=st.sampled_from([21, 25, 80, 110, 143, 443, 9999]),
    steps=st.lists(
        st.tuples(
            st.booleans(),
            st.one_of(
                st.binary(max_size=40),
                st.sampled_from(
                    [
                        b"220 x\r\n",
                        b"+OK\r\n",
                        b"* OK\r\n",
                        b"DATA\r\n",
                        b"354 \r\n",
                        b"a APPEND x {9}\r\n",
                        b"+ \r\n",
                        b"a OK\r\n",
                        b"b IDLE\r\n",
                        b"DONE\r\n",
                        b"\r\n.\r\n",
                        b".\r\n",
                        b"RETR 1\r\n",
                        b"PASV\r\n",
                        b"227 (1,2,3,4,5,6)\r\n",
                        b"226 \r\n",
                        b"BDAT 99\r\n",
                        b"STLS\r\n",
                        b"AUTH X\r\n",
                        b"334 \r\n",
                        b"LIST\r\n",
                        b"* 1 FETCH {5}\r\n",
                        b"EHLO a\r\n",
                        b"USER a\r\n",
                        b"220-x\r\n",
                        b"\x16\x03\x01\x00\x05",
                        b"\xff" * 30,
                    ]
                ),
            ),
            st.integers(0, 3),
        ),
        max_size=40,
    ),
)
def test_nonsense_is_no_trouble_and_what_is_kept_is_bounded(
    port: int, steps: list[tuple[bool, bytes, int]]
) -> None:
    tracker = Tracker()
    talk = Talk(tracker, server_port=port).open()
    for to_server, data, lost in steps:
        (talk.ask if to_server else talk.answer)(data)
        if lost == 3:
            talk.lose(to_server=to_server, length=10)
    assert tracker.snapshot(talk.at_s).unsuitable == tracker.unsuitable
    assert all(len(s.buf) <= 70_000 for s in tracker.streams.values())
    assert tracker.snapshot(talk.at_s + 1e5).total <= 1


@SETTINGS
@given(line=st.binary(max_size=200).filter(lambda b: b"\n" not in b))
def test_the_table_by_first_byte_hides_no_rule(line: bytes) -> None:
    for definition in builtin():
        for rules, table in (
            (definition.client, definition.client_table),
            (definition.server, definition.server_table),
            (definition.client_more, definition.client_more_table),
            (definition.server_more, definition.server_more_table),
        ):
            matching = [r for r in rules if r.pattern.match(line)]
            assert [r for r in table[line[0] if line else 256] if r.pattern.match(line)] == matching


@SETTINGS
@given(conversation=conversations(), data=st.data())
def test_a_state_that_travels_at_any_moment_changes_nothing(
    conversation: tuple[int, list[Turn]], data: st.DataObject
) -> None:
    port, turns = conversation
    stays = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=port).open()
    moves = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=port).open()
    for to_server, payload, _ in turns:
        for piece in cut(payload, data.draw):
            (stays.ask if to_server else stays.answer)(piece, 1 << 17)
            (moves.ask if to_server else moves.answer)(piece, 1 << 17)
            if data.draw(st.booleans()):
                written = moves.tracker.export_state(moves.at_s)
                moves.tracker = Tracker(guest_macs=[GUEST_MAC])
                assert moves.tracker.import_state(written, moves.at_s) == 1
                assert moves.tracker.export_state(moves.at_s) == written
            assert numbers(moves.view) == numbers(stays.view)
            assert moves.view.reason == stays.view.reason


@SETTINGS
@given(conversation=conversations(), data=st.data())
def test_nobody_who_waits_is_called_suitable_when_the_guest_ran_on_unseen(
    conversation: tuple[int, list[Turn]], data: st.DataObject
) -> None:
    port, turns = conversation
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=port).open()
    first = data.draw(st.integers(3, len(turns)))
    unseen = data.draw(st.integers(0, len(turns) - first))
    for number, (to_server, payload, waits) in enumerate(turns):
        if number == first:
            written = talk.tracker.export_state(talk.at_s)
            talk.tracker = Tracker(guest_macs=[GUEST_MAC])
            talk.tracker.import_state(written, talk.at_s)
        if first <= number < first + unseen:
            talk.lose(to_server=to_server, length=len(payload))
            continue
        (talk.ask if to_server else talk.answer)(payload, 1 << 17)
        if waits:
            assert not talk.view.suitable


PLACES = ["mode", "need", "nxt", "buf", "until", "upto", "in_more", "more", "ask", "exchange", "pops"]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 1 << 40), st.text(max_size=8), st.just("00" * 6)
)


@SETTINGS
@given(conversation=conversations(), data=st.data())
def test_a_damaged_state_is_refused_or_harmless(
    conversation: tuple[int, list[Turn]], data: st.DataObject
) -> None:
    port, turns = conversation
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=port).open()
    for to_server, payload, _ in turns[: data.draw(st.integers(0, len(turns)))]:
        (talk.ask if to_server else talk.answer)(payload)
    state = json.loads(talk.tracker.export_state(talk.at_s))
    row = state["connections"][0]
    part = data.draw(st.sampled_from([row, row["c"], row["s"]]))
    for name in data.draw(st.lists(st.sampled_from([*PLACES, *part]), max_size=3)):
        part[name] = data.draw(st.one_of(scalars, st.lists(scalars, max_size=3), st.integers(0, 12)))
    tracker = Tracker(guest_macs=[GUEST_MAC])
    try:
        tracker.import_state(json.dumps(state).encode(), talk.at_s)
    except RefusedError:
        assert tracker.total == 0
    talk.tracker = tracker
    for to_server, payload, _ in turns:
        (talk.ask if to_server else talk.answer)(payload, 50)
    assert tracker.snapshot(talk.at_s + 1e5).unsuitable == tracker.unsuitable
