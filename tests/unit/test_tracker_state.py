"""A tracker's state travels with the guest: the known is known on arrival, the doubtful is unknown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tracker_wire import GUEST_MAC, Talk, get, response

from virtgrid.core.errors import RefusedError
from virtgrid.tracker.decode import ACK
from virtgrid.tracker.definition import builtin, parse
from virtgrid.tracker.state import VERSION
from virtgrid.tracker.tracker import Tracker
from virtgrid.tracker.views import Verdict

MIB = 1 << 20


def moved(
    talk: Talk, *, after_s: float = 0.0, tracker: Tracker | None = None, unwatched: bool = False
) -> Talk:
    """The same conversation, seen by another tracker that got the first one's state."""
    target = tracker or Tracker(guest_macs=[GUEST_MAC])
    target.import_state(talk.tracker.export_state(talk.at_s), talk.at_s + after_s, unwatched=unwatched)
    return replace(talk, tracker=target, at_s=talk.at_s + after_s, sent=[])


@pytest.fixture
def talk() -> Talk:
    return Talk(Tracker(guest_macs=[GUEST_MAC])).open().ask(get()).answer(response(2) + b"ok")


def test_a_keep_alive_connection_is_known_on_arrival(talk: Talk) -> None:
    there = moved(talk, after_s=5)
    view = there.view
    assert (view.suitable, view.state, view.protocol, view.requests) == (True, "idle", "http", 1)
    assert there.tracker.server_ports == {80}
    there.ask(get("/next"))
    assert there.view.reason == "waiting for the response to GET /next"
    there.answer(response(3) + b"x")
    assert there.view.reason == "response, 2 B left"
    there.answer(b"yz")
    view = there.view
    assert (view.suitable, view.requests, view.responses, view.gaps) == (True, 2, 2, 0)


def test_a_client_that_waits_still_waits_on_arrival(talk: Talk) -> None:
    talk.ask(get("/slow") + get("/2"))
    there = moved(talk, after_s=60)
    assert there.view.reason == "waiting for the response to GET /slow (1 more waiting)"
    assert there.tracker.unsuitable == 1
    there.answer(response(0) + response(0))
    assert there.view.suitable


def test_a_large_transfer_goes_on(talk: Talk) -> None:
    talk.ask(get("/iso")).answer(response(8 * MIB) + b"x" * 1000)
    there = moved(talk)
    assert (there.view.state, there.view.suitable) == ("moving", True)
    there.answer(b"x" * (8 * MIB - 1000), 60_000)
    assert (there.view.state, there.view.gaps) == ("idle", 0)


def test_half_a_head_goes_on(talk: Talk) -> None:
    there = moved(talk.ask(get("/half")[:10]))
    assert not there.view.suitable
    there.ask(get("/half")[10:])
    assert there.view.reason == "waiting for the response to GET /half"


def test_the_time_of_the_move_is_nobodys_silence() -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=22).open().answer(b"SSH-2.0-x\r\n").later(1)
    there = moved(talk, after_s=100)
    assert not there.view.suitable
    assert there.later(1.1).view.suitable


@pytest.mark.parametrize("by", [60, 100_000])
def test_a_request_that_was_missed_makes_it_unknown_when_its_answer_comes(talk: Talk, by: int) -> None:
    there = moved(talk)
    there.client_seq += by
    there.put(False, there.server_seq, there.client_seq, ACK)
    assert there.view.verdict is Verdict.UNKNOWN
    assert there.view.reason == "state unknown (it moved on while nobody looked)"
    there.later(25)
    assert not there.view.suitable
    there.answer(response(0))
    assert there.view.suitable


def test_an_answer_that_was_missed_makes_it_unknown(talk: Talk) -> None:
    there = moved(talk)
    there.server_seq += 5000
    there.put(False, there.server_seq, there.client_seq, ACK, b"x" * 100)
    assert there.view.verdict is Verdict.UNKNOWN


