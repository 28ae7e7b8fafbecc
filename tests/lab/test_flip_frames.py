"""Flipping a guest's frames between two bridges, without libvirt: where they go, and that it is undone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from migrating import until
from pair import BRIDGE, GUEST, PAYLOAD, TAP, Pair, Tap, at, rules, send

from virtgrid.migration import flip as flips
from virtgrid.migration import flipper as flippers
from virtgrid.migration.flipper import Flipper
from virtgrid.migration.outcome import Place
from virtgrid.net import flip, netns
from virtgrid.net.flip import Way
from virtgrid.net.forwarding import Entry, entry, set_entry
from virtgrid.net.link import Links
from virtgrid.net.usher import RETURN_RANK
from virtgrid.virt.connection import QemuEvent

pytestmark = pytest.mark.lab

FRAME = bytes.fromhex(GUEST.replace(":", "")) + b"\x02client" + PAYLOAD
SPEAKING = b"\xff" * 6 + bytes.fromhex(GUEST.replace(":", "")) + b"\x08\x06" + bytes(46)


class Moved:
    """A guest that runs at the left and is on its way to the right, which knows it at the segment."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        # It has run for long when the segment comes: nobody takes it for one on its way to the left.
        self.here = Tap(pair.left)
        self.here.send(SPEAKING)
        self.port = pair.both_up()
        self.way = Way(bridge=BRIDGE, port=self.port, tap=TAP, mac=GUEST)
        self.here.send(SPEAKING)
        until(lambda: self.points_to(pair.right) == self.port, "the address learned", deadline_s=10)
        self.there = Tap(pair.right)
        until(lambda: rules(pair.right, self.port), "the guest ushered in", deadline_s=10)
        self.here.read()  # what the segment's coming up sent to everybody

    def points_to(self, where: str) -> str | None:
        """The interface a host's bridge sends the guest's frames to."""

        def look(links: Links) -> str | None:
            found = entry(links, GUEST, links.require(BRIDGE))
            return next((link.name for link in links.all() if found and link.index == found.port), None)

        return at(where, look)

    def turn(self) -> None:
        at(self.pair.left, lambda links: flip.turn(links, self.way))

    def untouched(self) -> bool:
        """Whether the left bridge is as it was before."""
        found = at(self.pair.left, lambda links: entry(links, GUEST, links.require(BRIDGE)))
        plain = found is not None and not found.sticky and not found.static
        returning = any(rule.rank == RETURN_RANK for rule in rules(self.pair.left, self.port))
        return plain and not returning and self.points_to(self.pair.left) == TAP


@pytest.fixture
def moved(pair: Pair) -> Iterator[Moved]:
    moved = Moved(pair)
    yield moved
    os.close(moved.here.end)
    os.close(moved.there.end)


def test_flipped_frames_of_either_side_wait_at_the_destinations_tap(moved: Moved) -> None:
    for side in (moved.pair.left, moved.pair.right):
        send(side, FRAME)
        assert until(moved.here.queued, "before the flip: here", deadline_s=10) == [FRAME]
    assert moved.there.queued() == []
    moved.turn()
    for side in (moved.pair.left, moved.pair.right):
        send(side, FRAME)
        assert until(moved.there.queued, "after it: there", deadline_s=10) == [FRAME]
    assert moved.here.queued() == []


def test_a_late_frame_of_the_guest_does_not_move_it_back(moved: Moved) -> None:
    moved.turn()
    moved.here.send(SPEAKING)
    assert moved.points_to(moved.pair.left) == moved.port
    at(moved.pair.left, lambda links: flip.relax(links, moved.way))
    moved.here.send(SPEAKING)  # it goes on here, then
    assert moved.points_to(moved.pair.left) == TAP


def test_put_back_is_as_before_and_may_be_said_twice(moved: Moved) -> None:
    assert not at(moved.pair.left, lambda links: flip.put_back(links, moved.way)), "nothing was turned yet"
    moved.turn()
    assert at(moved.pair.left, lambda links: flip.put_back(links, moved.way))
    assert moved.untouched()
    assert not at(moved.pair.left, lambda links: flip.put_back(links, moved.way))
    send(moved.pair.left, FRAME)
    assert until(moved.here.queued, "the frame, here again", deadline_s=10) == [FRAME]


def test_an_entry_that_was_put_by_hand_stays_one(moved: Moved) -> None:
    def static(links: Links) -> None:
        set_entry(links, GUEST, Entry(port=links.require(TAP), static=True))

    at(moved.pair.left, static)
    moved.turn()
    at(moved.pair.left, lambda links: flip.put_back(links, moved.way))
    found = at(moved.pair.left, lambda links: entry(links, GUEST, links.require(BRIDGE)))
    assert found is not None
    assert found.static


