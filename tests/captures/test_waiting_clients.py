"""On no public capture is a connection suitable while its client waits for an answer.

The checker (checker.py) says who waited, from the frames alone; what the tracker said is held
against that. Each file is also played with a small limit for large transfers, and a hundred times
slower, so that whoever is only called unsuitable for want of silence is found out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import public
import pytest
from checker import claims, clocked, errors, rests

from virtgrid.tracker.definition import Definition, builtin
from virtgrid.tracker.pcap import Frame
from virtgrid.tracker.replay import replay
from virtgrid.tracker.rules import Kind, Pause
from virtgrid.tracker.tracker import LARGE_BYTES, Change

pytestmark = public.needed

#: At least so many requests are certain in the captures: a checker that claims little finds little.
CERTAIN = {"http": 280, "ftp": 1190, "smtp": 940, "pop3": 90, "imap": 34}

#: Between two commands a client of these is suitable only after a silence (docs/reference/tracker.md).
SILENCE_S = {"pop3": 0.3, "smtp": 0.3}
#: Suitable as soon as nothing is outstanding: behind a silence that is asked for faults could hide.
EAGER = [replace(d, pauses={**d.pauses, "idle": Pause(Kind.OK)}) for d in builtin()]

Timelines = dict[tuple[str, str], list[Change]]


def timelines(
    frames: Sequence[Frame], large_bytes: int, definitions: Sequence[Definition] | None = None
) -> Timelines:
    out: Timelines = {}
    for connection in replay(frames, definitions, large_bytes=large_bytes):
        out.setdefault((connection.view.client, connection.view.server), []).extend(connection.timeline)
    for line in out.values():
        line.sort(key=lambda change: change.at_s)
    return out


def slower(frames: Sequence[Frame], factor: float) -> list[Frame]:
    return [f._replace(at_s=f.at_s * factor) for f in frames]


@pytest.mark.parametrize("row", public.index(), ids=lambda row: row["file"])
def test_nobody_who_waits_is_called_suitable(row: dict[str, Any]) -> None:
    frames = clocked(public.frames(row["file"]))
    for played, large_bytes in ((frames, LARGE_BYTES), (frames, 4096), (slower(frames, 100), LARGE_BYTES)):
        assert errors(claims(played, large_bytes), timelines(played, large_bytes)) == []


@pytest.mark.parametrize("row", public.index(), ids=lambda row: row["file"])
def test_where_nothing_is_outstanding_nobody_holds_a_migration_up(row: dict[str, Any]) -> None:
    frames = clocked(public.frames(row["file"]))
    for definitions, silence_s in ((EAGER, {}), (builtin(), SILENCE_S)):
        found = timelines(frames, LARGE_BYTES, definitions)
        assert errors(rests(frames, silence_s), found, ("suitable", "closed")) == []


def test_the_checker_claims_much() -> None:
    counted = dict.fromkeys(CERTAIN, 0)
    for row in public.index():
        for claim in claims(clocked(public.frames(row["file"])), LARGE_BYTES):
            counted[claim.protocol] += 1
    assert all(counted[name] >= least for name, least in CERTAIN.items()), counted


def test_the_checker_knows_many_moments_of_rest() -> None:
    found = [rests(clocked(public.frames(row["file"]))) for row in public.index()]
    assert sum(len(claim.spans) for file in found for claim in file) >= 1500


def broken(line: list[Change], how: str) -> list[Change]:
    """A timeline as a faulty tracker would give it."""
    if how == "never":
        return [c._replace(verdict="suitable") for c in line]
    if how == "later requests missed":
        return [c for i, c in enumerate(line) if not i or c.state != "busy"]
    # early: every wait ends a little before it does
    return [
        c._replace(at_s=c.at_s - (c.at_s - b.at_s) / 4 if c.verdict == "suitable" else c.at_s)
        for b, c in zip([line[0], *line], line, strict=False)
    ]


@pytest.mark.parametrize("how", ["never", "later requests missed", "early"])
def test_a_faulty_tracker_would_be_found_out_on_real_traffic(how: str) -> None:
    rows = [r for r in public.index() if r["truth_confidence"] == "high"]
    caught = considered = 0
    for row in rows:
        frames = clocked(public.frames(row["file"]))
        found = claims(frames, LARGE_BYTES)
        right = timelines(frames, LARGE_BYTES, EAGER)
        wrong = {key: broken(line, how) for key, line in right.items() if line}
        considered += bool(found) and wrong != right
        caught += bool(errors(found, wrong))
    assert caught >= 60
    assert caught >= considered * 0.9, (caught, considered)


def test_a_limit_for_large_transfers_that_is_far_too_low_would_be_found_out() -> None:
    name = "zeek__http__206_example_a.pcap"
    frames = clocked(public.frames(name))
    assert errors(claims(frames, LARGE_BYTES), timelines(frames, 1000))
