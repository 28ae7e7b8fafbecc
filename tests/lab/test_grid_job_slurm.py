"""A user's program over sandboxes of two sites, each with a Slurm of its own."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator

import pytest

from virtgrid.grid.messages.job import Finished, JobState, JobTold, NodeTold, Verdict, Wrote
from virtgrid.lab.gridlab import ACCOUNT, GridLab
from virtgrid.lab.lab import Lab
from virtgrid.lab.slurm import cluster
from virtgrid.lab.slurm.cluster import CONTROLLER, Cluster

pytestmark = pytest.mark.lab

COUNT = ("sh", "-c", "seq 1 2000; while [ ! -e go ]; do sleep 0.02; done; seq 2001 4000; exit 5")
NUMBERS = "".join(f"{number}\n" for number in range(1, 4001))


@pytest.fixture
def grid(lab: Lab) -> Iterator[GridLab]:
    if reason := cluster.obstacle():
        pytest.skip(reason)
    Lab.up(lab.config)
    with GridLab(lab, nodes=1, on_slurm=True) as made:
        (made.home / ACCOUNT / "go").unlink(missing_ok=True)
        yield made
        until(lambda: made.left() == {})


def until(true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until_s
        time.sleep(0.05)


def written_down(slurm: Cluster) -> None:
    """Until slurmctld has on its disk what is true now: it writes after a change, and some time later."""
    state = slurm.directory / "state" / "job_state"
    before = state.stat().st_mtime_ns if state.exists() else 0
    job = slurm.say("sbatch", "--parsable", "--hold", "--wrap=true", "--chdir=/", check=True).stdout.strip()
    until(lambda: state.exists() and state.stat().st_mtime_ns > before)
    slurm.say("scancel", job, check=True)


def test_a_job_runs_on_slurm_and_a_controller_and_a_manager_may_be_killed_meanwhile(grid: GridLab) -> None:
    lines = []
    slurm = grid.slurms["alice"]
    for line in grid.job(["--nodes", "alice:1,bob:1", "--walltime", "5m"], COUNT):
        lines.append(line)
        if isinstance(line, JobTold) and line.state is JobState.RUNNING:
            assert ACCOUNT in slurm.say("squeue", "--noheader", "--format=%u", check=True).stdout
            written_down(slurm)
            slurm.kill(CONTROLLER)
            grid.kill("crm-alice")
            grid.start("crm-alice")
            grid.wait("crm-alice")  # it comes up without its Slurm
            slurm.start(CONTROLLER)
            slurm.wait_answering()
            (grid.home / ACCOUNT / "go").touch()
    last = lines[-1]
    assert isinstance(last, JobTold)
    assert (last.state, last.verdict) == (JobState.OVER, Verdict.FINISHED), last
    pieces = [base64.b64decode(one.data) for one in lines if isinstance(one, Wrote)]
    assert b"".join(pieces).decode() == NUMBERS
    (finished,) = [one for one in lines if isinstance(one, Finished)]
    assert finished.status == 5
    assert {one.site for one in lines if isinstance(one, NodeTold)} == {"alice", "bob"}
