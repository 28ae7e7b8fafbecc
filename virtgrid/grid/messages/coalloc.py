"""Co-allocation: what coordinators (GRC) say to those who have something to give (CRM: nodes and addresses,
NRM: a segment and bandwidth), and what users say to coordinators.

Source: Nakada et al. 2009, sections 2 and 3.2.1. A *hold* is tentative: its provider keeps what was asked for
until ``ttl_s`` is over. COMMIT makes it firm, RELEASE gives it back. A hold is known by its key, which its
coordinator made up; who says HOLD again with that key gets the same hold. Why it cannot end half done:
docs/design/0009-co-allocation.md.

Times are whole seconds since the epoch (UTC), so a time without a zone cannot be said. Rates are bytes per
second.
"""

from __future__ import annotations

import ipaddress
from enum import StrEnum
from itertools import combinations
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from virtgrid.grid.messages.common import HostName, Key, Model, Name, Tag

SITES_LIMIT: Final = 16
NODES_LIMIT: Final = 4094  # what a /20 has addresses for
PATHS_LIMIT: Final = SITES_LIMIT * (SITES_LIMIT - 1) // 2
WINDOW_LIMIT_S: Final = 366 * 86400
TTL_LIMIT_S: Final = 600
SHORTEST_PREFIX, LONGEST_PREFIX = 20, 30


class Command(StrEnum):
    """What a coordinator says to a provider."""

    HOLD = "HOLD"
    COMMIT = "COMMIT"
    RELEASE = "RELEASE"


#: Questions to a provider; they change nothing.
STATUS, FIT, OFFER = "STATUS", "FIT", "OFFER"
#: What users say to a coordinator.
RESERVE, SHOW, LIST, CANCEL, SITES = "RESERVE", "SHOW", "LIST", "CANCEL", "SITES"
#: What its administrator says to a coordinator.
JOIN, LEAVE = "JOIN", "LEAVE"


# -- words ---------------------------------------------------------------------------------------


def _range(text: str) -> str:
    network = ipaddress.IPv4Network(text)
    if not SHORTEST_PREFIX <= network.prefixlen <= LONGEST_PREFIX:
        raise ValueError(f"a range of addresses is between /{SHORTEST_PREFIX} and /{LONGEST_PREFIX}")
    if not network.is_private or network.is_loopback or network.is_link_local:
        raise ValueError("the nodes' addresses are private ones: 10/8, 172.16/12, 192.168/16")
    return str(network)


#: Addresses of one site, as CIDR; the nodes of a reservation get theirs from it.
Range = Annotated[str, StringConstraints(max_length=18), AfterValidator(_range)]
Count = Annotated[int, Field(ge=0, lt=1 << 32)]
Seconds = Annotated[int, Field(ge=0, lt=1 << 40)]
Rate = Annotated[int, Field(ge=1, le=10**12)]
Party = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$")]
"""The name of a site or of a network manager."""


class Window(Model):
    """From begins_at_s until just before ends_at_s."""

    begins_at_s: Seconds
    ends_at_s: Seconds

    @model_validator(mode="after")
    def _forward(self) -> Window:
        if self.ends_at_s <= self.begins_at_s:
            raise ValueError("the window ends before it begins")
        if self.ends_at_s - self.begins_at_s > WINDOW_LIMIT_S:
            raise ValueError(f"a window is at most {WINDOW_LIMIT_S // 86400} days long")
        return self

    @property
    def lasts_s(self) -> int:
        return self.ends_at_s - self.begins_at_s


class Nodes(Model):
    """Of a CRM: so many nodes, and this range for their addresses."""

    kind: Literal["nodes"] = "nodes"
    nodes: Annotated[int, Field(ge=1, le=NODES_LIMIT)]
    addresses: Range

    @model_validator(mode="after")
    def _enough(self) -> Nodes:
        _require_room(self.nodes, self.addresses)
        return self


def _require_room(nodes: int, range_: str) -> None:
    """The first and the last address of a range stay unused."""
    room = ipaddress.IPv4Network(range_).num_addresses - 2
    if nodes > room:
        raise ValueError(f"{range_} has {room} addresses, too few for {nodes} nodes")


def range_for(nodes: int) -> int:
    """The prefix of the smallest range for so many nodes; /30 is the smallest there is."""
    return min(LONGEST_PREFIX, 32 - (nodes + 1).bit_length())


class Path(Model):
    """Bandwidth between two sites, each way."""

    between: tuple[Party, Party]
    rate_bytes_s: Rate

    @model_validator(mode="after")
    def _ordered(self) -> Path:
        if self.between[0] >= self.between[1]:
            raise ValueError("a path is between two sites, in the order of their names")
        return self


