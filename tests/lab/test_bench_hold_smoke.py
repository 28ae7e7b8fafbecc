"""The hold bench runs end to end and says what it is asked to: a short one, whose figures are not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

NAMED = ("held_s_idle", "held_s_busy", "wan_bytes_per_dirtied_byte", "release_to_pause_ms", "answering_after")


def test_bench_hold_measures_everything_it_promises(lab_possible: None, tmp_path: Path) -> None:
    words = ["bench", "hold", "--hold", "4s", "--migrations", "1", "--sessions", "10", "--rtt", "10ms"]
    done = subprocess.run(
        [sys.executable, "-m", "virtgrid.cli.main", *words, "--json", "--journals", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["bench"] == "hold"
    figures = {one["name"]: one for one in told["figures"]}
    assert all(figures[name]["n"] > 0 for name in NAMED), figures
    assert figures["held_s_idle"]["ok"], told["raw"]["idle"]
    assert figures["held_s_busy"]["ok"], told["raw"]["busy"]
    assert figures["answering_after"]["value"] == 1, told["raw"]["migrations"]
    assert len(list(tmp_path.glob("*.jsonl"))) == 3
    assert "is down" in done.stderr.splitlines()[-1]
