"""However answers are lost and whoever is killed, a job ends with everything given back and with the truth.

The tables of the job, of the crews and of the NodeManagers run against each other over two sites, in any
order, with a coordinator and sites that forget everything but what they wrote down.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from virtgrid.grid.coalloc import crew as crews
from virtgrid.grid.coalloc import job as table
from virtgrid.grid.coalloc.crew import Goal
from virtgrid.grid.coalloc.job import Event, Job
from virtgrid.grid.messages.job import CrewView, JobState, NodeView, Order, Verdict
from virtgrid.grid.messages.node import Command, Keys, State
from virtgrid.grid.node import states
from virtgrid.grid.node.states import Event as NodeEvent

KEYS = Keys(user_key="ssh-ed25519 " + "u" * 68, host_key="ssh-ed25519 " + "h" * 68)
SITES = ("a", "b")
NODES = (1, 2)
STATUS = 5
BY_ITSELF = {
    State.INITIATING: NodeEvent.PREPARED,
    State.STARTING_UP: NodeEvent.STARTED,
    State.SHUTTING_DOWN: NodeEvent.STOPPED,
}


@dataclass
class Pilot:
    """A NodeManager: its state is on its disk. started: how often its program was."""

    state: State = State.INITIAL
    alive: bool = True
    keys: int = 0
    started: int = 0
    ended: bool = False


@dataclass
class Site:
    """A site's disk: is the hold kept, is there a crew, and what it is to become."""

    held: bool = True
    goal: Goal | None = None
    hosts: int = 0
    launch: bool = False
    gone: bool = False
    pilots: list[Pilot] = field(default_factory=list)
    output: list[int | None] = field(default_factory=list)

    def say(self, order: Order, hosts: int) -> None:
        """Written down and answered at once. Errors: LookupError where there is no such crew."""
        if order is Order.MUSTER:
            if not self.held:
                raise LookupError
            if self.goal is None:
                self.goal, self.pilots = Goal.READY, [Pilot() for _ in NODES]
            return
        if self.goal is None:
            if order is Order.DISMISS:
                return
            raise LookupError
        if order is Order.EQUIP:
            self.goal, self.hosts = crews.further(self.goal, Goal.UP), hosts
        elif order is Order.LAUNCH:
            self.launch = True
        else:
            self.goal = Goal.GONE

    def tend(self, number: int) -> None:
        """The site gives one of its pilots the command that is due."""
        if self.goal is None or number >= len(self.pilots):
            return
        if not self.held:
            self.goal = Goal.GONE
        pilot = self.pilots[number]
        if not pilot.alive:
            pilot.alive = pilot.state is not State.DONE  # it is started again
        elif (command := crews.command(self.goal, pilot.state)) is not None:
            pilot.state = states.after_command(pilot.state, command)
            pilot.keys = self.hosts if command is Command.SET_KEYS else pilot.keys
        elif self.launch and number == 0 and pilot.state is State.RUNNING and not pilot.started:
            pilot.started = 1  # the same key: once
        if all(one.state is State.DONE for one in self.pilots) and self.goal is Goal.GONE:
            self.gone = True

    def view(self) -> CrewView:
        """Errors: LookupError where there is no crew."""
        if self.goal is None or (self.gone and not self.held):
            raise LookupError
        nodes = tuple(
            NodeView(
                node=f"n{number}",
                sandbox=f"n{number}-x",
                address=f"10.0.0.{number + 1}",
                state=pilot.state,
                keys=KEYS if pilot.state in crews.KEYED else None,
            )
            for number, pilot in enumerate(self.pilots)
        )
        return CrewView(version=1, nodes=nodes, gone=self.gone)

    def release(self) -> bool:
        """RELEASE: done when no pilot is left."""
        if self.goal is not None:
            self.goal = Goal.GONE
            if not self.gone:
                return False
        self.held = False
        return True


