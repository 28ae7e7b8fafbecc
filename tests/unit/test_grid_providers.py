"""What every provider must keep, whatever is behind it: the contract of ``virtgrid.grid.provide.Provider``.

What is behind a provider is added to ``case`` and has to pass as it is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path as FilePath
from typing import Any

import pytest
import slurm_parts
from grid_parts import soon
from wire_ends import nothing

from virtgrid.core.clock import FakeClock
from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.grid.crm.stock import SiteStock
from virtgrid.grid.messages.coalloc import (
    AskFit,
    AskOffer,
    Command,
    Hold,
    HoldState,
    Nodes,
    Path,
    Paths,
    Wanted,
    Window,
)
from virtgrid.grid.nrm.stock import NetworkStock
from virtgrid.grid.provide import Counter, Provider, Stored
from virtgrid.grid.store.database import Database
from virtgrid.lab.slurm.cluster import Cluster
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.message import RemoteError

ME = "uid:1000"


@dataclass
class Case:
    """A provider on a clock that moves when told to. all: what leaves nothing for anybody else.

    guard_s: so long after a window nobody else gets what it was promised.
    """

    provider: Provider
    clock: FakeClock
    all: Wanted
    never: Wanted
    guard_s: int = 0
    made: int = 0

    @property
    def now_s(self) -> int:
        return int(self.clock.utc().timestamp())

    def window(self, begins_s: int = 3600, lasts_s: int = 3600) -> Window:
        return Window(begins_at_s=self.now_s + begins_s, ends_at_s=self.now_s + begins_s + lasts_s)

    def asked(self, **changed: Any) -> Hold:
        self.made += 1
        what: dict[str, Any] = {
            "key": f"key-{self.made:06d}",
            "reservation": "r1",
            "window": self.window(),
            "ttl_s": 30,
            "asked_at_s": self.now_s,
            "wanted": self.all,
        }
        return Hold(**{**what, **changed})


@asynccontextmanager
async def embedded_site(directory: FilePath) -> AsyncIterator[Case]:
    stock = SiteStock(nodes=["n1", "n2"], ranges=["10.1.0.0/29"])
    with Database(directory / "crm.db") as database:
        clock = FakeClock()
        provider = Stored(party="alpha", database=database, stock=stock, clock=clock)
        yield Case(
            provider,
            clock,
            all=Nodes(nodes=2, addresses="10.1.0.0/29"),
            never=Nodes(nodes=3, addresses="10.1.0.0/29"),
        )
        provider.close()


@asynccontextmanager
async def network(directory: FilePath) -> AsyncIterator[Case]:
    stock = NetworkStock(links={("a", "b"): 1000}, segments=(5, 5))
    with Database(directory / "nrm.db") as database:
        with database.write() as connection:
            stock.prepare(connection)
        clock = FakeClock()
        provider = Stored(party="net", database=database, stock=stock, clock=clock)
        yield Case(
            provider,
            clock,
            all=Paths(sites=("a", "b"), paths=(Path(between=("a", "b"), rate_bytes_s=1000),)),
            never=Paths(sites=("a", "b"), segment=6),
        )
        provider.close()


@asynccontextmanager
async def slurm_site(directory: FilePath, cluster: Cluster) -> AsyncIterator[Case]:
    """The clock is Slurm's when it begins, and ahead of it later: what Slurm is asked is never over."""
    async with slurm_parts.site(directory, cluster, clock=FakeClock(datetime.now(UTC))) as made:
        yield Case(
            made.site,
            made.clock,
            all=Nodes(nodes=2, addresses="10.1.0.0/29"),
            never=Nodes(nodes=3, addresses="10.1.0.0/29"),
            guard_s=made.backend.guard_s,
        )


@pytest.fixture(params=["embedded_site", "network", pytest.param("slurm_site", marks=pytest.mark.lab)])
async def case(request: pytest.FixtureRequest, tmp_path: FilePath) -> AsyncIterator[Case]:
    makes: dict[str, Callable[[], AbstractAsyncContextManager[Case]]] = {
        "embedded_site": lambda: embedded_site(tmp_path),
        "network": lambda: network(tmp_path),
        "slurm_site": lambda: slurm_site(tmp_path, request.getfixturevalue("slurm")),
    }
    async with makes[request.param]() as made:
        yield made


