"""Segments of reservations on a host: which there should be, and the steps to them. Pure.

A segment is a bridge and, as its one port that is ours, a VXLAN (RFC 7348) that floods to every other host of
the segment; sandboxes' cables are the bridge's other ports. Both bear a note with the id of what they were
made for: the kernel itself says what is there and whose it is, so nobody has to remember.

* What bears no note of ours is never changed or removed.
* What was made for another reservation is not used again, even when its number is the same: its ports would
  be in it. It is removed, and made anew.
* Whatever the order of crashes, the same look and the same plan put it right; a plan for what is as it should
  be is empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from virtgrid.net.link import Link, Tunnel

MARK: Final = "virtgrid reserved "
"""Begins the note (ifalias) of an interface of ours; id and name follow."""
_DRAFT: Final = re.compile(r"vg[bx][0-9]{1,8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """A segment as this host has it. id: of what it is for; name: what people call that. local: our address,
    peers: the other hosts'.
    """

    id: str
    name: str
    vni: int
    bridge: str
    local: str
    peers: frozenset[str]
    mtu: int

    @property
    def note(self) -> str:
        return f"{MARK}{self.id} {self.name}"

    @property
    def port(self) -> str:
        """The name of its VXLAN."""
        return f"vgx{self.vni}"

    @property
    def draft(self) -> str:
        """The name of its bridge while it is being made."""
        return f"vgb{self.vni}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """What the kernel has. peers: of each VXLAN of ours, to which hosts it floods."""

    links: tuple[Link, ...]
    peers: Mapping[str, frozenset[str]]


@dataclass(frozen=True, slots=True)
class Remove:
    name: str


@dataclass(frozen=True, slots=True)
class MakeBridge:
    of: Reserved


@dataclass(frozen=True, slots=True)
class MakeTunnel:
    of: Reserved


@dataclass(frozen=True, slots=True)
class Join:
    """The VXLAN becomes a port of its bridge, and both are set up."""

    of: Reserved


@dataclass(frozen=True, slots=True)
class AddPeer:
    of: Reserved
    address: str


@dataclass(frozen=True, slots=True)
class DropPeer:
    of: Reserved
    address: str


Step = Remove | MakeBridge | MakeTunnel | Join | AddPeer | DropPeer


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """steps: in their order. problems: of segments that cannot be, by id, a sentence each."""

    steps: tuple[Step, ...]
    problems: Mapping[str, str]


def plan(wanted: Sequence[Reserved], present: Present) -> Plan:
    """From what is there to what should be; at most one of each number is wanted."""
    good, problems = _possible(wanted, present)
    named = {name: one for one in good for name in (one.bridge, one.port)}
    gone = [link for link in present.links if ours(link) and not _fits(link, named.get(link.name))]
    there = {link.name: link for link in present.links if link not in gone}
    # A bridge goes before its tunnel: no frame of an old sandbox finds another way.
    steps: list[Step] = [Remove(link.name) for link in sorted(gone, key=lambda link: link.kind)]
    for one in good:
        steps += _mend(one, there.get(one.bridge), there.get(one.port), present)
    return Plan(steps=tuple(steps), problems=problems)


def ours(link: Link) -> bool:
    """By its note; or by a name of ours, when we were killed before we could give it one."""
    return link.alias.startswith(MARK) or (not link.alias and _DRAFT.fullmatch(link.name) is not None)


def _possible(wanted: Iterable[Reserved], present: Present) -> tuple[list[Reserved], dict[str, str]]:
    by_name = {link.name: link for link in present.links}
    tunnels = {link.tunnel.vni: link for link in present.links if link.tunnel is not None}
    good, problems = [], {}
    for one in wanted:
        taken = [by_name[name] for name in (one.bridge, one.port) if name in by_name]
        taken += [tunnels[one.vni]] if one.vni in tunnels else []
        strange = next((link for link in taken if not ours(link)), None)
        if strange is None:
            good.append(one)
        elif strange.name in (one.bridge, one.port):
            problems[one.id] = f"there is an interface {strange.name} that virtgrid did not make"
        else:
            problems[one.id] = f"the VXLAN {strange.name} has the number {one.vni} already"
    return good, problems


def _fits(link: Link, one: Reserved | None) -> bool:
    """Whether an interface of ours is the one that is wanted under its name."""
    if one is None or link.alias != one.note or link.mtu != one.mtu:
        return False
    if link.name == one.bridge:
        return link.kind == "bridge"
    return link.tunnel == Tunnel(vni=one.vni, local=one.local, remote=None)


def _mend(one: Reserved, bridge: Link | None, port: Link | None, present: Present) -> list[Step]:
    steps: list[Step] = []
    if bridge is None:
        steps.append(MakeBridge(one))
    if port is None:
        steps.append(MakeTunnel(one))
    peers = frozenset() if port is None else present.peers.get(port.name, frozenset())
    steps += [DropPeer(one, address) for address in sorted(peers - one.peers)]
    steps += [AddPeer(one, address) for address in sorted(one.peers - peers)]
    if bridge is None or port is None or port.master != bridge.index or not (bridge.up and port.up):
        steps.append(Join(one))
    return steps
