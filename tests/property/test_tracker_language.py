"""Any definition is refused with its line or is harmless: whatever it says and whatever comes then."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tracker_wire import Talk

from virtgrid.core.errors import RefusedError
from virtgrid.tracker.definition import Definition, parse
from virtgrid.tracker.draw import as_svg, as_text
from virtgrid.tracker.tracker import Tracker

STATES = ("new", "idle", "busy", "moving", "waiting")
SETTINGS = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])

patterns = st.sampled_from(
    [
        "/^/",
        "/^$/",
        "/^A/",
        "/^B(?P<n>[0-9]{1,15})/",
        "/^(?P<t>[A-Z])/ .. /(?P<n>[0-9])$/",
        "/^(?P<t>[a-c]{1,3})-/",
        "/^(?P<p>[0-9]{1,3}),(?P<n>[0-9]{1,3})/",
        "/.*/",
        "/x/ .. /y/",
    ]
)
client_actions = st.sampled_from(
    [
        "push a",
        "push b t",
        "push t",
        "note",
        "body bytes n",
        "body until .\\r\\n",
        "body until \\r\\n",
        "more",
        "body none",
        "ask line",
        "ask lines",
        "ask bytes n",
        "ask until \\r\\n.\\r\\n",
        "ask until A",
        "waiting",
        "transfer",
        "size n",
        "volume n",
        "volume 9",
        "add n",
        "expect active n",
        "expect passive p n",
        "become opaque",
        "become tls",
        "body bytes len | none",
        "body chunked len",
        "await len A",
    ]
)
server_actions = st.sampled_from(
    [
        "pop",
        "pop t",
        "drop",
        "drop t",
        "reply",
        "note",
        "go",
        "upto t",
        "body bytes n",
        "body until .\\r\\n",
        "more",
        "body close",
        "body bytes len | close",
        "body chunked len | none",
        "size n",
        "volume n",
        "add n",
        "expect active p n",
        "expect passive n",
        "become opaque",
        "become tls",
    ]
)
guards = st.sampled_from(["", "", "", " if a", " if b greeting", " if greeting"])
lines = st.lists(
    st.one_of(
        st.builds(
            lambda more, p, a: f"client {more}{p} -> {' ; '.join(a)}",
            st.sampled_from(["", "", "more "]),
            patterns,
            st.lists(client_actions, min_size=1, max_size=3),
        ),
        st.builds(
            lambda more, p, g, a: f"server {more}{p}{g} -> {' ; '.join(a)}",
            st.sampled_from(["", "", "more "]),
            patterns,
            guards,
            st.lists(server_actions, min_size=1, max_size=3),
        ),
    ),
    max_size=12,
)
payloads = st.one_of(
    st.binary(max_size=30),
    st.lists(
        st.sampled_from(
            [
                b"A",
                b"B9",
                b"A 5",
                b"abc-",
                b"abc",
                b"abc x",
                b"1,2",
                b"",
                b".",
                b"Len: 7",
                b"Len: chunked",
                b"5",
                b"hello",
                b"0",
                b"xy",
                b"xxxxx y 3",
                b"\x16\x03\x01\x00\x01",
            ]
        ),
        max_size=6,
    ).map(lambda parts: b"\r\n".join(parts) + b"\r\n"),
)


def accepted(unit: str, greeting: bool, rules: list[str]) -> Definition | None:
    """The definition, without the lines that are refused."""
    head = ["protocol x", f"unit {unit} max 64", "field len len", "detect client /^[A-Za-z0-9]/"]
    head += ["detect server /^[A-Za-z0-9]/", *(["greeting"] if greeting else [])]
    head += [
        f"pause {s} {'hold' if s == 'busy' else 'ok'}" for s in ("new", "idle", "busy", "moving", "waiting")
    ]
    head += ["pause opaque quiet 1s"]
    tail = [
        "client /^/ -> push z",
        "client more /^C/ -> body none",
        "server /^/ -> pop",
        "server more /^C/ -> more",
    ]
    if unit == "head":
        tail = [line for line in tail if " more " not in line]
    text = "\n".join([*head, *rules, *tail])
    for _ in range(len(rules) + 1):
        try:
            return parse(text, "x.pdl")
        except RefusedError as error:
            number = int(error.what.split(":")[1])
            kept = text.split("\n")
            if number == len(kept):
                return None
            text = "\n".join([*kept[: number - 1], "#", *kept[number:]])
    return None


@SETTINGS
@given(
    unit=st.sampled_from(["line", "line", "head"]),
    greeting=st.booleans(),
    rules=lines,
    traffic=st.lists(st.tuples(st.booleans(), payloads, st.integers(0, 9)), max_size=25),
    size=st.sampled_from([1, 3, 1448]),
)
def test_a_definition_that_is_accepted_is_harmless(
    unit: str, greeting: bool, rules: list[str], traffic: list[tuple[bool, bytes, int]], size: int
) -> None:
    definition = accepted(unit, greeting, rules)
    if definition is None:
        return
    assert as_text(definition)
    assert as_svg(definition)
    tracker = Tracker([definition], large_bytes=50)
    talk = Talk(tracker, server_port=7777).open()
    for to_server, data, fate in traffic:
        (talk.ask if to_server else talk.answer)(data, size)
        if fate == 0:
            talk.lose(to_server=to_server, length=7)
        elif fate == 1:
            written = tracker.export_state(talk.at_s)
            tracker = talk.tracker = Tracker([definition], large_bytes=50)
            tracker.import_state(written, talk.at_s)
        assert tracker.snapshot(talk.at_s).unsuitable == tracker.unsuitable
        assert all(len(s.buf) < 20_000 for s in tracker.streams.values())
    assert len(tracker._machine.expected) <= 4
    assert tracker.snapshot(talk.at_s + 1e5).total <= 1
