"""What a guest's clients felt of one pause: pings lost, and how long requests stood still."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from virtgrid.core.errors import DeadlineError, LabError
from virtgrid.lab.lab import Lab

_READY_S: Final = 30.0
_END_S: Final = 60.0
#: Only what was under way around the pause is the pause's: the rest of a migration has queues of its own.
AROUND_S: Final = 3.0

Probes = Sequence[tuple[float, float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeltPause:
    """pings_lost: of those sent around the pause. stalls: the longest request under way in it, seconds;
    None when one was never answered, or none was under way. awake_s: from the guest's going on until the
    first answer to a ping is here: the way, and what a guest under emulation needs to get going."""

    pings_sent: int
    pings_lost: int
    stall_kept_s: float | None
    stall_new_s: float | None
    awake_s: float | None


def felt_pause(probes: Mapping[str, Probes], stopped_s: float, resumed_s: float) -> FeltPause:
    """From the prober's times and those of the pause, on the same monotonic clock. Pure."""
    near = [one for one in probes["pings"] if stopped_s - AROUND_S <= one[0] <= resumed_s + AROUND_S]
    return FeltPause(
        pings_sent=len(near),
        pings_lost=sum(end_s is None for _, end_s in near),
        stall_kept_s=_longest(probes["kept"], stopped_s, resumed_s),
        stall_new_s=_longest(probes["new"], stopped_s, resumed_s),
        awake_s=min(
            (end_s - resumed_s for _, end_s in near if end_s is not None and end_s > resumed_s), default=None
        ),
    )


def _longest(times: Probes, stopped_s: float, resumed_s: float) -> float | None:
    under_way = [one for one in times if one[0] <= resumed_s and (one[1] is None or one[1] >= stopped_s)]
    ended = [end_s - begun_s for begun_s, end_s in under_way if end_s is not None]
    return max(ended) if ended and len(ended) == len(under_way) else None


class Prober:
    """The prober at a lab's client. ``stop`` ends it and tells its times."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def stop(self) -> dict[str, list[tuple[float, float | None]]]:
        """Errors: LabError when it has ended by itself."""
        try:
            told, _ = self._process.communicate(timeout=_END_S)
            return {kind: [(a, b) for a, b in times] for kind, times in json.loads(told).items()}
        except (ValueError, subprocess.TimeoutExpired) as error:
            raise LabError("what probes the guest did not end well", cause=str(error)) from error


@contextlib.contextmanager
def probing(lab: Lab, address: str) -> Iterator[Prober]:
    """Probe a guest for as long as the block lasts, or until ``stop``. Errors: DeadlineError."""
    process = subprocess.Popen(
        lab.client.argv([sys.executable, "-I", "-m", "virtgrid.lab.load.prober", address]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        ready = select.select([process.stdout], [], [], _READY_S)[0]
        if not ready or process.stdout.readline().strip() != "ready":
            raise DeadlineError(f"{address} did not answer what probes it within {_READY_S:g} s")
        yield Prober(process)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
