"""Does the guest answer at its new place? Asked on the segment first, of libvirt's counters else."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from virtgrid.core.errors import VirtgridError
from virtgrid.net.probe import answers_arp
from virtgrid.virt.connection import Hypervisor
from virtgrid.virt.domain import Domain
from virtgrid.virt.domxml import Nic

_COUNTER_POLL_S: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """answering: yes, no or unknown; how: what was asked and seen; after_s: how long it took."""

    answering: str
    how: str
    after_s: float | None = None


async def verify(
    destination: Hypervisor, uuid: str, nic: Nic | None, addresses: tuple[str, ...], *, deadline_s: float
) -> Answer:
    """Ask the guest by ARP on the source's bridge, else watch its frames at the destination."""
    if nic is None:
        return Answer(answering="unknown", how="the domain has no interface to ask on")
    ipv4 = [address for address in addresses if ":" not in address]
    if ipv4 and nic.source:
        try:
            after_s = await answers_arp(nic.source, ipv4[0], deadline_s=deadline_s)
        except OSError as error:
            how = f"cannot ask on {nic.source} ({error.strerror})"
        else:
            if after_s is not None:
                return Answer(
                    answering="yes", how=f"{ipv4[0]} answers ARP on {nic.source}", after_s=round(after_s, 3)
                )
            how = f"{ipv4[0]} does not answer ARP on {nic.source}"
    else:
        how = "its address was not seen"
    return await _by_counters(destination, uuid, nic, how, deadline_s=deadline_s)


async def _by_counters(
    destination: Hypervisor, uuid: str, nic: Nic, before: str, *, deadline_s: float
) -> Answer:
    """Frames the guest sends at the destination are a sign of life; their absence is not of death."""
    domain = Domain(destination, uuid=uuid, name="the domain")
    try:
        xml = await domain.xml()
        tap = next((found.tap for found in xml.nics if found.mac == nic.mac), None)
        if tap is None:
            return Answer(answering="unknown", how=f"{before}; no tap at the destination")
        first = await domain.frames_from_guest(tap)
        for _ in range(max(1, round(deadline_s / _COUNTER_POLL_S))):
            await asyncio.sleep(_COUNTER_POLL_S)
            if await domain.frames_from_guest(tap) > first:
                return Answer(answering="yes", how=f"{before}; it sends frames at the destination")
    except VirtgridError as error:
        return Answer(answering="unknown", how=f"{before}; {error.cause or error.what}")
    return Answer(answering="no", how=f"{before}; it sends no frames at the destination")
