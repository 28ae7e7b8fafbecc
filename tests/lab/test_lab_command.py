"""`virtgrid lab` as a person types it: words in, sentences and exit statuses out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.lab

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def virtgrid(lab_name: str) -> Command:
    """Run ``virtgrid lab VERB --lab NAME …``."""

    def run(verb: str, *words: str, **more: object) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-c", "from virtgrid.cli.main import main; main()", "lab", *verb.split()]
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            [*start, "--lab", lab_name, *words], capture_output=True, text=True, timeout=120, **more
        )

    return run


def test_a_lab_from_up_to_down(virtgrid: Command, lab_name: str) -> None:
    up = virtgrid("up", "--rate", "50mbit", "--rtt", "20ms", "--json")
    assert up.returncode == 0, up.stderr
    made = json.loads(up.stdout)
    assert made["wan"]["rate_bytes_s"] == 6.25e6
    assert [site["libvirtd"] for site in made["sites"]] == ["running", "running"]
    assert "is up after" in up.stderr

    again = virtgrid("up", "--rate", "20mbit")
    assert again.returncode == 0
    assert "was up already" in again.stderr

    shown = virtgrid("status")
    assert "20 Mbit/s" in shown.stdout
    assert "alice → bob" in shown.stdout

    echoed = virtgrid("exec", "alice", "--", "sh", "-c", "hostname; cat; exit 7", input="through stdin\n")
    assert (echoed.returncode, echoed.stdout) == (7, "alice\nthrough stdin\n")
    assert virtgrid("exec", "client", "true").returncode == 0

    cut = virtgrid("break wan", "--cut", "--for", "1h")
    assert cut.returncode == 0
    wan = json.loads(virtgrid("status", "--json").stdout)["wan"]
    assert wan["cut"]
    assert 3500 < wan["restored_in_s"] <= 3600
    assert virtgrid("break wan", "--restore").returncode == 0
    assert not json.loads(virtgrid("status", "--json").stdout)["wan"]["cut"]

    assert virtgrid("break libvirtd", "bob").returncode == 0
    assert virtgrid("break libvirtd", "bob").returncode == 4
    assert json.loads(virtgrid("status", "--json").stdout)["sites"][1]["libvirtd"] == "dead"
    mended = virtgrid("up", "--rate", "20mbit")
    assert "mended: libvirtd of bob" in mended.stderr

    down = virtgrid("down")
    assert down.returncode == 0
    assert f"lab '{lab_name}' is down" in down.stderr
    assert virtgrid("status").returncode == 4
    assert virtgrid("down").returncode == 0


def test_unknown_site_and_missing_program_are_told(virtgrid: Command) -> None:
    assert virtgrid("up").returncode == 0
    unknown = virtgrid("exec", "zoe", "true")
    assert unknown.returncode == 4
    assert "no site 'zoe'" in unknown.stderr
    assert "alice, bob" in unknown.stderr
    assert virtgrid("exec", "alice", "no-such-program").returncode == 127


def test_without_root_there_is_one_sentence(lab_name: str) -> None:
    # Pretended: the checkout may lie where nobody else may read.
    script = "import os; os.geteuid = lambda: 1000; from virtgrid.cli.main import main; main()"
    for verb in ("up", "down", "status"):
        refused = subprocess.run(
            [sys.executable, "-c", script, "lab", verb, "--lab", lab_name],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert refused.returncode == 3, refused.stderr
        assert "needs root" in refused.stderr
        assert "Traceback" not in refused.stderr