def test_settled_the_bridge_learns_as_ever(moved: Moved) -> None:
    moved.turn()
    assert at(moved.pair.left, lambda links: flip.settle(links, moved.way))
    found = at(moved.pair.left, lambda links: entry(links, GUEST, links.require(BRIDGE)))
    assert found is not None
    assert found == Entry(port=found.port), "neither sticky nor static"
    assert moved.points_to(moved.pair.left) == moved.port
    assert not at(moved.pair.left, lambda links: flip.settle(links, moved.way))


def test_what_the_tap_swallowed_is_sent_again_and_what_was_read_is_not(moved: Moved) -> None:
    with Links(moved.pair.left) as links:
        swallowed = netns.run_in(moved.pair.left, lambda: flip.Swallowed(links, moved.way))
        try:
            for number in range(40):
                send(moved.pair.left, FRAME + bytes([number]))
                swallowed.take()
            for _ in range(30):
                assert os.read(moved.here.end, 2048).startswith(FRAME)
            # Here the guest stops, with ten frames unread; two more come before the flip.
            for number in (40, 41):
                send(moved.pair.left, FRAME + bytes([number]))
            moved.turn()
            assert swallowed.send_again() in (12, 14), "those, and at most two that may have waited before"
            assert swallowed.send_again() == 0
        finally:
            swallowed.close()
    there = {frame[-1] for frame in until(moved.there.queued, "what was swallowed", deadline_s=10)}
    assert there >= set(range(30, 42))
    assert there <= set(range(28, 42))


def test_what_waited_before_the_counting_is_found_out_by_looking(moved: Moved) -> None:
    for number in range(5):
        send(moved.pair.left, FRAME + bytes([number]))
    with Links(moved.pair.left) as links:
        swallowed = netns.run_in(moved.pair.left, lambda: flip.Swallowed(links, moved.way))
        try:
            assert len(moved.here.read()) >= 5
            swallowed.look()
            for number in range(5, 15):
                send(moved.pair.left, FRAME + bytes([number]))
            moved.turn()
            assert swallowed.send_again() == 10
        finally:
            swallowed.close()
    there = [frame[-1] for frame in until(moved.there.queued, "what was swallowed", deadline_s=10)]
    assert there == list(range(5, 15))


def test_restoring_does_what_is_right_for_where_the_guest_is(moved: Moved) -> None:
    def restore(place: Place) -> str | None:
        return netns.run_in(moved.pair.left, lambda: flips.restore(moved.way, place))

    moved.turn()
    assert restore(Place.SOURCE)
    assert moved.untouched()
    assert restore(Place.SOURCE) is None
    moved.turn()
    assert restore(Place.DESTINATION)
    assert restore(Place.DESTINATION) is None


# --- the process's own decisions --------------------------------------------------------------


def _flipping(moved: Moved, monkeypatch: pytest.MonkeyPatch, steps: Callable[[Flipper], Any]) -> list[Any]:
    """Run steps of a flipper at the left, inside its network; what it told."""
    told: list[Any] = []
    monkeypatch.setattr(flippers, "_tell", lambda **fields: told.append(fields))

    async def run(links: Links) -> None:
        await steps(Flipper(links, moved.way, "the guest"))

    def work() -> None:
        with Links() as links:
            asyncio.run(run(links))

    netns.run_in(moved.pair.left, work)
    return told


def _event(name: str, uuid: str = "the guest") -> QemuEvent:
    return QemuEvent(uuid=uuid, name=name, clock_s=0.0, received_s=0.0, details="")


