"""A guest that arrived and is silent: what is tried for it, and what its silence is taken for.

After a switchover the segment must learn where the guest is now. QEMU announces it (a reverse ARP for each
card, and a driver with VIRTIO_NET_F_GUEST_ANNOUNCE says so itself), but an announcement may be lost, and a
driver may sleep on a link that went down. So both are done once more, the gentler first; whether they helped
is asked in the same way as before. What neither mends is told by its signs: a guest that is dead and a
network that does not lead to it are different people's work.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from virtgrid.core.errors import VirtgridError
from virtgrid.migration.verify import Answer
from virtgrid.net.probe import answers_arp
from virtgrid.virt.connection import Hypervisor
from virtgrid.virt.domain import Domain, DomainState, Position, position
from virtgrid.virt.domxml import Nic
from virtgrid.virt.monitor import QemuMonitor

#: QEMU's announce-self: rounds 50, 150, 250 and 350 ms apart.
_ANNOUNCE: Final = {"initial": 50, "max": 550, "rounds": 4, "step": 100}
_ANNOUNCING_S: Final = 0.8
#: How long the guest is asked after each cure.
_ASK_S: Final = 3.0
#: How long its signs are watched.
_WATCH_S: Final = 1.0
_BUSY: Final = 0.9

Ask = Callable[[float], Awaitable[Answer]]
Tell = Callable[[str, str], None]


class Cure(StrEnum):
    """What is tried, in this order."""

    ANNOUNCE = "announced it to its segment again"
    LINK = "put its link off and on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """What can be seen of a silent guest from outside, over a second in which it was asked.

    busy: share of the time in which its processors had something to do. got, sent: frames that went into and
    came out of its card, None where that cannot be seen. unplugged: by its definition its link is down.
    """

    position: Position
    busy: float | None = None
    got: int | None = None
    sent: int | None = None
    unplugged: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """Why it is silent, as far as its signs tell: a word for programs, a sentence, and what to do."""

    why: str
    text: str
    hint: str


def silence(name: str, mac: str, host: str, signs: Signs) -> Silence:
    """What the signs mean. Pure."""
    where = f"{name} arrived on {host}"
    match signs.position.state:
        case DomainState.CRASHED:
            return Silence(
                why="crashed",
                text=f"{where} and has crashed: its kernel panicked",
                hint=f"virsh console {name}, then virsh reset {name}",
            )
        case DomainState.PAUSED:
            return Silence(
                why="paused",
                text=f"{where} and is {signs.position} there",
                hint=f"virsh domstate {name} --reason, then virsh resume {name}",
            )
        case state if state is not DomainState.RUNNING:
            return Silence(
                why="gone", text=f"{where} and was shut off there", hint=f"virsh start {name} boots it anew"
            )
        case _:
            pass
    if signs.unplugged:
        return Silence(
            why="unplugged",
            text=f"{where} and runs; its link is down, as its definition says",
            hint=f"virsh domif-setlink {name} {mac} up",
        )
    if signs.got == 0:
        return Silence(
            why="network",
            text=f"{where} and runs, but nothing sent to it arrives there: the network does not lead to it",
            hint=f"does its bridge on {host} belong to the same segment as here? virtgrid segment status",
        )
    if signs.sent:
        return Silence(
            why="network",
            text=f"{where} and runs; it is reached and sends frames, but its answers do not arrive here",
            hint=f"is there a filter or another segment on {host}? nft list ruleset, virtgrid segment status",
        )
    if signs.busy is not None and signs.busy >= _BUSY:
        return Silence(
            why="hung",
            text=f"{where}; it is reached and answers nothing while its processors are busy"
            " without end, as after a kernel's panic",
            hint=f"virsh console {name}, then virsh reset {name}",
        )
    return Silence(
        why="mute",
        text=f"{where} and runs; it is reached and sends nothing: its network is down within",
        hint=f"virsh console {name}",
    )


async def gone(destination: Hypervisor, domain: Domain, host: str) -> Silence | None:
    """Whether it was shut off since it arrived: for one that could not be asked."""
    with contextlib.suppress(VirtgridError):
        standing = await position(destination, domain.uuid)
        if not standing.active:
            return silence(domain.name, "", host, Signs(position=standing))
    return None


async def cure(
    destination: Hypervisor, domain: Domain, nic: Nic, host: str, address: str | None, *, ask: Ask, tell: Tell
) -> tuple[Answer | None, Silence | None]:
    """Try the cures on a silent guest -> its answer when it spoke, else why it is silent.

    address: to ask at, on the source's bridge. ask: as after the switchover, for so many seconds. tell: is
    given what was tried and what came of it. Both None: it could not be looked at any more.
    """
    guest = Domain(destination, uuid=domain.uuid, name=domain.name)
    with contextlib.suppress(VirtgridError):
        xml = await guest.xml()
        there = next((found for found in xml.nics if found.mac == nic.mac), None)
        standing = await position(destination, domain.uuid)
        unplugged = there is None or not there.plugged
        if standing.state is DomainState.RUNNING and there is not None and not unplugged:
            for attempt in (Cure.ANNOUNCE, Cure.LINK):
                try:
                    await _try(attempt, destination, guest, there)
                except VirtgridError as error:
                    tell(attempt.value, f"could not be done: {error.cause or error.what}")
                    continue
                answer = await ask(_ASK_S)
                tell(attempt.value, answer.how)
                if answer.answering == "yes":
                    return answer, None
        signs = await _signs(destination, guest, nic, there, address, unplugged)
        return None, silence(domain.name, nic.mac, host, signs)
    return None, None


async def _try(attempt: Cure, destination: Hypervisor, guest: Domain, nic: Nic) -> None:
    if attempt is Cure.ANNOUNCE:
        await QemuMonitor(destination, guest.uuid).command("announce-self", **_ANNOUNCE)
        # QEMU's own announcements are frames from its card: over before frames are taken for life.
        await asyncio.sleep(_ANNOUNCING_S)
        return
    try:
        await guest.set_link(nic.mac, up=False)
    finally:
        await guest.set_link(nic.mac, up=True)


async def _signs(
    destination: Hypervisor, guest: Domain, nic: Nic, there: Nic | None, address: str | None, unplugged: bool
) -> Signs:
    standing = await position(destination, guest.uuid)
    if standing.state is not DomainState.RUNNING:
        return Signs(position=standing)
    tap = there.tap if there is not None else None
    before = await guest.activity(tap)
    if address is not None and nic.source:
        with contextlib.suppress(OSError):
            await answers_arp(nic.source, address, deadline_s=_WATCH_S)
    else:
        await asyncio.sleep(_WATCH_S)
    after = await guest.activity(tap)
    return Signs(
        position=standing,
        busy=after.busy_since(before),
        got=None if address is None or tap is None else after.got - before.got,
        sent=None if tap is None else after.sent - before.sent,
        unplugged=unplugged,
    )
