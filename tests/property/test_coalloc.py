"""However messages are lost, doubled and late, whoever crashes and whatever expires: all or nothing,
nothing twice, nothing left over.

Coordinators and providers run on the real tables over a network that does anything, and a clock of the
test's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.grid.coalloc import coordinator as grc
from virtgrid.grid.coalloc import provider as prm
from virtgrid.grid.messages.coalloc import (
    Command,
    Grant,
    Hold,
    HoldState,
    Paths,
    ReservationState,
    Window,
)
from virtgrid.wire.answers import fingerprint

UNITS = 2
TTL_S = 30
START_S = 1_000_000


@dataclass
class Provider:
    """A provider with two units, of which a hold takes one. Its records survive a crash, it has nothing
    else.
    """

    name: str
    offset_s: int
    records: dict[str, prm.Record] = field(default_factory=dict)

    def keeping(self, now_s: int) -> list[prm.Record]:
        return [one for one in self.records.values() if prm.TABLE[prm.at(one, now_s)].keeps]

    def sweep(self, now_s: int) -> None:
        for key, record in list(self.records.items()):
            state = prm.at(record, now_s)
            gone = record.gone_at_s if record.gone_at_s is not None else now_s
            if not prm.TABLE[state].keeps:
                record = self.records[key] = replace(record, state=state, gone_at_s=gone)
            if prm.forgettable(record, now_s):
                del self.records[key]

    def answer(self, command: Command, key: str, hold: Hold, now_s: int) -> None:
        """Do it. Errors: RefusedError, NotFoundError."""
        known = self.records.get(key)
        if command is Command.HOLD:
            self.hold(known, key, hold, now_s)
        elif known is not None:
            self.records[key] = replace(known, state=prm.after_command(known, command, now_s))
            self.sweep(now_s)
        elif command is Command.COMMIT:
            raise NotFoundError("there is no such hold")

    def hold(self, known: prm.Record | None, key: str, hold: Hold, now_s: int) -> None:
        print_ = fingerprint("HOLD", hold.model_dump())
        if known is not None:
            prm.require_same(known, print_, "grc")
            prm.after_command(known, Command.HOLD, now_s)
            return
        prm.require_timely(hold, now_s)
        self.sweep(now_s)
        window = hold.window
        taken = {
            one.grant.segment
            for one in self.keeping(now_s)
            if one.window.begins_at_s < window.ends_at_s and window.begins_at_s < one.window.ends_at_s
        }
        free = [unit for unit in range(1, UNITS + 1) if unit not in taken]
        if not free:
            raise RefusedError("all units are taken")
        self.records[key] = prm.Record(
            key=key,
            print=print_,
            owner="grc",
            reservation=hold.reservation,
            window=window,
            expires_at_s=now_s + hold.ttl_s,
            state=HoldState.HELD,
            grant=Grant(segment=free[0]),
        )


@dataclass(frozen=True)
class Message:
    """On its way: a command, or what was answered to it (answer: None for done, else the refusal)."""

    id: str
    party: str
    command: Command
    hold: Hold
    answered: bool = False
    refusal: str | None = None


class Fate(Enum):
    """What becomes of a message. Most arrive."""

    ARRIVES = "arrives"
    ARRIVES_TOO = "arrives, too"
    TWICE = "arrives, and a copy later"
    LATE = "later"
    LOST = "lost"


class Grid(RuleBasedStateMachine):
    """One coordinator's process with its disk, three providers, and the air between them."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = START_S
        self.providers: dict[str, Provider] = {}
        self.disk: dict[str, grc.Coordination] = {}
        self.mind: dict[str, grc.Coordination] = {}
        self.holds: dict[str, dict[str, Hold]] = {}
        self.air: list[Message] = []
        self.told: dict[str, ReservationState] = {}
        self.cancelled: set[str] = set()

    @initialize(offsets=st.lists(st.integers(-40, 40), min_size=3, max_size=3))
    def build(self, offsets: list[int]) -> None:
        self.providers = {
            name: Provider(name, offset) for name, offset in zip(("a", "b", "n"), offsets, strict=True)
        }

    def clock(self, provider: Provider) -> int:
        return self.now_s + provider.offset_s

    # -- the user ------------------------------------------------------------------------------

    @precondition(lambda self: len(self.disk) < 4)
    @rule(
        begins=st.sampled_from([0, 100, 150]),
        lasts=st.sampled_from([60, 200, 10_000]),
        parties=st.sets(st.sampled_from("abn"), min_size=2),
    )
    def reserve(self, begins: int, lasts: int, parties: set[str]) -> None:
        id_ = f"r{len(self.disk)}"
        window = Window(begins_at_s=self.now_s + begins, ends_at_s=self.now_s + begins + lasts)
        self.holds[id_] = {
            party: Hold(
                key=f"key-{id_}-{party}",
                reservation=id_,
                window=window,
                ttl_s=TTL_S,
                asked_at_s=self.now_s,
                wanted=Paths(sites=("a", "b")),
            )
            for party in sorted(parties)
        }
        self.write(id_, grc.begin(self.holds[id_]))

    def write(self, id_: str, after: grc.Coordination) -> None:
        self.mind[id_] = self.disk[id_] = after

    def choose(self, data: st.DataObject, among: Any) -> Any:
        return data.draw(st.sampled_from(sorted(among)))

    @precondition(lambda self: self.mind)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id_ = self.choose(data, self.mind)
        self.mind[id_] = grc.happened(self.mind[id_], grc.Event.CANCELLED, "cancelled")
        self.cancelled.add(id_)

    @precondition(lambda self: self.mind)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        """The user asks how it stands. What is told is on the disk."""
        id_ = self.choose(data, self.mind)
        self.disk[id_] = self.mind[id_]
        self.told[id_] = self.mind[id_].state

    # -- the coordinator -----------------------------------------------------------------------

    @precondition(lambda self: self.mind)
    @rule(
        data=st.data(),
        there=st.lists(st.sampled_from(Fate), min_size=3, max_size=3),
        back=st.lists(st.sampled_from(Fate), min_size=3, max_size=3),
    )
    def talk(self, data: st.DataObject, there: list[Fate], back: list[Fate]) -> None:
        """Write down, then say what is to be said (again), to everybody at once."""
        before, self.air = self.air, []
        self.speak(self.choose(data, self.mind))
        for fates in (there, back):
            said, self.air = self.air, []
            for message, fate in zip(said, fates, strict=False):
                if fate is not Fate.LOST and fate is not Fate.LATE:
                    self.arrive(message)
                if fate in (Fate.LATE, Fate.TWICE):
                    before.append(message)
        self.air = before

    def speak(self, id_: str) -> None:
        self.disk[id_] = self.mind[id_]
        for party, command in grc.todo(self.mind[id_]).items():
            self.air.append(Message(id_, party, command, self.holds[id_][party]))

    @precondition(lambda self: self.mind)
    @rule(data=st.data())
    def give_up_waiting(self, data: st.DataObject) -> None:
        id_ = self.choose(data, self.mind)
        party = self.choose(data, self.holds[id_])
        self.mind[id_] = grc.silent(self.mind[id_], party, "did not answer")

    @rule()
    def restart(self) -> None:
        """kill -9: what was not written down was never thought."""
        self.mind = {
            id_: grc.happened(kept, grc.Event.RESTARTED, "restarted") for id_, kept in self.disk.items()
        }

    def hear(self, message: Message) -> None:
        now = self.mind[message.id]
        if message.refusal is None:
            after = grc.did(now, message.party, message.command)
        else:
            after = grc.refused(now, message.party, message.command, message.refusal)
        self.mind[message.id] = after

    # -- the air -------------------------------------------------------------------------------

    @precondition(lambda self: self.air)
    @rule(data=st.data(), twice=st.booleans())
    def deliver(self, data: st.DataObject, twice: bool) -> None:
        at = data.draw(st.integers(0, len(self.air) - 1))
        message = self.air[at] if twice else self.air.pop(at)
        self.arrive(message)

    def arrive(self, message: Message) -> None:
        if message.answered:
            self.hear(message)
            return
        provider = self.providers[message.party]
        refusal = None
        try:
            provider.answer(message.command, message.hold.key, message.hold, self.clock(provider))
        except (RefusedError, NotFoundError) as error:
            refusal = str(error)
        note(f"{message.command} of {message.id} at {message.party}: {refusal or 'done'}")
        self.air.append(replace(message, answered=True, refusal=refusal))

    # -- time ----------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1, 10, 31, 200, 3700]))
    def time_passes(self, seconds: int) -> None:
        self.now_s += seconds
        for id_, holds in self.holds.items():
            if self.now_s >= next(iter(holds.values())).window.ends_at_s:
                self.mind[id_] = grc.happened(self.mind[id_], grc.Event.ENDED, "the window has ended")

    @rule(name=st.sampled_from("abn"))
    def sweep(self, name: str) -> None:
        provider = self.providers[name]
        provider.sweep(self.clock(provider))

    # -- what must hold at every moment ----------------------------------------------------------

    @invariant()
    def nothing_is_given_twice(self) -> None:
        for provider in self.providers.values():
            seen: dict[int | None, list[Window]] = {}
            for record in provider.keeping(self.clock(provider)):
                window = record.window
                for other in seen.setdefault(record.grant.segment, []):
                    assert window.ends_at_s <= other.begins_at_s or other.ends_at_s <= window.begins_at_s
                seen[record.grant.segment].append(window)

    @invariant()
    def what_stands_stands_at_everybody(self) -> None:
        for id_, now in self.mind.items():
            if now.state is ReservationState.COMMITTED:
                assert self.standing(id_) <= {HoldState.COMMITTED, HoldState.OVER}

    def standing(self, id_: str) -> set[HoldState | None]:
        found: set[HoldState | None] = set()
        for party, hold in self.holds[id_].items():
            provider = self.providers[party]
            record = provider.records.get(hold.key)
            over = self.clock(provider) >= hold.window.ends_at_s
            gone = HoldState.OVER if over else None
            found.add(prm.at(record, self.clock(provider)) if record else gone)
        return found

    @invariant()
    def what_was_told_is_kept(self) -> None:
        """Reserved stays reserved until it is cancelled or over; not reserved is never taken back."""
        for id_, told in self.told.items():
            now = self.mind[id_].state
            if told is ReservationState.COMMITTED and id_ not in self.cancelled:
                assert now in {
                    ReservationState.COMMITTED, ReservationState.COMMITTING, ReservationState.OVER,
                } or self.now_s >= next(iter(self.holds[id_].values())).window.ends_at_s  # fmt: skip
            if told in {ReservationState.RELEASING, ReservationState.RELEASED}:
                assert now in {ReservationState.RELEASING, ReservationState.RELEASED}

    # -- the end -------------------------------------------------------------------------------

    def teardown(self) -> None:
        """The network heals; everybody says what is to be said until nothing is; then the sweep."""
        self.restart()
        self.settle()
        self.now_s += TTL_S + 100
        self.settle()
        for provider in self.providers.values():
            now_s = self.clock(provider)
            provider.sweep(now_s)
            for record in provider.keeping(now_s):
                assert record.state is HoldState.COMMITTED
                if self.now_s < record.window.ends_at_s:  # its clock may be behind
                    assert self.mind[record.reservation].state is ReservationState.COMMITTED
        for id_, now in self.mind.items():
            assert now.settled
            if now.state is ReservationState.COMMITTED:
                assert self.standing(id_) <= {HoldState.COMMITTED, HoldState.OVER}

    def settle(self) -> None:
        self.time_passes(0)
        for _ in range(20):
            while self.air:
                self.arrive(self.air.pop(0))
            for id_ in self.mind:
                self.speak(id_)


TestGrid = Grid.TestCase
TestGrid.settings = settings(
    max_examples=300, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
