"""What a user of the grid types: a program over sandboxes of two sites, and its end whatever dies."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator

import pytest

from virtgrid.grid.messages.job import Finished, JobState, JobTold, NodeTold, Verdict, Wrote
from virtgrid.lab.gridlab import GridLab, JournalLine, timeline
from virtgrid.lab.lab import Lab

pytestmark = pytest.mark.lab

BOTH = ("--nodes", "alice:2,bob:2", "--walltime", "5m")


@pytest.fixture(scope="module")
def module_grid(lab: Lab) -> Iterator[GridLab]:
    Lab.up(lab.config)
    with GridLab(lab) as grid:
        yield grid


@pytest.fixture
def grid(module_grid: GridLab) -> Iterator[GridLab]:
    yield module_grid
    until_nothing_left(module_grid)


def until_nothing_left(grid: GridLab, timeout_s: float = 60.0) -> None:
    until_s = time.monotonic() + timeout_s
    while left := grid.left():
        assert time.monotonic() < until_s, left
        time.sleep(0.05)


def output(lines: list[JournalLine], stream: str = "stdout") -> str:
    pieces = [base64.b64decode(one.data) for one in lines if isinstance(one, Wrote) and one.stream == stream]
    return b"".join(pieces).decode()


def end(lines: list[JournalLine]) -> JobTold:
    last = lines[-1]
    assert isinstance(last, JobTold), lines
    assert last.state is JobState.OVER
    return last


def test_a_program_runs_at_one_site(grid: GridLab) -> None:
    ran = grid.say(
        "job", "run", "--nodes", "alice:1", "--walltime", "5m", "--", "sh", "-c", "hostname; exit 3"
    )
    assert ran.returncode == 3, ran.stderr
    assert ran.stdout.startswith("alice1-")


def test_an_mpi_program_runs_across_both_sites(grid: GridLab) -> None:
    lines = list(grid.job([*BOTH, "--bandwidth", "50mbit"], ["mpirun", "-np", "4", "hostname"]))
    assert end(lines).verdict is Verdict.FINISHED
    nodes = sorted({one.sandbox for one in lines if isinstance(one, NodeTold)})
    assert sorted(output(lines).split()) == nodes, output(lines, "stderr")
    assert len(nodes) == 4
    (last,) = [one for one in lines if isinstance(one, Finished)]
    assert last.status == 0
    print(*timeline(lines), sep="\n")
