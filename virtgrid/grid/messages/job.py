"""Jobs: what a coordinator (GRC) says to the sites of a reservation from the beginning of its window on, and
what users say to the coordinator.

Source: Nakada et al. 2009, sections 3.2 to 3.5. The pilots of one hold are its *crew*. What a crew is to
become is declared (MUSTER, EQUIP, LAUNCH, DISMISS): the site writes it down and answers at once, so it may be
said again whatever was lost. How far the crew is, CREW tells, which waits for news.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints, TypeAdapter

from virtgrid.grid.messages.coalloc import Party, Reserve, Seconds, Which, Window
from virtgrid.grid.messages.common import HostName, Ipv4, Key, Model, Name, Number, Tag, UserName
from virtgrid.grid.messages.node import Exec, HostEntry, Keys, State, Usage

#: What a coordinator says to a site.
CREW: Final = "CREW"
#: What users say to a coordinator.
SUBMIT, JOB, JOBS, STOP, FOLLOW = "SUBMIT", "JOB", "JOBS", "STOP", "FOLLOW"

WAIT_LIMIT_S: Final = 15.0
"""How long a question may wait for news; less than a line waits for an answer."""
PIECE_LIMIT: Final = 256 << 10
"""Characters of output or journal in one answer."""


class Order(StrEnum):
    """What a crew is to become."""

    MUSTER = "MUSTER"
    EQUIP = "EQUIP"
    LAUNCH = "LAUNCH"
    DISMISS = "DISMISS"


# -- to a site -----------------------------------------------------------------------------------


class Muster(Model):
    """MUSTER: start the pilots of this hold and bring them to where their keys are known (INIT).

    user: the name inside, the same at all sites. who: the user's identity, where it is one of the grid.
    tag: of the reservation's segment. prefix: of the network in which all addresses of the reservation lie.
    """

    key: Key
    user: UserName
    tag: Tag
    prefix: Annotated[int, Field(ge=1, le=30)]
    who: Annotated[str, StringConstraints(max_length=200)] | None = None


class Equip(Model):
    """EQUIP: give all nodes everybody's addresses and keys (SET_KEYS) and start them (RUN)."""

    key: Key
    hosts: Annotated[tuple[HostEntry, ...], Field(min_length=1, max_length=4096)]


class Launch(Model):
    """LAUNCH: run the program in the sandbox of the hold's first node, once all is EQUIPped."""

    key: Key
    program: Exec


class Dismiss(Model):
    """DISMISS: end the crew. It is told of as ``gone`` until its hold is released."""

    key: Key


class AskCrew(Model):
    """CREW. Answered when there is news: another version than ``seen``, or output after ``after``; at the
    latest after wait_s. after: as ``next`` of the last answer said.
    """

    key: Key
    seen: Number = 0
    after: Number = 0
    wait_s: Annotated[float, Field(ge=0, le=WAIT_LIMIT_S)] = 0.0


Text = Annotated[str, StringConstraints(max_length=500)]


class NodeView(Model):
    """One node of a crew. state: what its pilot last told; None: it has not dialled in yet.

    problem: why nothing will become of it any more.
    """

    node: HostName
    sandbox: HostName
    address: Ipv4
    state: State | None = None
    reason: Text = ""
    problem: Text = ""
    keys: Keys | None = None


class CrewView(Model):
    """CREW's answer. gone: nothing of it is left. used_s: node-seconds so far.

    output: whole lines of what the program wrote (each a Tell), from ``after`` to ``next``.
    """

    version: Number
    nodes: Annotated[tuple[NodeView, ...], Field(max_length=4094)]
    gone: bool = False
    used_s: Annotated[float, Field(ge=0)] = 0.0
    output: str = ""
    next: Number = 0


# -- to a coordinator ----------------------------------------------------------------------------


