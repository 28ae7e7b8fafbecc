"""Who has what open at this coordinator, against what each may have (``coalloc.quota``).

Kept in memory and reckoned anew from the reservations at every start. A reservation is charged before it is
written down, in the same step of the event loop that looked at the limit, so two that come at once cannot
both be the last that is allowed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from virtgrid.config import QuotaSection
from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.core.units import parse_duration, parse_rate
from virtgrid.grid.coalloc.quota import Limits, Use, require_within, use_of
from virtgrid.grid.messages.coalloc import Reserve
from virtgrid.wire.identity import Identity

EVERYBODY: Final = "uid:0"
"""Root sees and ends every reservation, and has no limits; everybody else their own."""
_UNLIMITED: Final = "unlimited"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """everybodys: of who is not in ``of``, which is by owner."""

    everybodys: Limits = field(default_factory=Limits)
    of: Mapping[str, Limits] = field(default_factory=dict)

    def limits(self, owner: str) -> Limits:
        return self.of.get(owner, self.everybodys)


class Ledger:
    """What is open, by owner and id."""

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas
        self._open: defaultdict[str, dict[str, Use]] = defaultdict(dict)
        self._sites: dict[str, tuple[str, ...]] = {}

    def known(self, owner: str, wish: Reserve) -> None:
        """One that was made before; whatever the limits are by now."""
        self._open[owner][wish.id] = use_of(wish)
        self._sites[wish.id] = tuple(one.site for one in wish.sites)

    def require(self, owner: str, wish: Reserve, *, now_s: int) -> None:
        """Whether there may be this one as well. Errors: RefusedError."""
        if owner == EVERYBODY:
            return
        limits, before = self._quotas.limits(owner), self._open.get(owner, {})
        others = [use for id_, use in before.items() if id_ != wish.id]
        require_within(limits, others, use_of(wish), who=owner, now_s=now_s)

    def charge(self, owner: str, wish: Reserve, *, now_s: int) -> bool:
        """The same, and from now on it counts; False: it did already. Errors: RefusedError."""
        self.require(owner, wish, now_s=now_s)
        new = wish.id not in self._open.get(owner, {})
        self.known(owner, wish)
        return new

    def give_back(self, owner: str, id_: str) -> None:
        """It counts no more."""
        uses = self._open.get(owner, {})
        uses.pop(id_, None)
        if not uses:
            self._open.pop(owner, None)
        if not any(id_ in others for others in self._open.values()):
            self._sites.pop(id_, None)

    def at(self, site: str) -> int:
        """How many that are open have nodes there."""
        return sum(site in sites for sites in self._sites.values())


def quotas_of(section: QuotaSection, path: Path | None) -> Quotas:
    """What the configuration says. Errors: RefusedError naming file and key."""
    said = str(path) if path is not None else "/etc/virtgrid/virtgrid.toml"
    try:
        everybodys = Limits(
            reservations=_count(section.reservations),
            node_time_s=_node_time(section.node_time),
            bandwidth_bytes_s=_bandwidth(section.bandwidth),
            said=said,
        )
        of = {}
        for who, own in section.of.items():
            if not who.startswith("uid:"):
                Identity.parse(who)
            limits = everybodys
            if own.reservations is not None:
                limits = replace(limits, reservations=_count(own.reservations))
            if own.node_time is not None:
                limits = replace(limits, node_time_s=_node_time(own.node_time))
            if own.bandwidth is not None:
                limits = replace(limits, bandwidth_bytes_s=_bandwidth(own.bandwidth))
            of[who] = limits
    except (UsageError, RefusedError) as error:
        raise RefusedError(f"{said}: quota: {error.what}", hint=error.hint) from None
    return Quotas(everybodys=everybodys, of=of)


def _count(number: int) -> int:
    if number < 0:
        raise UsageError(f"reservations: {number} is less than none")
    return number


def _node_time(text: str) -> int | None:
    return None if text == _UNLIMITED else round(parse_duration(text))


def _bandwidth(text: str) -> int | None:
    return None if text == _UNLIMITED else round(parse_rate(text))
