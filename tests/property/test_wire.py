"""Dropped lines lose and duplicate nothing, and no bytes whatever break the reader."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from virtgrid.core.errors import RefusedError
from virtgrid.wire.answers import Answer, Answers, fingerprint
from virtgrid.wire.lines import LineCutter
from virtgrid.wire.message import BadMessageError, Request, decode, encode
from virtgrid.wire.outbox import Inbox, Note, Outbox, OutOfStepError, Standing

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    with contextlib.suppress(BadMessageError):
        decode(data)


@given(json_values)
def test_any_json_is_a_message_or_refused(value: Any) -> None:
    import json

    with contextlib.suppress(BadMessageError):
        decode(json.dumps(value).encode())


@given(st.dictionaries(st.text(), json_values, max_size=5), st.integers(1, 2**40))
def test_any_parameters_arrive_as_they_were(params: dict[str, Any], number: int) -> None:
    request = Request(method="ASK", params=params, id=number)
    assert decode(encode(request)) == request


@given(
    st.lists(st.binary(max_size=30).map(lambda raw: raw.replace(b"\n", b"").replace(b"\r", b""))), st.data()
)
def test_lines_are_the_same_however_they_are_split(wanted: list[bytes], data: st.DataObject) -> None:
    text = b"".join(line + b"\n" for line in wanted)
    cutter, found, at = LineCutter(), [], 0
    while at < len(text):
        size = data.draw(st.integers(1, len(text) - at))
        found += cutter.feed(text[at : at + size])
        at += size
    assert found == [line for line in wanted if line]
    assert not cutter.rest


class Conversation(RuleBasedStateMachine):
    """A sender and a receiver over lines that drop at any moment, with anything in flight either way.

    What the receiver has taken must always be what was put, in order, without one missing or twice; after the
    sender's death only passing notes may be missing, and none of the durable ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outbox = Outbox(room_bytes=5)
        self.inbox = Inbox()
        self.incarnation, self.base, self.reserved = 1, 0, 8
        self.put: list[tuple[int, bool]] = []
        self.taken: list[int] = []
        self.died_with: set[int] = set()
        self.up = False
        self.cursor = 0
        self.notes: list[Note] = []
        self.acks: list[int] = []

    @rule(durable=st.booleans())
    def tell(self, durable: bool) -> None:
        if not durable and not self.outbox.has_room():
            return
        note = self.outbox.put("note", {}, durable=durable, size_bytes=0 if durable else 1)
        self.put.append((note.number, durable))
        self.reserved = max(self.reserved, note.number + 3)

    @rule()
    def dial(self) -> None:
        if not self.up:
            standing = Standing(
                incarnation=self.incarnation, base=self.base, acknowledged=self.outbox.acknowledged
            )
            self.cursor = self.inbox.hello(standing)
            self.outbox.acknowledge(self.cursor)
            self.up = True

    @rule(limit=st.integers(1, 4))
    def write(self, limit: int) -> None:
        if self.up:
            for note in self.outbox.after(self.cursor, limit=limit):
                self.notes.append(note)
                self.cursor = note.number

    @rule(count=st.integers(1, 5))
    def read(self, count: int) -> None:
        for note in self.notes[:count]:
            if self.inbox.take(note.number):
                self.taken.append(note.number)
            self.acks.append(self.inbox.taken)
        del self.notes[:count]

    @rule(count=st.integers(1, 5))
    def hear(self, count: int) -> None:
        for number in self.acks[:count]:
            self.outbox.acknowledge(number)
        del self.acks[:count]

    @rule(arrived=st.integers(0, 3))
    def drop(self, arrived: int) -> None:
        """Some of what was written arrives, the rest is gone; the same for the acknowledgements."""
        if self.up:
            self.read(arrived)
            self.hear(arrived)
            self.notes, self.acks, self.up = [], [], False

    @rule(arrived=st.integers(0, 3))
    def die(self, arrived: int) -> None:
        """kill -9 of the sender: what it wrote down is all it has."""
        self.drop(arrived)
        durable = self.outbox.durable()
        kept = {note.number for note in durable}
        self.died_with |= {
            number for number, _ in self.put if number > self.inbox.taken and number not in kept
        }
        self.outbox = Outbox.restored(self.reserved, self.outbox.acknowledged, durable)
        self.outbox.room_bytes = 5
        self.base = self.outbox.last
        self.incarnation += 1
        self.reserved = self.outbox.last + 8

    @invariant()
    def nothing_lost_twice_or_out_of_order(self) -> None:
        assert self.taken == sorted(set(self.taken))
        had = set(self.taken)
        upto = self.inbox.taken
        for number, durable in self.put:
            if number <= upto and number not in had:
                assert not durable
                assert number in self.died_with

    def teardown(self) -> None:
        """In the end, with a line that holds, everything arrives."""
        if not self.up:
            self.dial()
        for _ in range(200):
            self.write(4)
            self.read(5)
            self.hear(5)
        self.nothing_lost_twice_or_out_of_order()
        assert self.outbox.empty
        assert set(self.taken) | self.died_with == {number for number, _ in self.put}


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_gap_that_no_death_explains_is_refused() -> None:
    inbox = Inbox()
    inbox.hello(Standing(incarnation=1, base=0, acknowledged=0))
    assert inbox.take(1)
    with pytest.raises(OutOfStepError):
        inbox.take(3)
    assert inbox.take(2)
    assert not inbox.take(1)
    inbox.hello(Standing(incarnation=2, base=10, acknowledged=1))
    assert inbox.take(7)
    assert inbox.take(11)
    with pytest.raises(OutOfStepError):
        inbox.take(13)
    with pytest.raises(OutOfStepError):
        inbox.hello(Standing(incarnation=1, base=0, acknowledged=0))
    assert inbox.missing == 4 + 3


def test_an_acknowledgement_of_what_was_never_sent_is_refused() -> None:
    outbox = Outbox()
    outbox.put("a", {})
    with pytest.raises(OutOfStepError):
        outbox.acknowledge(2)
    assert outbox.acknowledge(1)
    assert not outbox.acknowledge(1)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=60))
def test_a_key_gets_one_answer_and_one_question(asked: list[tuple[int, int]]) -> None:
    answers, done = Answers(limit=4), dict[str, int]()
    for key_number, question in asked:
        key, mark = f"key{key_number}", fingerprint("M", {"q": question})
        try:
            found = answers.find(key, mark)
        except RefusedError:
            assert done[key] != question
            continue
        if found is None:
            answers.keep(key, Answer(fingerprint=mark, result=question))
            done[key] = question
        else:
            assert found.result == question == done[key]
    assert len(answers.items()) <= 4
