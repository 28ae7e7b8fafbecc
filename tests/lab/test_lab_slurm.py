"""A private Slurm runs real jobs, meets no other one, and leaves nothing, however its owner ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from wire_ends import until

from virtgrid.lab.slurm.cluster import CONTROLLER, Cluster, obstacle

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(obstacle() is not None, reason=obstacle() or "a private Slurm is possible"),
]
OWNER = """
from virtgrid.lab.slurm.cluster import Cluster
with Cluster(["n1"]) as made:
    print(made.directory, flush=True)
    made.say("sbatch", "--wrap=exec sleep 1000", "--output=/dev/null", "--chdir=/", check=True)
    while "RUNNING" not in made.say("squeue", "--format=%T").stdout:
        pass
    print("runs", flush=True)
    input()
"""


def _processes(directory: str) -> list[str]:
    """What mentions a Slurm's directory in its command line or its environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if directory.encode() in words:
                found.append(words.decode(errors="replace")[:200])
    return found


def test_nothing_is_left_when_its_owner_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        directory = owner.stdout.readline().strip()
        assert owner.stdout.readline() == "runs\n"
        assert any("slurmctld" in one for one in _processes(directory))
        owner.kill()
    asyncio.run(until(lambda: not Path(directory).exists() and _processes(directory) == [], timeout_s=60))


async def test_a_daemon_is_killed_and_comes_back_while_another_slurm_knows_nothing_of_it(
    slurm: Cluster,
) -> None:
    with Cluster(["m1", "m2"]) as other:
        other.kill(CONTROLLER)
        assert other.say("scontrol", "ping").returncode != 0
        assert slurm.states() == dict.fromkeys(slurm.nodes, "idle")
        other.start(CONTROLLER)
        other.wait_answering()
        await until(lambda: set(other.states().values()) == {"idle"}, timeout_s=60, pause_s=0.05)
