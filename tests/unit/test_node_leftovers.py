"""What is left in the control group of a dead container is ended, and of a living one left alone."""

from __future__ import annotations

import os
import select
import subprocess
from pathlib import Path

from virtgrid.grid.node import leftovers


def test_members_of_a_group_are_killed_and_waited_for(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    handle = os.pidfd_open(child.pid)
    try:
        inner = tmp_path / "inner"
        inner.mkdir()
        (inner / "cgroup.procs").write_text(f"{child.pid}\n")
        (tmp_path / "cgroup.procs").write_text("")
        leftovers._end(tmp_path)
        assert select.select([handle], [], [], 0)[0]
        assert child.wait(10) == -9
    finally:
        os.close(handle)
        child.kill()
        child.wait()


def test_a_living_controller_is_not_taken_for_dead() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert not leftovers._dies(child.pid, 0.0)
        child.kill()
        assert leftovers._dies(child.pid, 10.0)
    finally:
        child.kill()
        child.wait()
    assert leftovers._dies(child.pid, 0.0)