class Paths(Model):
    """Of an NRM: a segment of their own for these sites, and bandwidth between them. segment None: any."""

    kind: Literal["paths"] = "paths"
    sites: Annotated[tuple[Party, ...], Field(min_length=1, max_length=SITES_LIMIT)]
    paths: Annotated[tuple[Path, ...], Field(max_length=PATHS_LIMIT)] = ()
    segment: Tag | None = None

    @model_validator(mode="after")
    def _once(self) -> Paths:
        if len({path.between for path in self.paths}) != len(self.paths):
            raise ValueError("a path stands there twice")
        return self


Wanted = Annotated[Nodes | Paths, Field(discriminator="kind")]


# -- the four commands to a provider -------------------------------------------------------------


class Hold(Model):
    """HOLD. asked_at_s: by the coordinator's clock; what is too far from the provider's is refused.

    Answered with HoldAnswer. ttl_s: how long the provider keeps it without a COMMIT, by its own clock.
    """

    key: Key
    reservation: Name
    window: Window
    ttl_s: Annotated[int, Field(ge=1, le=TTL_LIMIT_S)]
    asked_at_s: Seconds
    wanted: Wanted


class Promise(Model):
    """COMMIT, RELEASE and STATUS: of the hold with this key. Answered with Standing."""

    key: Key


class HoldState(StrEnum):
    """What a provider knows of a hold."""

    HELD = "HELD"
    COMMITTED = "COMMITTED"
    EXPIRED = "EXPIRED"
    RELEASED = "RELEASED"
    OVER = "OVER"


class Grant(Model):
    """What is kept: of a CRM nodes and addresses, of an NRM the segment, its sites, and bandwidth."""

    nodes: Annotated[tuple[HostName, ...], Field(max_length=NODES_LIMIT)] = ()
    addresses: Range | None = None
    segment: Tag | None = None
    sites: Annotated[tuple[Party, ...], Field(max_length=SITES_LIMIT)] = ()
    paths: Annotated[tuple[Path, ...], Field(max_length=PATHS_LIMIT)] = ()


class Standing(Model):
    """How a hold stands. expires_at_s: when it lapses without a COMMIT, by the provider's clock."""

    key: Key
    reservation: Name
    state: HoldState
    window: Window
    expires_at_s: Seconds
    grant: Grant


class Refusal(Model):
    """A party's no: why, and the nearest windows of the same length in which it could."""

    party: Party
    why: Annotated[str, StringConstraints(max_length=500)]
    nearest: Annotated[tuple[Window, ...], Field(max_length=8)] = ()


class HoldAnswer(Model):
    """HOLD's answer: the hold, or the refusal."""

    standing: Standing | None = None
    refusal: Refusal | None = None

    @model_validator(mode="after")
    def _one(self) -> HoldAnswer:
        if (self.standing is None) == (self.refusal is None):
            raise ValueError("the answer to HOLD is either a hold or a refusal")
        return self


# -- questions to a provider ---------------------------------------------------------------------


class AskFit(Model):
    """FIT: when could this be had, for so long? near_s: the wanted beginning."""

    near_s: Seconds
    lasts_s: Annotated[int, Field(ge=1, le=WINDOW_LIMIT_S)]
    wanted: Wanted


class Span(Model):
    """Beginnings from first_s to last_s, both included."""

    first_s: Seconds
    last_s: Seconds


class Fit(Model):
    """FIT's answer: the beginnings that would do, in order, around near_s."""

    begins: Annotated[tuple[Span, ...], Field(max_length=256)]


class AskOffer(Model):
    """OFFER: what is there, and which ranges of this prefix are free in the window? spread: where to begin
    looking, so that coordinators who ask at the same time are told different ones.
    """

    window: Window
    prefix: Annotated[int, Field(ge=SHORTEST_PREFIX, le=LONGEST_PREFIX)]
    spread: Annotated[int, Field(ge=0, lt=1 << 32)] = 0


PROBLEMS_MAX: Final = 16
Problems = Annotated[
    tuple[Annotated[str, StringConstraints(max_length=300)], ...], Field(max_length=PROBLEMS_MAX)
]


class Offer(Model):
    """OFFER's answer, of a CRM. advertised: all its ranges; free: some that are free, at most 16; problems:
    of its hosts, now, a sentence each.
    """

    nodes: Count
    nodes_free: Count
    advertised: Annotated[tuple[Annotated[str, StringConstraints(max_length=18)], ...], Field(max_length=64)]
    free: Annotated[tuple[Range, ...], Field(max_length=16)]
    problems: Problems = ()


