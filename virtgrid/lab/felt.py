"""A stretch of web load around something that happens to the guest, and what its clients felt."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from virtgrid.core.units import format_duration
from virtgrid.lab.lab import Lab
from virtgrid.lab.load import qos
from virtgrid.lab.load.run import LoadProcess, LoadResult

#: From the moment every session has begun; about half a cycle of the bursts, so that the crowd of
#: first requests is over before anybody measures.
LEAD_IN_S: Final = 5.0
_READY_S: Final = 90.0
_POLL_S: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadWanted:
    """A load on a guest at ``address``; the same seed gives the same sessions."""

    address: str
    sessions: int
    shape: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Felt:
    """What the clients of one stretch felt.

    good_tolerable: share of requests by the paper's limits. delayed: small requests that took more
    than 100 ms longer than usual (qos.delayed), delayed_share: of the small requests.
    worst_s: the longest small request. outstanding: small requests under way, over time.
    """

    seconds: float
    requests: int
    failed: int
    good_tolerable: float | None
    delayed: int
    delayed_share: float | None
    worst_s: float | None
    outstanding: qos.Burstiness

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def in_words(self) -> str:
        """For a line of progress."""
        share = "no requests" if self.good_tolerable is None else f"{self.good_tolerable:.1%} good"
        worst = "" if self.worst_s is None else f", longest {format_duration(self.worst_s)}"
        return f"{self.requests} requests, {share}, {self.delayed} delayed{worst}"


def felt(result: LoadResult, begin_s: float) -> Felt:
    """The figures of a load's requests since ``begin_s`` (monotonic)."""
    window = (begin_s, result.end_s)
    inside = [one for one in result.requests if one.start_s < result.end_s and one.end_s > begin_s]
    small = [one for one in inside if one.kind != "download"]
    grades = qos.quality(result.requests, window)
    delayed = qos.delayed(result.requests, window)
    return Felt(
        seconds=result.end_s - begin_s,
        requests=len(inside),
        failed=sum(not one.ok for one in inside),
        good_tolerable=grades.good_tolerable,
        delayed=delayed,
        delayed_share=delayed / len(small) if small else None,
        worst_s=max((one.duration_s for one in small), default=None),
        outstanding=qos.burstiness(result.requests, window),
    )


class Stretch:
    """A load under way. ``stop`` ends it; what it tells is of the time since ``begin``, or since the
    stretch was handed out."""

    def __init__(self, process: LoadProcess) -> None:
        self._process = process
        self._begin_s = time.monotonic()

    def begin(self) -> None:
        """What counts begins now."""
        self._begin_s = time.monotonic()

    def run_for(self, seconds: float) -> None:
        """Let it run. Errors: LabError when it has ended by itself."""
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            self._process.wait_ready(_READY_S)  # it has been ready; this finds out when it died
            time.sleep(min(_POLL_S, left_s))

    def stop(self) -> Felt:
        """End it and tell what its clients felt. Errors: LabError."""
        return felt(self._process.stop(), self._begin_s)


@contextlib.contextmanager
def under_load(lab: Lab, wanted: LoadWanted) -> Iterator[Stretch]:
    """A load in full swing for as long as the block lasts."""
    with LoadProcess(
        lab.client.argv,
        f"http://{wanted.address}",
        sessions=wanted.sessions,
        shape=wanted.shape,
        seed=wanted.seed,
    ) as process:
        process.wait_ready(_READY_S)
        Stretch(process).run_for(LEAD_IN_S)
        yield Stretch(process)