def test_only_the_stop_it_was_armed_for_flips(moved: Moved, monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(flipper: Flipper) -> None:
        flipper.on_event(_event("STOP"))  # somebody pauses it
        flipper.on_event(_event("RESUME"))
        flipper.arm()
        flipper.on_event(_event("STOP", "another guest"))
        flipper.disarm()

    assert _flipping(moved, monkeypatch, steps) == [{"state": "armed"}]
    assert moved.untouched()


def test_a_guest_that_goes_on_here_has_its_frames_back_at_once(
    moved: Moved, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def steps(flipper: Flipper) -> None:
        flipper.arm()
        flipper.on_event(_event("STOP"))
        assert moved.points_to(moved.pair.left) == moved.port
        flipper.on_event(_event("RESUME"))
        await flipper.see_it_through(0.0)
        await asyncio.sleep(0.1)  # what was to be done after the stop does not turn it again

    told = _flipping(moved, monkeypatch, steps)
    assert [one["state"] for one in told] == ["armed", "put back"]
    assert moved.untouched()


def test_without_a_parent_a_guest_that_is_gone_is_taken_to_have_arrived(
    moved: Moved, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def steps(flipper: Flipper) -> None:
        flipper.arm()
        flipper.on_event(_event("STOP"))
        await flipper.see_it_through(0.1)

    told = _flipping(moved, monkeypatch, steps)
    assert [one["state"] for one in told] == ["armed", "flipped"]
    assert not any(rule.rank == RETURN_RANK for rule in rules(moved.pair.left, moved.port))
    assert moved.points_to(moved.pair.left) == moved.port


# --- draining ---------------------------------------------------------------------------------


def _numbered(number: int) -> bytes:
    return FRAME + bytes([number])


def _numbers(frames: list[bytes]) -> list[int]:
    return [frame[-1] for frame in frames if frame.startswith(FRAME)]


def test_drained_new_frames_wait_there_and_the_stop_needs_no_turning(
    moved: Moved, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def steps(flipper: Flipper) -> None:
        flipper.drain(0.1)
        assert moved.points_to(moved.pair.left) == moved.port
        for number in range(5):
            send(moved.pair.left, _numbered(number))
        moved.here.send(SPEAKING)  # it goes on answering, and is not taken to be here for that
        send(moved.pair.right, _numbered(5))
        flipper.on_event(_event("STOP"))
        await asyncio.sleep(0.1)
        assert moved.points_to(moved.pair.left) == moved.port

    told = _flipping(moved, monkeypatch, steps)
    assert [one["state"] for one in told] == ["armed", "draining", "flipped"]
    found: set[int] = set()

    def all_there() -> bool:
        found.update(_numbers(moved.there.queued()))
        return found == set(range(6))

    until(all_there, "all of them at the destination", deadline_s=10)
    assert moved.here.queued() == []


@pytest.mark.parametrize("how", ["too late", "ended"])
def test_a_guest_that_does_not_stop_after_its_drain_is_given_back_all_in_order(
    moved: Moved, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "too late":
        monkeypatch.setattr(flippers, "_STOP_LATE_S", 0.5)

    async def steps(flipper: Flipper) -> None:
        flipper.drain(0.0)
        for number in range(20):
            send(moved.pair.right if number % 2 else moved.pair.left, _numbered(number))
        until(lambda: len(waiting) >= 20 or waiting.extend(_numbers(moved.there.queued())), "elsewhere")
        if how == "ended":
            flipper.end()
        else:
            await flipper.see_it_through(0.0)
        assert moved.untouched()
        send(moved.pair.left, _numbered(20))

    waiting: list[int] = []
    told = _flipping(moved, monkeypatch, steps)
    assert [one["state"] for one in told] == ["armed", "draining", "given back"]
    assert told[-1]["frames"] == 20
    found: list[int] = []

    def all_here() -> bool:
        found.extend(_numbers(moved.here.queued()))
        return len(found) >= 21

    until(all_here, "all of them at the source", deadline_s=10)
    left, right = [n for n in found if n % 2 == 0], [n for n in found if n % 2]
    assert (left, right) == (list(range(0, 21, 2)), list(range(1, 20, 2))), "each side's in its order"


def test_a_stop_after_the_frames_were_given_back_flips_all_the_same(
    moved: Moved, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def steps(flipper: Flipper) -> None:
        flipper.drain(0.0)
        flipper.end()
        flipper.on_event(_event("STOP"))
        await asyncio.sleep(0.1)

    told = _flipping(moved, monkeypatch, steps)
    assert [one["state"] for one in told] == ["armed", "draining", "given back", "flipped"]
    assert moved.points_to(moved.pair.left) == moved.port


def test_what_waited_elsewhere_is_given_to_a_guest_that_goes_on_here(
    moved: Moved, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def steps(flipper: Flipper) -> None:
        flipper.arm()
        flipper.on_event(_event("STOP"))
        for number in range(10):
            send(moved.pair.left, _numbered(number))
        assert until(moved.there.queued, "elsewhere", deadline_s=10)
        flipper.on_event(_event("RESUME"))

    told = _flipping(moved, monkeypatch, steps)
    assert told[-1]["state"] == "put back"
    assert told[-1]["frames"] >= 10
    assert _numbers(moved.here.queued())[-10:] == list(range(10))