# -- what users say to a coordinator -------------------------------------------------------------


class SiteWish(Model):
    """Nodes of one site. addresses None: the coordinator chooses."""

    site: Party
    nodes: Annotated[int, Field(ge=1, le=NODES_LIMIT)]
    addresses: Range | None = None


class Reserve(Model):
    """RESERVE. id: the user's own, so that it can be asked again; the same id with other words is refused.

    bandwidth_bytes_s: between each two of the sites, each way; None: no guarantee. Answered with View.
    """

    id: Name
    window: Window
    sites: Annotated[tuple[SiteWish, ...], Field(min_length=1, max_length=SITES_LIMIT)]
    bandwidth_bytes_s: Rate | None = None
    segment: Tag | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Reserve:
        names = [wish.site for wish in self.sites]
        if len(set(names)) != len(names):
            raise ValueError("a site stands there twice")
        given = [(wish.site, ipaddress.IPv4Network(wish.addresses)) for wish in self.sites if wish.addresses]
        for (site, one), (other_site, other) in combinations(given, 2):
            if one.overlaps(other):
                raise ValueError(f"the ranges {one} of {site} and {other} of {other_site} overlap")
        for wish in self.sites:
            if wish.addresses is not None:
                _require_room(wish.nodes, wish.addresses)
        if self.bandwidth_bytes_s is not None and len(self.sites) < 2:
            raise ValueError("bandwidth is between sites, and there is only one")
        return self


class Which(Model):
    """SHOW and CANCEL."""

    id: Name


class AskList(Model):
    """LIST: the next ones after this id, in the order of ids; at most 500."""

    after: Name | None = None


class ReservationState(StrEnum):
    """How a whole reservation stands with its coordinator."""

    HOLDING = "HOLDING"
    COMMITTING = "COMMITTING"
    COMMITTED = "COMMITTED"
    RELEASING = "RELEASING"
    RELEASED = "RELEASED"
    OVER = "OVER"


class PartyState(StrEnum):
    """How a coordinator knows one party of a reservation. SILENT: it did not answer HOLD in time."""

    ASKED = "ASKED"
    SILENT = "SILENT"
    HELD = "HELD"
    REFUSED = "REFUSED"
    COMMITTED = "COMMITTED"
    RELEASED = "RELEASED"


class PartyView(Model):
    """One party of a reservation: what it keeps, or why not."""

    party: Party
    state: PartyState
    wanted: Wanted | None
    why: str = ""
    nearest: tuple[Window, ...] = ()
    grant: Grant | None = None


class View(Model):
    """A reservation as its user sees it. nearest: windows in which all parties could."""

    id: Name
    state: ReservationState
    reason: str
    window: Window
    parties: tuple[PartyView, ...]
    nearest: tuple[Window, ...] = ()


class Line(Model):
    """A reservation in a list."""

    id: Name
    state: ReservationState
    reason: str
    window: Window
    sites: tuple[Party, ...]
    nodes: int


class Listed(Model):
    """LIST's answer."""

    reservations: tuple[Line, ...]
    more: bool


class SiteView(Model):
    """One party a coordinator knows, and what it offers now; problem: why it did not answer; problems: of
    its hosts, as it tells. at: where it is; who: answers there, by certificate; joined: by JOIN, and not by
    how the coordinator was started.
    """

    party: Party
    kind: Literal["crm", "nrm"]
    nodes: int | None = None
    nodes_free: int | None = None
    advertised: tuple[str, ...] = ()
    problem: str | None = None
    problems: Problems = ()
    at: str = ""
    who: str | None = None
    joined: bool = False


class SiteList(Model):
    """SITES's answer."""

    sites: tuple[SiteView, ...]


class Join(Model):
    """JOIN: a site and where its CRM is. Answered with SiteView."""

    site: Party
    at: Annotated[str, StringConstraints(max_length=300)]


class Leave(Model):
    """LEAVE: of a site that joined."""

    site: Party


class Empty(Model):
    """SITES takes nothing, and LEAVE answers nothing."""


PROVIDER_PARAMS: Final[dict[str, type[Model]]] = {
    Command.HOLD: Hold,
    Command.COMMIT: Promise,
    Command.RELEASE: Promise,
    STATUS: Promise,
    FIT: AskFit,
    OFFER: AskOffer,
}
COORDINATOR_PARAMS: Final[dict[str, type[Model]]] = {
    RESERVE: Reserve,
    SHOW: Which,
    CANCEL: Which,
    LIST: AskList,
    SITES: Empty,
}
ADMINISTRATOR_PARAMS: Final[dict[str, type[Model]]] = {JOIN: Join, LEAVE: Leave}
