"""What a user of the grid types: a program over sandboxes of two sites, and its end whatever dies."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virtgrid.grid.messages.job import Finished, JobState, JobTold, NodeTold, Verdict, Wrote
from virtgrid.lab.gridlab import ACCOUNT, GridLab, JournalLine, timeline
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


ONE_EACH = ("--nodes", "alice:1,bob:1", "--walltime", "5m")
COUNT = ("sh", "-c", "seq 1 2000; while [ ! -e go ]; do sleep 0.02; done; seq 2001 4000; exit 5")
NUMBERS = "".join(f"{number}\n" for number in range(1, 4001))


def go(grid: GridLab, name: str = "go") -> None:
    (grid.home / ACCOUNT / name).touch()


@pytest.fixture(autouse=True)
def fresh_home(module_grid: GridLab) -> None:
    (module_grid.home / ACCOUNT / "go").unlink(missing_ok=True)


@pytest.mark.parametrize("who", ["grc", "crm-alice"])
def test_who_is_killed_at_every_step_and_comes_back_loses_nothing_and_doubles_nothing(
    grid: GridLab, who: str
) -> None:
    steps = {
        JobState.MUSTERING, JobState.EQUIPPING, JobState.LAUNCHING, JobState.RUNNING, JobState.DISMISSING
    }  # fmt: skip
    lines = []
    for line in grid.job(ONE_EACH, COUNT):
        lines.append(line)
        if isinstance(line, JobTold) and line.state in steps:
            steps.remove(line.state)
            grid.kill(who)
            grid.start(who)
            if line.state is JobState.RUNNING:
                go(grid)
    assert not steps
    assert end(lines).verdict is Verdict.FINISHED, end(lines)
    assert output(lines) == NUMBERS
    (last,) = [one for one in lines if isinstance(one, Finished)]
    assert last.status == 5


def pilot_of(grid: GridLab, node: str) -> int:
    """The process of a node's pilot."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            here = [word for word in words if word.startswith(b"/run/virtgrid/pilots/")]
            if here and f"/{node}-".encode() in here[0] and str(grid.home).encode() in b" ".join(words):
                return int(entry.name)
    raise AssertionError(f"{node} has no pilot")


def test_a_pilot_that_is_killed_comes_back_and_no_end_of_a_program_is_made_up(grid: GridLab) -> None:
    lines, killed = [], set()

    def kill(node: str) -> None:
        if node not in killed:
            killed.add(node)
            os.kill(pilot_of(grid, node), signal.SIGKILL)

    for line in grid.job(ONE_EACH, COUNT):
        lines.append(line)
        if isinstance(line, JobTold) and line.state is JobState.RUNNING:
            kill("bob1")
        if killed and output(lines).endswith("\n2000\n"):  # the job goes on without the one
            kill("alice1")
    assert killed == {"alice1", "bob1"}
    (last,) = [one for one in lines if isinstance(one, Finished)]
    assert last.status is None
    assert "restarted" in (last.problem or "")
    assert end(lines).verdict is Verdict.FINISHED
    assert "not known" in end(lines).reason


def test_a_sandbox_that_dies_breaks_the_job_by_name(grid: GridLab) -> None:
    lines = []
    for line in grid.job(ONE_EACH, COUNT):
        lines.append(line)
        if isinstance(line, JobTold) and line.state is JobState.RUNNING:
            (name,) = [one for one in grid.lab.site("bob").domains() if one.startswith("bob1-")]
            os.kill(grid.lab.site("bob").domains()[name], signal.SIGKILL)
    assert end(lines).verdict is Verdict.BROKEN
    assert end(lines).reason.startswith("bob: bob1: ")


def test_the_end_of_the_window_ends_what_nobody_else_does(grid: GridLab) -> None:
    def state() -> dict[str, str]:
        found = json.loads(grid.say("job", "show", "--json", "late").stdout)
        return {"state": found["state"], "verdict": found["verdict"]}

    options = [*ONE_EACH[:2], "--walltime", "16s", "--id", "late"]
    assert grid.say("job", "submit", *options, "--", *COUNT).returncode == 0
    until(lambda: state()["state"] in ("RUNNING", "DISMISSING", "OVER"))  # a busy machine may be late for it
    for who in ("grc", "crm-alice"):
        grid.kill(who)
    until(lambda: not any(site.domains() for site in grid.sites))
    for who in ("grc", "crm-alice"):
        grid.start(who)
        grid.wait(who)
    until(lambda: state() == {"state": "OVER", "verdict": "ENDED"})


def until(true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until_s
        time.sleep(0.1)


def test_ctrl_c_ends_the_job_and_not_only_the_view(grid: GridLab) -> None:
    words = ["job", "run", *ONE_EACH, "--id", "interrupted", "--", *COUNT]
    with subprocess.Popen(
        grid.argv(*words), env=dict(grid.environment), cwd="/", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "job interrupted was cancelled" in said
    shown = json.loads(grid.say("job", "show", "--json", "interrupted").stdout)
    assert (shown["state"], shown["verdict"]) == ("OVER", "CANCELLED")
    assert {one["state"] for one in shown["node_list"]} == {"DONE"}
    assert grid.say("job", "logs", "interrupted").stdout.startswith("1\n2\n3\n")
