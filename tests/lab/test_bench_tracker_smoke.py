"""The live half of the tracker bench measures what it names: a short run, not judged by its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from virtgrid.net import netns

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and captures need root"),
]

NAMED = ("in_path_skipped_us", "in_path_delivered_us", "live_loss_points", "live_cpu_share", "ring_drops")


def test_bench_tracker_live_measures_everything_it_promises() -> None:
    words = ["bench", "tracker", "--only", "live", "--quick", "--live-rounds", "2", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "virtgrid.cli.main", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    told = json.loads(out)
    figures = {one["name"]: one for one in told["figures"]}
    assert all(figures[name]["n"] > 0 and figures[name]["goal"] for name in NAMED), figures
    for one in told["raw"]["live"]["rounds"]:
        watched, asked = one["with"]["watch"], one["with"]["ask"]
        assert watched["capture"] == "ebpf"
        # The tracker saw every answer: those counted, the first one, and the download's.
        assert watched["responses"] == asked["answered"] + 2
        assert watched["gaps"] == watched["dropped"] == 0
        # The download stays in the kernel: what is read is requests and answers.
        assert watched["frames"] < 2 * asked["asked"] + 1000
    assert netns.names(f"vgb{process.pid}") == []
