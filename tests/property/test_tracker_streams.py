"""However a conversation is cut, repeated, shuffled or lost: the same end, and nobody waiting is suitable."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tracker_wire import GUEST_MAC, OTHER_MAC, Talk, get, response

from virtgrid.core.errors import RefusedError
from virtgrid.tracker.decode import ACK, decode
from virtgrid.tracker.definition import parse
from virtgrid.tracker.patterns import PatternError, compile_pattern
from virtgrid.tracker.tracker import Tracker
from virtgrid.tracker.views import ConnectionView

CHUNKED = "Transfer-Encoding: chunked"


@dataclass(frozen=True)
class Exchange:
    """A request and its answer, as bytes."""

    request: bytes
    answer: bytes


def counted(length: int, upload: int) -> Exchange:
    head = get("/c", "POST" if upload else "GET", *([f"Content-Length: {upload}"] if upload else []))
    return Exchange(head + b"u" * upload, response(length) + b"d" * length)


def chunked(sizes: list[int]) -> Exchange:
    body = b"".join(b"%x\r\n" % n + b"GET /fake HTTP/1.1\r\n\r\n".ljust(n, b"x")[:n] + b"\r\n" for n in sizes)
    return Exchange(get("/k"), response(None, "200 OK", CHUNKED) + body + b"0\r\n\r\n")


def bodiless(method: str, status: str) -> Exchange:
    return Exchange(get("/n", method), response(700, status))


def interim(length: int) -> Exchange:
    return Exchange(get("/i"), b"HTTP/1.1 103 Early Hints\r\n\r\n" + response(length) + b"d" * length)


exchanges = st.one_of(
    st.builds(counted, st.integers(0, 4000), st.sampled_from([0, 0, 0, 1, 900])),
    st.builds(chunked, st.lists(st.integers(1, 1500), max_size=4)),
    st.sampled_from(
        [
            bodiless("HEAD", "200 OK"),
            bodiless("GET", "304 Not Modified"),
            bodiless("DELETE", "204 No Content"),
        ]
    ),
    st.builds(interim, st.integers(0, 50)),
)
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def cut(data: bytes, draw: st.DrawFn) -> list[bytes]:
    """The bytes in segments of drawn sizes."""
    out = []
    while data:
        size = draw(st.sampled_from([1, 2, 5, 40, 200, 1448, 60_000]))
        out.append(data[:size])
        data = data[size:]
        if len(out) > 60:
            out.append(data)
            break
    return [part for part in out if part]


@st.composite
def conversations(draw: st.DrawFn, pipelined: bool = True) -> list[tuple[bool, bytes]]:
    """(to the server?, payload) in the order of sending; answers never before their requests."""
    script: list[tuple[bool, bytes]] = []
    todo = draw(st.lists(exchanges, min_size=1, max_size=4))
    while todo:
        burst = draw(st.integers(1, len(todo))) if pipelined else 1
        for item in todo[:burst]:
            script += [(True, part) for part in cut(item.request, draw)]
        for item in todo[:burst]:
            script += [(False, part) for part in cut(item.answer, draw)]
        todo = todo[burst:]
    return script


def play(script: list[tuple[bool, bytes]]) -> ConnectionView:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC])).open()
    for to_server, data in script:
        (talk.ask if to_server else talk.answer)(data, 1 << 17)
    return talk.view


def numbers(view: ConnectionView) -> tuple[object, ...]:
    return (
        view.state,
        view.verdict,
        view.requests,
        view.responses,
        view.gaps,
        view.bytes_to_client,
        view.bytes_to_server,
    )


@SETTINGS
@given(script=conversations())
def test_how_a_conversation_is_cut_into_segments_does_not_matter(script: list[tuple[bool, bytes]]) -> None:
    merged: list[tuple[bool, bytes]] = []
    for to_server, data in script:
        if merged and merged[-1][0] == to_server:
            merged[-1] = (to_server, merged[-1][1] + data)
        else:
            merged.append((to_server, data))
    assert numbers(play(script)) == numbers(play(merged))


@SETTINGS
@given(script=conversations(), data=st.data())
def test_repeated_and_reordered_segments_do_not_matter(
    script: list[tuple[bool, bytes]], data: st.DataObject
) -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC])).open()
    seqs = {True: talk.client_seq, False: talk.server_seq}
    bursts: list[list[tuple[bool, int, int, bytes]]] = []
    for to_server, payload in script:
        segment = (to_server, seqs[to_server], seqs[not to_server], payload)
        if not bursts or bursts[-1][0][0] != to_server:
            bursts.append([])
        bursts[-1].append(segment)
        seqs[to_server] += len(payload)
    for burst in bursts:
        # Within one direction's burst, which is what a network can shuffle.
        order = data.draw(st.permutations(burst)) if len(burst) < 30 else burst
        again = data.draw(st.lists(st.sampled_from(burst), max_size=3))
        for to_server, seq, ack, payload in [*order, *again]:
            talk.put(to_server, seq, ack, ACK, payload)
    assert numbers(talk.view) == numbers(play(script))


def waiting_after(script: list[tuple[bool, bytes]]) -> list[bool]:
    """For every step, whether the client waits then: told from the bytes, not from the tracker.

    The script's exchanges alternate strictly; a client waits from its request's first byte until
    its answer's last.
    """
    out = []
    for index, (to_server, _) in enumerate(script):
        last_of_answer = not to_server and (index + 1 == len(script) or script[index + 1][0])
        out.append(not last_of_answer)
    return out


@SETTINGS
@given(script=conversations(pipelined=False))
def test_nobody_who_waits_is_called_suitable_and_nobody_else_unsuitable(
    script: list[tuple[bool, bytes]],
) -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC])).open()
    for (to_server, data), waits in zip(script, waiting_after(script), strict=True):
        (talk.ask if to_server else talk.answer)(data, 1 << 17)
        assert talk.view.suitable is not waits
        assert talk.tracker.unsuitable == waits


@SETTINGS
@given(script=conversations(pipelined=False), data=st.data())
def test_nobody_who_waits_is_called_suitable_when_frames_are_lost(
    script: list[tuple[bool, bytes]], data: st.DataObject
) -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC])).open()
    kept = data.draw(st.lists(st.booleans(), min_size=len(script), max_size=len(script)))
    for (to_server, payload), waits, keep in zip(script, waiting_after(script), kept, strict=True):
        if keep:
            (talk.ask if to_server else talk.answer)(payload, 1 << 17)
        else:
            talk.lose(to_server=to_server, length=len(payload))
            talk.tracker.frames_lost(talk.at_s)
        if waits:
            assert not talk.view.suitable


@SETTINGS
@given(frames=st.lists(st.binary(max_size=200), max_size=30), wire=st.integers(0, 100_000))
def test_random_bytes_are_no_trouble(frames: list[bytes], wire: int) -> None:
    tracker = Tracker()
    for number, frame in enumerate(frames):
        tracker.feed(frame, wire, float(number))
    assert tracker.snapshot(1e6).unsuitable == 0


_ETHERNET = OTHER_MAC + GUEST_MAC


@SETTINGS
@given(
    frames=st.lists(
        st.tuples(
            st.sampled_from([b"\x08\x00\x45", b"\x86\xdd\x60", b"\x81\x00\x00\x01\x08\x00\x45"]),
            st.binary(max_size=120),
        ),
        max_size=30,
    )
)
def test_nearly_good_frames_are_no_trouble(frames: list[tuple[bytes, bytes]]) -> None:
    tracker = Tracker()
    for kind, rest in frames:
        frame = _ETHERNET + kind + rest
        decode(frame, len(frame))
        tracker.feed(frame, len(frame), 0.0)


@SETTINGS
@given(
    steps=st.lists(
        st.tuples(
            st.booleans(),
            st.integers(-3000, 100_000),
            st.sampled_from([0, 1, 2, 4, 16, 17, 18, 20]),
            st.one_of(
                st.binary(max_size=60),
                st.sampled_from(
                    [get(), response(5), response(None, "200 OK", CHUNKED), b"fff\r\n", b"0\r\n\r\n"]
                ),
            ),
            st.floats(0, 5),
        ),
        max_size=60,
    )
)
def test_a_hostile_conversation_is_no_trouble_and_bounded(
    steps: list[tuple[bool, int, int, bytes, float]],
) -> None:
    tracker = Tracker()
    talk = Talk(tracker).open()
    for to_server, offset, flags, data, pause in steps:
        base = talk.client_seq if to_server else talk.server_seq
        talk.later(pause).put(to_server, base + offset, 0, flags, data)
    snapshot = tracker.snapshot(talk.at_s)
    assert snapshot.unsuitable == tracker.unsuitable
    assert tracker.snapshot(talk.at_s + 1e5).total <= 1


def test_what_one_connection_can_make_the_tracker_keep_is_bounded() -> None:
    tracker = Tracker()
    talk = Talk(tracker).open()
    for step in range(2000):
        # A hole in front of everything: nothing can be read, all of it waits.
        talk.put(True, talk.client_seq + 10 + step * 1500, 0, ACK, b"GET " + b"x" * 1400)
    (stream, _) = tracker.streams.values()
    assert stream.waiting_bytes < 2 << 20
    assert len(stream.waiting or ()) <= 257
    assert len(stream.buf) <= 70_000


@SETTINGS
@given(text=st.text(alphabet="abz019^$.*+?{},|()[]\\-:/<>=!PdDsSwWbrnt ", max_size=40))
def test_any_pattern_is_accepted_or_refused_never_worse(text: str) -> None:
    try:
        pattern = compile_pattern(text)
    except PatternError:
        return
    pattern.match(b"ab019 z" * 500)


@SETTINGS
@given(text=st.text(max_size=300))
def test_any_text_is_a_definition_or_is_refused(text: str) -> None:
    for candidate in (text, "protocol x\n" + text, "protocol x\nunit head\nclient " + text):
        refused = None
        try:
            parse(candidate, "x.pdl")
        except RefusedError as error:
            refused = error.what
        assert refused is None or refused.startswith("x.pdl:")
