"""The figures of ``bench grid`` are made from its samples as they are; a full store is one that can be."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest

from virtgrid.bench import hub
from virtgrid.bench.grid import GridPlan, Samples, clashes, figures, packed
from virtgrid.bench.rates import Rate
from virtgrid.bench.result import Figure
from virtgrid.grid.messages.coalloc import Grant, PartyState, PartyView, ReservationState, View, Window
from virtgrid.grid.store.audit import audit
from virtgrid.grid.store.bulk import fill
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.levels import set_links


def _figures(samples: Samples) -> dict[str, Figure]:
    return {one.name: one for one in figures(GridPlan(), samples)}


def test_every_figure_of_the_contract_is_there_and_nothing_measured_meets_no_goal() -> None:
    found = _figures(Samples())
    for name in ("commit_ms", "hold_p99_ms_100k", "double_allocations", "rate_error_share"):
        assert found[name].ok is False


def test_figures_are_what_was_measured() -> None:
    samples = Samples(
        commit=[30, 40, 500],
        commit_slurm=[90, 100, 110],
        hold={"site": [1.0] * 98 + [30.0] * 2},
        hold_empty={"site": [1.0] * 98 + [15.0] * 2},
        won=10,
        race_s=5.0,
        twice=("n1 is promised to a and to b",),
    )
    found = _figures(samples)
    assert (found["commit_ms"].value, found["commit_ms"].ok) == (40, True)
    assert (found["commit_ms_slurm"].value, found["commit_ms_slurm"].ratio) == (100, 2.5)
    assert (found["hold_p99_ms_100k"].value, found["hold_p99_ms_100k"].ok) == (30, False)
    assert found["hold_p99_ms_100k"].ratio == 2
    assert (found["double_allocations"].value, found["double_allocations"].ok) == (1, False)
    assert found["race_won_per_s"].value == 2


def test_a_rate_is_as_wrong_as_its_worst_run_on_either_side() -> None:
    def rate(mbit: float, way: str, *, guaranteed: bool = True) -> Rate:
        return Rate(guaranteed=guaranteed, way=way, bits_s=mbit * 1e6, neighbour_bits_s=60e6)

    measured = [rate(40, "forth"), rate(41, "forth"), rate(36, "back"), rate(10, "back", guaranteed=False)]
    found = _figures(Samples(rates=measured))
    assert found["rate_error_share"].value == pytest.approx(0.1)
    assert found["rate_error_share"].peer == pytest.approx(0.75)
    assert found["rate_error_share"].ok is False
    assert (found["rate_error_share_forth"].value, found["rate_error_share_forth"].ok) == (
        pytest.approx(0.025),
        True,
    )


def _view(id_: str, begins_s: int, grant: Grant) -> View:
    party = PartyView(party="alpha", state=PartyState.COMMITTED, wanted=None, grant=grant)
    window = Window(begins_at_s=begins_s, ends_at_s=begins_s + 100)
    return View(id=id_, state=ReservationState.COMMITTED, reason="", window=window, parties=(party,))


def test_what_two_have_at_the_same_time_is_found() -> None:
    mine = _view("mine", 1000, Grant(nodes=("a1", "a2"), addresses="10.1.0.0/29", segment=7))
    others = [
        _view("before", 900, Grant(nodes=("a1",))),
        _view("node", 950, Grant(nodes=("a1", "a3"))),
        _view("range", 1099, Grant(addresses="10.1.0.4/30")),
        _view("segment", 1050, Grant(segment=7)),
    ]
    assert list(clashes(mine, others)) == [
        "a1 is promised to node and to mine",
        "10.1.0.4 is promised to range and to mine",
        "segment 7 is promised to segment and to mine",
    ]


def test_a_full_store_is_one_that_can_be(tmp_path: Path) -> None:
    records = packed(500, random.Random(1), 1_800_000_000)
    with Database(tmp_path / "full.db") as database:
        with database.write() as connection:
            set_links(connection, {"a-b": 10**12})
        fill(database, records, flows={"a-b": 1000})
        assert audit(database) == []


def test_node_managers_are_heard_and_counted() -> None:
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are entered by nobody else
        found = hub.measure(20, 1, 0.2, Path(directory) / "hub", lambda _: None)
    figures_of = {one.name: one.value for one in hub.figures(found)}
    assert figures_of["hub_notes_per_s_20"]
    assert figures_of["hub_memory_mib_20"]
    assert figures_of["hub_dialled_s_20"]
