"""Was anybody who waited called suitable? An answer that owes nothing to the tracker's code.

From a capture's frames follows, per connection, when a request was certainly outstanding
(checker_flows.py, checker_readers.py). A timeline of verdicts is held against that: a moment in
which it says suitable, or says nothing, is an error, unless a large transfer was under way. Where
the capture leaves doubt (holes, contradicting bytes, unreadable messages, tunnels), nothing is
claimed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from checker_flows import INF, Talk, clocked, talks
from checker_readers import read
from checker_text import Asked

from virtgrid.tracker.pcap import Frame

__all__ = ["Claim", "Error", "claims", "clocked", "errors", "rests"]

Spans = list[tuple[float, float]]


class Verdict(Protocol):
    """One change in a timeline: from ``at_s`` on the verdict is ``verdict``."""

    @property
    def at_s(self) -> float: ...
    @property
    def verdict(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A request was outstanding on this connection in these spans, large transfers left out."""

    client: str
    server: str
    protocol: str
    what: str
    spans: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """Said to be suitable (or not known at all) while a request was outstanding."""

    claim: Claim
    from_s: float
    until_s: float
    said: str


def claims(frames: Sequence[Frame], large_bytes: int) -> list[Claim]:
    """What is certain about a capture; ``frames`` must come from ``clocked``."""
    end_s = frames[-1].at_s + 1e-6 if frames else 0.0
    found = talks(frames)
    out: list[Claim] = []
    for talk in found:
        book = read(talk.up, talk.down, int(talk.server.rpartition(":")[2]))
        until_s = min(talk.over_s, talk.known_until_s, book.certain_until_s, end_s)
        excused = [(a, b) for size, a, b in book.large if size >= large_bytes]
        for asked in book.asked:
            own = [(a, b) for size, a, b in asked.large if size >= large_bytes]
            own += _transfers(asked, talk, found, large_bytes)
            spans = _without([(asked.from_s, min(asked.until_s, until_s))], excused + own)
            if spans:
                out.append(
                    Claim(
                        client=talk.client,
                        server=talk.server,
                        protocol=book.protocol,
                        what=asked.what,
                        spans=tuple(spans),
                    )
                )
    return out


def rests(frames: Sequence[Frame], silence_s: Mapping[str, float] | None = None) -> list[Claim]:
    """When certainly nothing was outstanding: between answers and behind the last (what: "nothing").

    silence_s: by protocol, how much of such a span is left out at its beginning.
    """
    end_s = frames[-1].at_s if frames else 0.0
    out: list[Claim] = []
    for talk in talks(frames):
        book = read(talk.up, talk.down, int(talk.server.rpartition(":")[2]))
        answered = [asked.until_s for asked in book.asked if asked.until_s < INF]
        if not answered:
            continue
        busy: Spans = [(asked.from_s, asked.until_s) for asked in book.asked]
        # An upload may outlast its answer; and between the lines that AUTH asks for it is not at rest.
        busy += [(a, b) for asked in book.asked for _, a, b in asked.large]
        busy += [
            (before.until_s, asked.from_s)
            for before, asked in pairwise(book.asked)
            if asked.what.endswith("a line of it")
        ]
        until_s = min(talk.over_s, talk.known_until_s, book.certain_until_s, end_s)
        spans = _without([(min(answered), until_s)], busy)
        wait_s = (silence_s or {}).get(book.protocol, 0.0)
        spans = [(a + wait_s, b) for a, b in spans if b > a + wait_s]
        out.append(
            Claim(
                client=talk.client,
                server=talk.server,
                protocol=book.protocol,
                what="nothing",
                spans=tuple(spans),
            )
        )
    return out


def _transfers(asked: Asked, control: Talk, found: Iterable[Talk], large_bytes: int) -> Spans:
    """When a large FTP transfer ran: between the same hosts, begun before it was answered."""
    if asked.data is None:
        return []
    from_s, until_s, announced = asked.data
    out: Spans = []
    for talk in found:
        if talk is control or talk.hosts != control.hosts or talk.begun_s > until_s:
            continue
        if max(talk.moved, announced) >= large_bytes and talk.ending_s >= from_s:
            out.append((from_s, min(until_s, talk.ending_s)))
    return out


def _without(spans: Spans, holes: Spans) -> Spans:
    """The spans less the holes; empty ones left out."""
    for a, b in holes:
        spans = (
            [part for x, y in spans for part in ((x, min(y, a)), (max(x, b), y)) if part[1] > part[0]]
            if a < b
            else spans
        )
    return [(x, y) for x, y in spans if y > x]


def errors(
    found: Iterable[Claim],
    timelines: Mapping[tuple[str, str], Sequence[Verdict]],
    right: tuple[str, ...] = ("unsuitable", "unknown"),
) -> list[Error]:
    """Where timelines, by (client, server), contradict the claims; right: what they may say in their spans.

    A connection seen from its middle may have its ends the other way round.
    """
    out: list[Error] = []
    for claim in found:
        line = timelines.get((claim.client, claim.server)) or timelines.get((claim.server, claim.client), ())
        for a, b in claim.spans:
            for from_s, until_s, said in _said(line):
                begin, end = max(a, from_s), min(b, until_s)
                if said not in right and end > begin:
                    out.append(Error(claim=claim, from_s=begin, until_s=end, said=said))
    return out


def _said(line: Sequence[Verdict]) -> Iterable[tuple[float, float, str]]:
    """The line as (from, until, verdict); before its first entry nothing was said."""
    begin, verdict = -INF, "nothing"
    for change in line:
        yield begin, change.at_s, verdict
        begin, verdict = change.at_s, change.verdict
    yield begin, INF, verdict