def test_another_connection_on_the_same_ports_is_not_taken_for_the_old_one(talk: Talk) -> None:
    there = moved(talk)
    there.client_seq = (there.client_seq - (1 << 30)) & 0xFFFFFFFF
    there.put(True, there.client_seq, there.server_seq, ACK, b"x" * 100)
    assert there.view.verdict is Verdict.UNKNOWN


def test_bytes_sent_again_are_no_reason_for_doubt(talk: Talk) -> None:
    there = moved(talk)
    for frame in talk.sent[-2:]:
        there.tracker.feed(*frame, there.at_s)
    assert there.view.suitable
    assert there.ask(get("/next")).answer(response(0)).view.suitable


def test_what_is_missed_inside_a_body_is_arithmetic(talk: Talk) -> None:
    talk.ask(get("/iso")).answer(response(8 * MIB) + b"x" * 1000)
    there = moved(talk)
    there.server_seq += MIB
    there.answer(b"x" * 1000)
    assert (there.view.state, there.view.gaps) == ("moving", 0)


def test_a_mail_being_sent_goes_on() -> None:
    talk = (
        Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=25).open().answer(b"220 x\r\n").ask(b"EHLO a\r\n")
    )
    talk.answer(b"250 y\r\n").ask(b"DATA\r\n")
    there = moved(talk).answer(b"354 go\r\n").ask(b"x\r\n.")
    assert not there.view.suitable
    again = moved(there).ask(b"\r\n")
    assert again.view.reason == "waiting for the response to DATA"
    assert again.answer(b"250 ok\r\n").later(0.3).view.suitable


def test_a_data_connection_stays_with_its_control_connection() -> None:
    tracker = Tracker(guest_macs=[GUEST_MAC])
    control = (
        Talk(tracker, server_port=21).open().answer(b"220 x\r\n").ask(b"USER a\r\n").answer(b"230 x\r\n")
    )
    control.ask(b"EPSV\r\n").answer(b"229 x (|||5000|)\r\n")
    data = Talk(tracker, server_port=5000, client_port=5001).open()
    control.ask(b"EPSV\r\n").answer(b"229 x (|||5002|)\r\n")
    control.ask(b"RETR x\r\n").answer(b"150 x (9000000 bytes)\r\n")
    data.answer(b"x")
    assert data.view.state == "moving"
    there = Tracker(guest_macs=[GUEST_MAC])
    assert there.import_state(tracker.export_state(100.0), 100.0) == 2
    assert there.snapshot(100.0).connections == tracker.snapshot(100.0).connections
    next_one = Talk(there, server_port=5002, client_port=5003).open()
    assert next_one.view.protocol == "ftp-data"


def test_who_waited_before_nobody_watched_is_not_called_idle_after_three_seconds(talk: Talk) -> None:
    there = moved(talk.ask(get("/slow")), after_s=20, unwatched=True)
    assert there.view.reason == "state unknown (nobody watched it for a while)"
    there.later(29.9)
    assert not there.view.suitable
    there.answer(response(0))
    assert (there.view.state, there.view.suitable, there.view.responses) == ("idle", True, 2)


@pytest.mark.parametrize("asked", [False, True])
def test_after_nobody_watched_a_connection_is_known_once_it_is_seen_where_it_was(
    talk: Talk, asked: bool
) -> None:
    there = moved(talk, after_s=20, unwatched=True)
    assert there.view.verdict is Verdict.UNKNOWN, "it may have asked meanwhile"
    if asked:
        there.lose(to_server=True, length=40).answer(response(5))
        assert (there.view.reason, there.view.gaps) == ("response, 5 B left", 1)
    else:
        there.later(1).ask(get("/2"))
        assert there.view.reason == "waiting for the response to GET /2"
        there.answer(response(0))
        assert there.view.suitable
        assert there.view.gaps == 0


def test_a_connection_that_ended_while_nobody_watched_does_not_stay(talk: Talk) -> None:
    there = moved(talk.ask(get("/slow")), unwatched=True)
    there.later(30.1)
    assert there.view.suitable
    assert there.view.reason == "no traffic for 30.1 s (nobody watched it for a while)"
    there.later(30)
    assert not there.is_open


