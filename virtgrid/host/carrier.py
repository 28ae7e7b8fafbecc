"""What should be on this host, made so in its kernel: segments, and bandwidth on its uplinks.

What cannot be done is told of the segment it concerns, and holds up no other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from virtgrid.core.errors import RefusedError, VirtgridError
from virtgrid.host.wanted import Wanted
from virtgrid.net import guarantee, htb, reserved, reserving
from virtgrid.net.guarantee import Share
from virtgrid.net.link import Links
from virtgrid.net.reserved import Reserved
from virtgrid.net.reserving import Uplink


class Kernel:
    """The kernel, in the caller's network namespace: see ``networks.Effects``."""

    def establish(self, want: Wanted) -> dict[str, str]:
        try:
            with Links() as links:
                return _Work(links, want).done()
        except OSError as error:
            raise VirtgridError("the kernel does not tell what is there", cause=str(error)) from error


class _Work:
    def __init__(self, links: Links, want: Wanted) -> None:
        self._links, self._want = links, want
        self._problems = dict(want.problems)
        self._present = reserving.look(links)
        self._addresses = reserving.addresses(links)
        self._uplinks: dict[str, Uplink] = {}

    def done(self) -> dict[str, str]:
        possible = [one for one in self._want.segments if self._attempt(one.id, self._placing(one))]
        plan = reserved.plan(possible, self._present)
        self._problems |= plan.problems
        for step in plan.steps:
            id_ = "" if isinstance(step, reserved.Remove) else step.of.id
            if not id_ or id_ not in self._problems:
                self._attempt(id_, functools.partial(reserving.take, self._links, step))
        self._guarantee()
        return self._problems

    def _placing(self, one: Reserved) -> Callable[[], None]:
        """Whether its tunnels begin here, lead to the others, and carry its packets."""

        def check() -> None:
            if one.local not in self._addresses:
                raise RefusedError(f"{one.local} is no address of this host")
            for peer in sorted(one.peers):
                reserving.require_fit(self._uplink(peer), peer, one.mtu)

        return check

    def _uplink(self, to: str) -> Uplink:
        if to not in self._uplinks:
            self._uplinks[to] = reserving.uplink(self._links, self._present, to)
        return self._uplinks[to]

    def _guarantee(self) -> None:
        by_interface: dict[int, list[Share]] = {}
        for way, share in sorted(self._want.ways.items()):
            ids = self._of(share)
            failed = _failure(lambda: self._uplink(self._want.via[way]))  # noqa: B023 - called at once
            if failed is None:
                index = self._uplink(self._want.via[way]).interface.index
                by_interface.setdefault(index, []).append(share)
            for id_ in ids if failed is not None else ():
                self._problems.setdefault(id_, f"no bandwidth is guaranteed: {failed}")
        ours = {index for index, handle in htb.roots(self._links).items() if handle == htb.ROOT}
        # Without a guarantee nobody is held back.
        busy = {index for index, shares in by_interface.items() if any(share.flows for share in shares)}
        for link in self._present.links:
            if link.index in busy | ours:
                shares = by_interface[link.index] if link.index in busy else []
                failed = _failure(functools.partial(self._shape, link.index, shares))
                for id_ in [id_ for share in shares for id_ in self._of(share)] if failed else ():
                    self._problems.setdefault(id_, f"no bandwidth is guaranteed: {link.name}: {failed}")

    def _shape(self, interface: int, shares: list[Share]) -> None:
        present = htb.read(self._links, interface)
        htb.apply(self._links, interface, guarantee.plan(shares, present))

    def _of(self, share: Share) -> list[str]:
        """The ids of the segments with a guarantee in it."""
        numbers = {flow.vni for flow in share.flows}
        return [one.id for one in self._want.segments if one.vni in numbers]

    def _attempt(self, id_: str, work: Callable[[], object]) -> bool:
        failed = _failure(work)
        if failed is not None:
            self._problems.setdefault(id_, failed)
        return failed is None


def _failure(work: Callable[[], object]) -> str | None:
    """Do it; why it could not be done."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        work()
    except VirtgridError as error:
        return f"{error.what} ({error.cause})" if error.cause else error.what
    except (NetlinkError, OSError) as error:
        return f"the kernel refused: {error}"
    return None