async def _taken(case: Case) -> bool:
    answer = await case.provider.hold(case.asked(), owner="uid:2")
    if answer.standing is not None:
        await case.provider.release(answer.standing.key, owner="uid:2")
    return answer.standing is None


async def test_what_is_held_is_nobody_elses_and_can_be_committed(case: Case) -> None:
    asked = case.asked()
    answer = await case.provider.hold(asked, owner=ME)
    assert answer.standing is not None
    assert answer.standing.state is HoldState.HELD
    assert answer.standing.expires_at_s == case.now_s + 30
    assert await _taken(case)
    assert (await case.provider.commit(asked.key, owner=ME)).state is HoldState.COMMITTED
    case.clock.advance(31)
    assert (await case.provider.status(asked.key, owner=ME)).state is HoldState.COMMITTED


async def test_every_command_may_be_said_again(case: Case) -> None:
    asked = case.asked()
    assert await case.provider.hold(asked, owner=ME) == await case.provider.hold(asked, owner=ME)
    for _ in range(2):
        assert (await case.provider.commit(asked.key, owner=ME)).state is HoldState.COMMITTED
    assert (await case.provider.hold(asked, owner=ME)).standing is not None
    for _ in range(2):
        await case.provider.release(asked.key, owner=ME)
    assert not await _taken(case)


async def test_a_late_copy_after_the_release_gets_nothing(case: Case) -> None:
    asked = case.asked()
    await case.provider.hold(asked, owner=ME)
    await case.provider.release(asked.key, owner=ME)
    with pytest.raises(RefusedError, match="HOLD comes too late"):
        await case.provider.hold(asked, owner=ME)
    with pytest.raises(RefusedError, match="COMMIT comes too late"):
        await case.provider.commit(asked.key, owner=ME)
    assert not await _taken(case)


async def test_a_hold_lapses_by_itself(case: Case) -> None:
    asked = case.asked()
    await case.provider.hold(asked, owner=ME)
    case.clock.advance(30)
    with pytest.raises(RefusedError, match="has expired"):
        await case.provider.commit(asked.key, owner=ME)
    assert not await _taken(case)


async def test_the_sweep_forgets_what_is_long_over(case: Case) -> None:
    asked = case.asked()
    await case.provider.hold(asked, owner=ME)
    await case.provider.commit(asked.key, owner=ME)
    case.clock.advance(2 * 3600)
    await case.provider.sweep()
    assert (await case.provider.status(asked.key, owner=ME)).state is HoldState.OVER
    case.clock.advance(2 * 3600)
    await case.provider.sweep()
    with pytest.raises(NotFoundError):
        await case.provider.status(asked.key, owner=ME)
    await case.provider.release(asked.key, owner=ME)


async def test_a_refusal_says_who_and_when_it_could_be_had(case: Case) -> None:
    first = case.asked()
    await case.provider.hold(first, owner=ME)
    later = Window(
        begins_at_s=first.window.begins_at_s + 600, ends_at_s=first.window.begins_at_s + 600 + 1200
    )
    refusal = (await case.provider.hold(case.asked(window=later), owner=ME)).refusal
    assert refusal is not None
    assert refusal.party == case.provider.party
    assert refusal.why
    for window in refusal.nearest:
        assert window.lasts_s == later.lasts_s
        assert (await case.provider.hold(case.asked(window=window), owner=ME)).standing is not None