class JobState(StrEnum):
    """How far a job is."""

    RESERVING = "RESERVING"
    WAITING = "WAITING"
    MUSTERING = "MUSTERING"
    EQUIPPING = "EQUIPPING"
    LAUNCHING = "LAUNCHING"
    RUNNING = "RUNNING"
    DISMISSING = "DISMISSING"
    OVER = "OVER"


class Verdict(StrEnum):
    """Why a job is over, or about to be."""

    FINISHED = "FINISHED"
    REFUSED = "REFUSED"
    BROKEN = "BROKEN"
    CANCELLED = "CANCELLED"
    ENDED = "ENDED"


class Submit(Model):
    """SUBMIT: reserve, and when the window begins run the program. The id is the reservation's.

    Answered with JobView once the reservation stands or does not, or when that takes too long.
    """

    reserve: Reserve
    program: Exec


class AskJobs(Model):
    """JOBS: the next ones after this id, in the order of ids; at most 500."""

    after: Name | None = None


class AskJournal(Model):
    """FOLLOW: the job's journal after this place, as soon as there is some; at the latest after wait_s."""

    id: Name
    after: Number = 0
    wait_s: Annotated[float, Field(ge=0, le=WAIT_LIMIT_S)] = 0.0


class JobView(Model):
    """A job as its user sees it.

    status: the program's exit status, as a shell says it; None: it has not ended, or how is not known.
    used_s: node-seconds, as the sites account for them.
    """

    id: Name
    state: JobState
    verdict: Verdict | None = None
    reason: str
    status: int | None = None
    usage: Usage | None = None
    used_s: float = 0.0
    window: Window
    submitted_at_s: Seconds
    sites: tuple[Party, ...]
    nodes: int
    argv: tuple[str, ...]


class JobList(Model):
    """JOBS's answer."""

    jobs: tuple[JobView, ...]
    more: bool


class Journal(Model):
    """FOLLOW's answer: whole lines of the journal, and where the next ones begin. over: no more will come."""

    lines: str
    next: Number
    over: bool


# -- the journal of a job ------------------------------------------------------------------------


class JobTold(Model):
    """The job is in another state. at_s: by the coordinator's clock, in all lines."""

    kind: Literal["job"] = "job"
    at_s: float
    state: JobState
    verdict: Verdict | None = None
    reason: str = ""


class NodeTold(Model):
    """A node is in another state; a pilot's word, or AWAITED before it dialled in, or LOST."""

    kind: Literal["node"] = "node"
    at_s: float
    site: Party
    node: HostName
    sandbox: HostName
    address: Ipv4
    state: str
    reason: str = ""


class SiteTold(Model):
    """A site does not answer, or does again (problem None)."""

    kind: Literal["site"] = "site"
    at_s: float
    site: Party
    problem: str | None


class Wrote(Model):
    """A piece of what the program wrote; data: base64. cursor: where the site's output goes on after it."""

    kind: Literal["output"] = "output"
    at_s: float
    stream: Literal["stdout", "stderr"]
    data: str
    cursor: Number


class Finished(Model):
    """The program has ended. status, usage, problem: as its NodeManager told them."""

    kind: Literal["finished"] = "finished"
    at_s: float
    status: int | None
    usage: Usage | None = None
    problem: str | None = None
    cursor: Number


JournalLine = Annotated[JobTold | NodeTold | SiteTold | Wrote | Finished, Field(discriminator="kind")]
JOURNAL_LINE: Final[TypeAdapter[JobTold | NodeTold | SiteTold | Wrote | Finished]] = TypeAdapter(JournalLine)

CREW_PARAMS: Final[dict[str, type[Model]]] = {
    Order.MUSTER: Muster,
    Order.EQUIP: Equip,
    Order.LAUNCH: Launch,
    Order.DISMISS: Dismiss,
    CREW: AskCrew,
}
JOB_PARAMS: Final[dict[str, type[Model]]] = {
    SUBMIT: Submit,
    JOB: Which,
    STOP: Which,
    JOBS: AskJobs,
    FOLLOW: AskJournal,
}
