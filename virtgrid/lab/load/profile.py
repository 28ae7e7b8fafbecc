"""The model of a web load: who asks for what, and when. Pure; every choice comes from a seeded generator.

After SPECweb2005's Support workload as Ishikawa et al. 2011 (section 5.1) use it: closed-loop
sessions with exponential think times, pages with images over keep-alive connections, and 3.4 % of
requests downloads of 4 MB or more, read no faster than the client's line.

*Bursts.* The paper's Table 1 reports, at the moment plain migration stopped the guest, 13.6 unsuitable
connections on average with a variance of 101 and a minimum of 0: far more than a Poisson
process of that mean has (variance 13.6). Independent sessions cannot give that; a common cause can.
So the default shape is a Markov-modulated one: all sessions share an on/off process, think on
while it is off, and ask when it is on. ``steady`` leaves the modulation out and has about the same
mean; zero then practically never comes.

*Slow pages.* The paper's Apache was loaded so that a page took seconds. The guest here is asked
for rate-limited pages instead (``/slow/14k/…``: the first 14 KiB at once, then 14 KiB a second), so that
a page takes up to two seconds at little cost to an emulated processor.

*Downloads* are 3.4 % of what a session asks for by itself (pages and downloads; images follow from
pages), read by a line just above the paper's limit for Good, so that a pause of a second shows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from virtgrid.core.errors import UsageError

Shape = Literal["bursty", "steady"]
SHAPES: Final[tuple[Shape, ...]] = ("bursty", "steady")

PAGES: Final = 50
IMAGES: Final = 200
DOWNLOADS: Final = 10
SMALL_LIMIT_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A load's numbers. Times in seconds, rates in bytes per second.

    think_s: mean think time; on_s and off_s: uniform ranges of the common on/off process (None:
    always on). jitter_s: mean delay of a session after the process came on. images: per page, inclusive.
    download_share: of page-level requests. line_bytes_s: how fast a client reads a download.
    """

    shape: Shape = "bursty"
    sessions: int = 260
    think_s: float = 2.0
    on_s: tuple[float, float] | None = (3.0, 5.0)
    off_s: tuple[float, float] | None = (3.5, 5.5)
    jitter_s: float = 0.6
    images: tuple[int, int] = (1, 4)
    download_share: float = 0.034
    line_bytes_s: float = 102_000.0
    page_rate: str = "14k"
    timeout_s: float = 20.0

    def __post_init__(self) -> None:
        if not 1 <= self.sessions <= 5000:
            raise UsageError(f"--sessions must be between 1 and 5000, not {self.sessions}")
        if self.shape not in SHAPES:
            raise UsageError(f"--load must be one of {', '.join(SHAPES)}, not '{self.shape}'")


def profile(shape: str, sessions: int) -> Profile:
    """The profile of a shape. Per session the rates are the same, so the counts grow with sessions."""
    if shape == "steady":
        return Profile(shape="steady", sessions=sessions, think_s=3.5, on_s=None, off_s=None)
    if shape == "bursty":
        return Profile(shape="bursty", sessions=sessions)
    raise UsageError(f"--load must be one of {', '.join(SHAPES)}, not '{shape}'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What a session does next: after ``think_s``, one download or one page with its images."""

    think_s: float
    jitter_s: float
    download: str | None = None
    page: str | None = None
    images: tuple[str, ...] = ()


def visits(chosen: Profile, seed: int, session: int) -> Iterator[Visit]:
    """The endless sequence of one session's visits; the same for the same seed and number."""
    rng = random.Random(f"{seed}/{session}")  # noqa: S311 - a workload, not a secret
    while True:
        think_s = rng.expovariate(1 / chosen.think_s)
        jitter_s = rng.expovariate(1 / chosen.jitter_s) if chosen.jitter_s else 0.0
        if rng.random() < chosen.download_share:
            yield Visit(
                think_s=think_s, jitter_s=jitter_s, download=f"/download/{rng.randrange(DOWNLOADS)}.bin"
            )
            continue
        images = tuple(f"/img/{rng.randrange(IMAGES)}.gif" for _ in range(rng.randint(*chosen.images)))
        page = f"/slow/{chosen.page_rate}/page/{rng.randrange(PAGES)}.html"
        yield Visit(think_s=think_s, jitter_s=jitter_s, page=page, images=images)


def switchings(chosen: Profile, seed: int) -> Iterator[tuple[bool, float]]:
    """The common process: (on, for how many seconds), endlessly; only (True, inf) when it is steady."""
    if chosen.on_s is None or chosen.off_s is None:
        yield True, float("inf")
        return
    rng = random.Random(f"{seed}/bursts")  # noqa: S311
    while True:
        yield True, rng.uniform(*chosen.on_s)
        yield False, rng.uniform(*chosen.off_s)
