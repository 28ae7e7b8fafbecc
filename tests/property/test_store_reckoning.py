"""Whatever is held and given back: the tables say what a simple reckoning says, and what fits can be had."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from virtgrid.grid.coalloc.windows import beginnings, common, gaps
from virtgrid.grid.crm.stock import SiteStock
from virtgrid.grid.messages.coalloc import AskFit, Hold, Nodes, Paths, Wanted, Window
from virtgrid.grid.messages.coalloc import Path as Way
from virtgrid.grid.nrm.stock import NetworkStock
from virtgrid.grid.store import levels
from virtgrid.grid.store.audit import audit
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.promises import Promises

NOW_S = 1_000_000
NODES = ("n1", "n2", "n3")
CAPACITY = 10

windows = st.builds(
    lambda begins, lasts: Window(begins_at_s=NOW_S + begins, ends_at_s=NOW_S + begins + lasts),
    st.integers(0, 40),
    st.integers(1, 25),
)
nodes = st.builds(
    lambda count, block: Nodes(nodes=count, addresses=f"10.1.0.{block * 8}/29"),
    st.integers(1, 3),
    st.integers(0, 3),
)
paths = st.builds(
    lambda rate, segment: Paths(
        sites=("a", "b"), paths=(Way(between=("a", "b"), rate_bytes_s=rate),), segment=segment
    ),
    st.integers(1, CAPACITY),
    st.none() | st.integers(1, 3),
)


class Store(RuleBasedStateMachine):
    """A site and a network in one file, and all that was promised in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.database = Database(Path(self.directory.name) / "grid.db")
        network = NetworkStock(links={("a", "b"): CAPACITY}, segments=(1, 3))
        with self.database.write() as connection:
            network.prepare(connection)
        self.promises: dict[str, Promises] = {
            "nodes": Promises(self.database, "a", SiteStock(nodes=NODES, ranges=["10.1.0.0/27"])),
            "paths": Promises(self.database, "net", network),
        }
        self.kept: dict[str, tuple[Wanted, Window, Any]] = {}
        self.made = 0

    @rule(wanted=nodes | paths, window=windows)
    def hold(self, wanted: Any, window: Window) -> None:
        self.made += 1
        asked = Hold(
            key=f"key-{self.made:06d}",
            reservation="r",
            window=window,
            ttl_s=600,
            asked_at_s=NOW_S,
            wanted=wanted,
        )
        promises = self.promises[wanted.kind]
        wish = AskFit(near_s=window.begins_at_s, lasts_s=window.lasts_s, wanted=wanted)
        fits = promises.fit(wish, now_s=NOW_S).begins
        answer = promises.hold(asked, owner="me", now_s=NOW_S)
        said = any(span.first_s <= window.begins_at_s <= span.last_s for span in fits)
        assert said == (answer.standing is not None)
        if answer.standing is not None:
            self.kept[asked.key] = (wanted, window, answer.standing.grant)
        else:
            assert answer.refusal is not None
            assert window not in answer.refusal.nearest

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.kept)))
        wanted, _, _ = self.kept.pop(key)
        self.promises[wanted.kind].release(key, owner="me", now_s=NOW_S)

    @invariant()
    def levels_are_the_sum_of_what_is_promised(self) -> None:
        with self.database.read() as connection:
            for at_s in range(NOW_S, NOW_S + 66, 5):
                moment = Window(begins_at_s=at_s, ends_at_s=at_s + 1)
                wanted = sum(
                    one.paths[0].rate_bytes_s
                    for one, when, _ in self.kept.values()
                    if isinstance(one, Paths) and when.begins_at_s <= at_s < when.ends_at_s
                )
                assert levels.most(connection, "a-b", moment) == wanted <= CAPACITY

    @invariant()
    def the_store_finds_nothing_against_itself(self) -> None:
        assert audit(self.database) == []

    @invariant()
    def nothing_is_given_twice(self) -> None:
        taken: dict[str, list[Window]] = {}
        for _, when, grant in self.kept.values():
            for unit in (*grant.nodes, grant.addresses, grant.segment):
                for other in taken.setdefault(str(unit), []) if unit is not None else []:
                    assert when.ends_at_s <= other.begins_at_s or other.ends_at_s <= when.begins_at_s
                taken.setdefault(str(unit), []).append(when)

    def teardown(self) -> None:
        self.database.close()
        self.directory.cleanup()


TestStore = Store.TestCase
TestStore.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

times = st.tuples(st.integers(0, 50), st.integers(1, 20)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(times, max_size=5).map(sorted), min_size=1), st.integers(1, 4), st.integers(1, 15))
def test_beginnings_are_what_trying_every_second_finds(
    busy: list[list[tuple[int, int]]], need: int, lasts_s: int
) -> None:
    spans = beginnings([gaps(unit, (0, 60)) for unit in busy], need=need, lasts_s=lasts_s)
    found = {at for span in spans for at in range(span.first_s, span.last_s + 1)}
    wanted = {
        at
        for at in range(60 - lasts_s + 1)
        if sum(all(end <= at or at + lasts_s <= begin for begin, end in unit) for unit in busy) >= need
    }
    assert found == wanted
    assert common(spans, spans) == spans