async def test_when_it_fits_is_true(case: Case) -> None:
    await case.provider.hold(case.asked(), owner=ME)
    wish = AskFit(near_s=case.now_s + 3600, lasts_s=1800, wanted=case.all)
    spans = (await case.provider.fit(wish)).begins
    assert [span.last_s for span in spans][:1] == [case.now_s + 1800 - case.guard_s]
    assert spans[1].first_s == case.now_s + 7200 + case.guard_s


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda case: {"asked_at_s": case.now_s + 120}, "120 s ahead of ours"),
        (lambda case: {"asked_at_s": case.now_s - 120}, "120 s behind ours"),
        (lambda case: {"window": case.window(-7200)}, "the window ended 3600 s ago"),
        (lambda case: {"window": case.window(-1800)}, "the window began 1800 s ago"),
        (lambda case: {"wanted": case.never}, "."),
    ],
)
async def test_what_cannot_be_is_refused_and_changes_nothing(
    case: Case, changed: Callable[[Case], dict[str, Any]], words: str
) -> None:
    asked = case.asked(**changed(case))
    with pytest.raises(RefusedError, match=words):
        await case.provider.hold(asked, owner=ME)
    with pytest.raises(NotFoundError):
        await case.provider.status(asked.key, owner=ME)


async def test_somebody_elses_hold_is_not_there(case: Case) -> None:
    asked = case.asked()
    await case.provider.hold(asked, owner=ME)
    for ask in (case.provider.status, case.provider.commit):
        with pytest.raises(NotFoundError):
            await ask(asked.key, owner="uid:2")
    await case.provider.release(asked.key, owner="uid:2")
    assert await _taken(case)


# -- on the wire ---------------------------------------------------------------------------------


async def test_on_the_wire_it_is_the_same(case: Case, tmp_path: FilePath) -> None:
    asked = case.asked()
    async with Counter(case.provider, where := Endpoint(tmp_path / "p.sock")):
        line = await dial(where, nothing, name="the provider")
        said = asked.model_dump(mode="json")
        assert (await line.call(Command.HOLD, said))["standing"]["state"] == "HELD"
        assert (await line.call(Command.COMMIT, {"key": asked.key}))["state"] == "COMMITTED"
        with pytest.raises(RefusedError, match="was used for another one"):
            await line.call(Command.HOLD, {**said, "ttl_s": 31})
        assert await line.call(Command.RELEASE, {"key": asked.key}) == {}
        with pytest.raises(RemoteError, match=r"HOLD: window: the window ends before it begins"):
            await line.call(Command.HOLD, {**said, "window": {"begins_at_s": 2, "ends_at_s": 1}})
        with pytest.raises(RemoteError, match="there is no method NONSENSE"):
            await line.call("NONSENSE", {})
        await line.close()


async def test_a_site_offers_and_a_network_does_not(tmp_path: FilePath) -> None:
    asked = AskOffer(window=soon(), prefix=30)
    async with embedded_site(tmp_path) as site, network(tmp_path) as net:
        offer = await site.provider.offer(asked)
        assert (offer.nodes, offer.nodes_free, offer.advertised) == (2, 2, ("10.1.0.0/29",))
        assert offer.free == ("10.1.0.0/30", "10.1.0.4/30")
        with pytest.raises(RefusedError, match="no nodes to offer"):
            await net.provider.offer(asked)


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([], "advertises 1 to 64 ranges"),
        (["10.1.0.0/24", "10.1.0.128/25"], "10.1.0.0/24 and 10.1.0.128/25 overlap"),
        (["0.0.0.0/0"], "0.0.0.0/0 cannot be advertised"),
        (["10.1.0.0/32"], "10.1.0.0/32 cannot be advertised"),
        (["8.8.0.0/16"], "8.8.0.0/16 cannot be advertised"),
        (["ten"], "'ten' is no range of addresses"),
    ],
)
def test_a_site_that_cannot_be_is_refused(ranges: list[str], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        SiteStock(nodes=["n1"], ranges=ranges)


@pytest.mark.parametrize(
    ("links", "segments", "words"),
    [
        ({("b", "a"): 1}, (1, 2), "link b-a is none"),
        ({("a", "b"): 0}, (1, 2), "link a-b is none"),
        ({}, (0, 2), "segments 0-2 are none"),
        ({}, (3, 2), "segments 3-2 are none"),
        ({}, (1, 1 << 24), "are none"),
    ],
)
def test_a_network_that_cannot_be_is_refused(links: Any, segments: Any, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        NetworkStock(links=links, segments=segments)