def test_a_large_transfer_that_nobody_watched_is_one_when_it_goes_on(talk: Talk) -> None:
    talk.ask(get("/iso")).answer(response(8 * MIB) + b"x" * 1000)
    there = moved(talk, unwatched=True)
    assert not there.view.suitable
    there.lose(to_server=False, length=MIB).answer(b"x" * 1000)
    assert (there.view.state, there.view.suitable) == ("moving", True)


def test_what_is_followed_already_is_not_replaced(talk: Talk) -> None:
    tracker = Tracker(guest_macs=[GUEST_MAC])
    here = replace(talk, tracker=tracker, sent=[]).ask(get("/new"))
    assert tracker.import_state(talk.tracker.export_state(talk.at_s), talk.at_s) == 0
    assert here.view.reason == "waiting for the response to GET /new"


def test_the_number_of_connections_stays_bounded() -> None:
    tracker = Tracker()
    for port in range(1000, 1020):
        Talk(tracker, client_port=port).open()
    there = Tracker(connections_max=5)
    assert there.import_state(tracker.export_state(100.0), 100.0) == 5
    assert there.total == there.unsuitable == 5


def test_a_state_of_other_rules_is_unknown(talk: Talk) -> None:
    http = next(d for d in builtin() if d.name == "http")
    other = replace(http, digest="0" * 16)
    there = moved(talk, tracker=Tracker([other], guest_macs=[GUEST_MAC]))
    assert there.view.verdict is Verdict.UNKNOWN
    assert there.ask(get("/next")).view.reason == "waiting for the response to GET /next"


def test_the_digest_is_the_texts() -> None:
    text = "protocol x\nunit line\ndetect client /^A/\nclient /^/ -> push a\nserver /^/ -> pop\n" + "".join(
        f"pause {s} hold\n" for s in ("new", "idle", "busy", "moving", "opaque")
    )
    assert parse(text, "a").digest == parse(text, "b").digest != parse(text + "#", "a").digest


def test_an_idle_connection_takes_few_bytes(talk: Talk) -> None:
    assert len(talk.tracker.export_state(talk.at_s)) < 400


GOOD = {"version": VERSION, "connections": [{"key": "0a0000090a0000019c560050", "c": {}, "s": {}}]}


@pytest.mark.parametrize(
    "state",
    [
        b"", b"\xff", b"[]", b"{}", b"[" * 100_000,
        json.dumps(GOOD | {"version": VERSION + 1}).encode(),
        json.dumps(GOOD | {"connections": {}}).encode(),
        json.dumps(GOOD | {"connections": [1]}).encode(),
        *(
            json.dumps({"version": VERSION, "connections": [GOOD["connections"][0] | bad]}).encode()
            for bad in (
                {"key": "00"}, {"key": "zz" * 12}, {"key": None}, {"requests": -1}, {"requests": 1.5},
                {"requests": True}, {"opaque": 1}, {"label": "x\n"}, {"label": "x" * 500}, {"opened_s": -1},
                {"last_s": "now"}, {"queue": [{"tag": "00" * 100}]}, {"queue": 5}, {"queue": [{}] * 5000},
                {"c": {"mode": 99}}, {"c": {"mode": "HEAD"}}, {"c": {"nxt": 1 << 32}}, {"c": {"buf": "0"}},
                {"c": {"buf": "00" * 5000}}, {"c": {"ask": ["never", ""]}}, {"c": {"exchange": 0}},
                {"owner": 7}, {"expects": ["00"] * 100}, {"protocol": [1, 2, 3]}, {"s": []},
            )
        ),
    ],
)  # fmt: skip
def test_what_is_no_state_is_refused_and_nothing_is_taken_over(state: bytes) -> None:
    tracker = Tracker()
    with pytest.raises(RefusedError, match="state cannot be read"):
        tracker.import_state(state, 0.0)
    assert tracker.total == 0