class Life(RuleBasedStateMachine):
    """One coordinator with its disk, two sites with theirs, pilots with theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.sites = {name: Site() for name in SITES}
        self.disk = self.mind = table.begin(SITES)
        self.ended = False
        self.told: list[Job] = []

    def step(self, after: Job) -> None:
        """What changes the state is written down before it counts."""
        if replace(after, sites=self.mind.sites) != self.mind:
            self.disk = replace(after, sites=self.disk.sites)
        self.mind = after

    # -- the coordinator -----------------------------------------------------------------------

    @precondition(lambda self: self.mind.state is JobState.RESERVING)
    @rule(held=st.sampled_from([True, True, True, False]))
    def reserve(self, held: bool) -> None:
        if not held:
            for site in self.sites.values():
                site.held = False
        self.step(table.happened(self.mind, Event.RESERVED if held else Event.REFUSED, "answered"))

    @precondition(lambda self: self.mind.state is JobState.WAITING)
    @rule()
    def begin(self) -> None:
        self.step(table.happened(self.mind, Event.BEGUN, "begun"))

    @rule(name=st.sampled_from(SITES), answered=st.sampled_from([True, True, False]))
    def order(self, name: str, answered: bool) -> None:
        order = table.order(self.mind, name)
        if order is None or (order is Order.EQUIP and not table.keyed(self.mind)):
            return
        try:
            self.sites[name].say(order, len(table.hosts(self.mind)))
        except LookupError:
            if answered:
                self.step(table.happened(self.mind, Event.BROKEN, f"{name} refuses"))
            return
        if answered:
            self.step(table.told(self.mind, name, order))

    @rule(name=st.sampled_from(SITES))
    def watch(self, name: str) -> None:
        if self.mind.state in (JobState.RESERVING, JobState.WAITING, JobState.OVER):
            return
        site = self.sites[name]
        try:
            view = site.view()
        except LookupError:
            if self.mind.state is not JobState.MUSTERING:
                self.step(table.unknown(self.mind, name))
            return
        if name == self.mind.first and site.output:
            status = site.output[-1]  # again and again: it is in the journal
            self.step(table.finished(self.mind, status, None, None))
        self.step(table.heard(self.mind, name, view))

    @precondition(lambda self: self.mind.state is JobState.DISMISSING)
    @rule(silent=st.booleans())
    def give_back(self, silent: bool) -> None:
        """When nothing is left at the sites that answer; the others hear of it by RELEASE."""
        if not table.all_gone(self.mind) and not silent:
            return
        released = [site.release() for site in self.sites.values()]
        if all(released):
            self.step(table.happened(self.mind, Event.GONE, self.mind.reason))

    @rule(absent=st.sets(st.sampled_from([*SITES, "grc"]), max_size=1))
    def everybody_goes_on(self, absent: set[str]) -> None:
        """A round in which most goes well, or nothing would ever come far."""
        if "grc" not in absent:
            if self.mind.state is JobState.RESERVING:
                self.step(table.happened(self.mind, Event.RESERVED, "answered"))
            self.step(table.happened(self.mind, Event.BEGUN, "begun"))
        for name in SITES:
            if name in absent:
                continue
            if "grc" not in absent:
                self.order(name, answered=True)
                self.watch(name)
            for number in (0, 1):
                self.sites[name].tend(number)
                self.pilot_works(name, number, broken=1)

    @rule()
    def coordinator_is_killed(self) -> None:
        self.mind = replace(self.disk, sites={name: table.Crew() for name in SITES})

    # -- the user and the clock ----------------------------------------------------------------

    @rule(event=st.sampled_from([Event.CANCELLED, Event.BROKEN]), rare=st.integers(0, 8))
    def user(self, event: Event, rare: int) -> None:
        if rare == 0:
            self.step(table.happened(self.mind, event, "by its user"))

    @rule(rare=st.integers(0, 12))
    def window_ends(self, rare: int) -> None:
        if rare == 0:
            self.ended = True
            self.step(table.happened(self.mind, Event.ENDED, "its window has ended"))
            for site in self.sites.values():
                site.held = False
                for pilot in site.pilots:
                    pilot.state = states.after_event(pilot.state, NodeEvent.ENDED) or pilot.state

    @rule(data=st.data())
    def user_asks(self, data: st.DataObject) -> None:
        self.told.append(self.disk)

    # -- sites and pilots ----------------------------------------------------------------------

    @rule(name=st.sampled_from(SITES), number=st.sampled_from([0, 1]))
    def tend(self, name: str, number: int) -> None:
        self.sites[name].tend(number)

    @rule(name=st.sampled_from(SITES), number=st.sampled_from([0, 1]), broken=st.integers(0, 25))
    def pilot_works(self, name: str, number: int, broken: int) -> None:
        site = self.sites[name]
        if number >= len(site.pilots):
            return
        pilot = site.pilots[number]
        if broken == 0:
            pilot.state = states.after_event(pilot.state, NodeEvent.BROKEN) or pilot.state
        elif pilot.alive and pilot.state in BY_ITSELF:
            after = states.after_event(pilot.state, BY_ITSELF[pilot.state])
            assert after is not None
            pilot.state = after
            self.program_ends(site, pilot, None if pilot.state is not State.DONE else 137)

    def program_ends(self, site: Site, pilot: Pilot, status: int | None) -> None:
        if status is not None and pilot.started and not pilot.ended:
            pilot.ended = True
            site.output.append(status)

    @rule(rare=st.integers(0, 3))
    def program_finishes(self, rare: int = 0) -> None:
        site = self.sites[SITES[0]]
        if not rare and site.pilots and site.pilots[0].alive and site.pilots[0].state is State.RUNNING:
            self.program_ends(site, site.pilots[0], STATUS)

    @rule(name=st.sampled_from(SITES), number=st.sampled_from([0, 1]), rare=st.integers(0, 5))
    def pilot_is_killed(self, name: str, number: int, rare: int) -> None:
        site = self.sites[name]
        if rare or number >= len(site.pilots):
            return
        pilot = site.pilots[number]
        pilot.alive = False
        if pilot.started and not pilot.ended:  # its next incarnation tells that the end is not known
            pilot.ended = True
            site.output.append(None)

    # -- what must hold at every moment ----------------------------------------------------------

    @invariant()
    def over_keeps_nothing(self) -> None:
        if self.disk.over:
            for site in self.sites.values():
                assert not site.held
                assert site.goal is None or site.gone or site.goal is Goal.GONE

    @invariant()
    def the_program_is_started_once_and_among_those_it_knows(self) -> None:
        for name, site in self.sites.items():
            for number, pilot in enumerate(site.pilots):
                assert pilot.started <= (name == SITES[0] and number == 0)
                assert pilot.keys in (0, len(SITES) * len(NODES))

    @invariant()
    def an_exit_status_is_the_program_s_own(self) -> None:
        if self.disk.ended:
            assert self.disk.status in self.sites[SITES[0]].output
        if self.disk.verdict is Verdict.FINISHED:
            assert self.disk.ended

    @invariant()
    def nothing_told_is_taken_back(self) -> None:
        for before in self.told:
            if before.ended:
                assert self.disk.status == before.status
            if before.verdict is not None:
                assert self.disk.verdict is before.verdict
            if before.over:
                assert self.disk.over

    # -- the end -------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Everybody is there again and does what is due, after the window's end."""
        self.coordinator_is_killed()
        for _ in range(60):
            if self.mind.state is JobState.RESERVING:
                self.reserve(held=True)
            if self.mind.state is JobState.WAITING:
                self.begin()
            for name, site in self.sites.items():
                self.order(name, answered=True)
                self.watch(name)
                for number in (0, 1):
                    site.tend(number)
                    self.pilot_works(name, number, broken=1)
            self.program_finishes()
            if self.mind.state is JobState.DISMISSING:
                self.give_back(silent=False)
        assert self.disk.over, self.disk
        for site in self.sites.values():
            assert not site.held
            assert all(pilot.state is State.DONE for pilot in site.pilots)


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
