"""The tutorial does what it says: its commands are run in order, its output compared line by line.

A line that is shown must be seen, in the order shown; what lies between may differ, so may numbers
with their units, and whatever stands where the tutorial writes an ellipsis.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from virtgrid.lab.lab import take_down

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial" / "first-migration.md"
_COMMAND_S = 120.0
_PROMPT = "# "


@dataclass
class Step:
    """One command of the tutorial and the lines it shows."""

    command: str
    shown: list[str] = field(default_factory=list)


def steps(text: str) -> list[Step]:
    """The commands of the fenced console blocks, each with what is shown below it."""
    found: list[Step] = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.M | re.S):
        for line in block.splitlines():
            if line.startswith(_PROMPT):
                found.append(Step(line.removeprefix(_PROMPT)))
            elif line.strip():
                found[-1].shown.append(line)
    return found


def pattern(shown: str, lab_name: str) -> re.Pattern[str]:
    """What a shown line may look like in another lab, on another day."""
    if shown.startswith("exit status"):
        return re.compile(re.escape(shown))
    line = shown.strip().replace(".lab.lab", f".{lab_name}.lab").replace("lab 'lab'", f"lab '{lab_name}'")
    parts = []
    for part in re.split(r"(…|\s+|[0-9]+T[0-9]+|[0-9]+(?:\.[0-9]+)?(?: ?(?:ms|s|[KMG]iB|B)\b)?)", line):
        if part == "…":
            parts.append(".*")
        elif part.isspace():
            parts.append(r"\s+")
        elif re.fullmatch(r"[0-9]+T[0-9]+", part):
            parts.append(r"[0-9]+T[0-9]+")
        elif part and part[0].isdigit() and lab_name not in part:
            parts.append(r"[0-9]+(?:\.[0-9]+)?(?: ?(?:ms|s|[KMG]iB|B)\b)?(?:[0-9]+s)?")
        else:
            parts.append(re.escape(part))
    # Piped, a line of a migration begins with its time.
    return re.compile(r"(?:[0-9:.]+ )?" + "".join(parts) + r"\s*$")


def missing(shown: list[str], said: str, lab_name: str) -> str | None:
    """The first shown line that was not said after the ones before it."""
    lines = iter(said.splitlines())
    for wanted in shown:
        rule = pattern(wanted, lab_name)
        if not any(rule.match(line.strip()) for line in lines):
            return wanted
    return None


@pytest.fixture
def words(lab_possible: None, tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment for a person of this test alone; their lab and their programs are gone afterwards."""
    letters = "".join(chr(ord("a") + int(digit)) for digit in str(os.getpid()))
    name = f"tut{letters}"
    with tempfile.TemporaryDirectory(prefix="vgtut-") as state:
        try:
            yield {
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "VIRTGRID_LAB_NAME": name,
                "VIRTGRID_STATE_DIR": state,
                "NO_COLOR": "1",
            }
        finally:
            take_down(name)


@pytest.mark.lab
@pytest.mark.timeout(600)
def test_the_tutorial_does_what_it_says(words: dict[str, str], tmp_path: Path) -> None:
    name = words["VIRTGRID_LAB_NAME"]
    background: list[subprocess.Popen[bytes]] = []
    try:
        for step in steps(TUTORIAL.read_text(encoding="utf-8")):
            if step.command.endswith("&"):
                background.append(
                    subprocess.Popen(
                        ["bash", "-c", f"exec {step.command.removesuffix('&')}"],
                        env=words,
                        cwd=tmp_path,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                )
                continue
            ran = subprocess.run(
                ["bash", "-c", step.command],
                env=words,
                cwd=tmp_path,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=_COMMAND_S,
                check=False,
            )
            assert ran.returncode == 0, f"{step.command}: status {ran.returncode}\n{ran.stdout}"
            lost = missing(step.shown, ran.stdout, name)
            assert lost is None, f"{step.command}\nshows {lost!r}, but said:\n{ran.stdout}"
        assert not list(tmp_path.iterdir()), "the tutorial leaves files behind"
    finally:
        for process in background:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=30)


def test_every_command_of_the_tutorial_is_found() -> None:
    found = steps(TUTORIAL.read_text(encoding="utf-8"))
    assert len(found) > 15
    assert found[0].command.startswith("virtgrid lab up")
    assert found[-2].command == "virtgrid lab down"
    assert all(step.command.split()[0] in {"virtgrid", "rm"} for step in found)


@pytest.mark.parametrize(
    ("shown", "said", "same"),
    [
        ("web on alice: answers after 5.6 s  (…)", "web on alice: answers after 812 ms  (http)", True),
        ("20261122T050021-web: hold", "20270101T000000-web: hold", True),
        ("alice.lab.lab → bob.lab.lab", "alice.mine.lab → bob.mine.lab", True),
        ("state          failed", "state  finished", False),
        ("exit status 1", "exit status 7", False),
    ],
)
def test_numbers_may_differ_and_words_may_not(shown: str, said: str, same: bool) -> None:
    assert (missing([shown], said, "mine") is None) is same
