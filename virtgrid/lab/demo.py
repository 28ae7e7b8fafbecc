"""``virtgrid lab demo``: one web guest under load, migrated once plainly and once gated, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from virtgrid.core.events import Record
from virtgrid.core.units import format_duration, format_size
from virtgrid.lab.felt import Felt, LoadWanted, under_load
from virtgrid.lab.guest import GuestSpec
from virtgrid.lab.layout import LabConfig, LinkSpec
from virtgrid.lab.stage import Journey, Stage, Tell, lab_name, staged
from virtgrid.report.html import render_comparison
from virtgrid.report.png import render_png
from virtgrid.report.timeline import Timeline

#: A load goes on for so long after its migration: what the pause delayed is answered by then.
_AFTER_S: Final = 5.0
_GUEST: Final = "web"

Row = tuple[str, str, str]


class Watcher(Protocol):
    """Whoever shows a migration while it runs."""

    def on_record(self, record: Record) -> None: ...

    def tick(self) -> None: ...


Watching = Callable[[], AbstractContextManager[Watcher]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """What is shown. seed: the same one gives the same sessions, though not the same moments."""

    sessions: int = 60
    seed: int = 1
    rate_bytes_s: float = 12.5e6
    rtt_s: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """One of the two migrations: its journey, its timeline, and what the clients felt."""

    journey: Journey
    timeline: Timeline
    felt: Felt


def play(plan: DemoPlan, tell: Tell, watching: Watching, *, keep: bool = False) -> tuple[Half, Half, str]:
    """Both migrations -> (plain, gated, name of the lab). The lab is gone afterwards unless kept."""
    config = LabConfig(name=lab_name("demo"), wan=LinkSpec(rate_bytes_s=plan.rate_bytes_s, rtt_s=plan.rtt_s))
    with staged(config, tell, keep=keep) as stage:
        stage.boot(GuestSpec(name=_GUEST))
        tell("")
        tell("1 of 2: plain libvirt, which stops the guest as soon as its memory fits")
        plain = _half(stage, plan, watching, "--policy", "immediate")
        tell("")
        tell("2 of 2: gated, which waits for a moment when the clients do not need the guest")
        gated = _half(stage, plan, watching, "--policy", "backoff")
        tell("")
    return plain, gated, config.name


def _half(stage: Stage, plan: DemoPlan, watching: Watching, *options: str) -> Half:
    address = stage.guests[_GUEST].spec.address
    wanted = LoadWanted(address=address, sessions=plan.sessions, shape="bursty", seed=plan.seed)
    stage.tell(f"{plan.sessions} web sessions are coming up …")
    with under_load(stage.lab, wanted) as load:
        with watching() as watcher:
            journey = stage.migrate(_GUEST, *options, on_record=watcher.on_record, on_tick=watcher.tick)
        stage.tell("the sessions go on for a moment …")
        load.run_for(_AFTER_S)
        told = load.stop()
    return Half(journey=journey, timeline=journey.timeline, felt=told)


# --- what is left to read: pure, but for write_report -------------------------------------------


def rows(plain: Half, gated: Half) -> list[Row]:
    """Name, plain, gated: as words."""

    def both(name: str, show: Callable[[Half], str]) -> Row:
        return name, show(plain), show(gated)

    def seconds(value: float | None) -> str:
        return "–" if value is None else format_duration(value)

    return [
        both("connections unsuitable at the pause", lambda h: _or_dash(h.timeline.unsuitable_at_pause)),
        both("guest stopped", lambda h: seconds(h.timeline.downtime_s)),
        both("held back until then", lambda h: seconds(h.timeline.held_s) if h.timeline.hold else "–"),
        both("total", lambda h: seconds(h.timeline.total_s)),
        both("sent over the WAN", lambda h: format_size(h.journey.sent_bytes)),
        both("requests", lambda h: f"{h.felt.requests}"),
        both("  answered well (the paper's limits)", lambda h: _share(h.felt.good_tolerable)),
        both("  delayed by more than 100 ms", lambda h: f"{h.felt.delayed}"),
        both("  the longest of a page or image", lambda h: seconds(h.felt.worst_s)),
    ]


def sentence(plain: Half, gated: Half) -> str:
    """What the two show, in a sentence or two."""
    hit, spared = plain.timeline.unsuitable_at_pause, gated.timeline.unsuitable_at_pause
    if hit is None or spared is None:
        return "The connections at the pause were not counted in both."
    waited = format_duration(gated.timeline.held_s or 0.0)
    text = (
        f"Plain libvirt stopped the guest while {hit} connections needed it;"
        f" virtgrid waited {waited} and stopped it while {spared} did."
    )
    if hit <= spared:
        text += " This time plain libvirt was lucky: the load comes in bursts, and it hit a gap."
    return text


def write_report(out: Path, plain: Half, gated: Half) -> list[Path]:
    """demo.html, a PNG and the journal of each half -> the files written. Errors: OSError."""
    out.mkdir(parents=True, exist_ok=True)
    page = render_comparison(
        {"plain": plain.timeline, "gated": gated.timeline},
        [
            (name, first, second, unit)
            for name, first, second, unit in (
                ("sent over the WAN", _mib(plain), _mib(gated), "MiB"),
                ("requests of the clients", plain.felt.requests, gated.felt.requests, ""),
                ("answered well", _percent(plain), _percent(gated), "%"),
                ("delayed by more than 100 ms", plain.felt.delayed, gated.felt.delayed, ""),
                ("longest page or image", plain.felt.worst_s, gated.felt.worst_s, "s"),
            )
        ],
    )
    written = [out / "demo.html"]
    written[0].write_text(page, encoding="utf-8")
    for name, half in (("plain", plain), ("gated", gated)):
        written.append(out / f"demo-{name}.png")
        written[-1].write_bytes(render_png(half.timeline))
        written.append(out / f"demo-{name}.jsonl")
        lines = [json.dumps(record.as_dict(), ensure_ascii=False) for record in half.journey.records]
        written[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return written


def _or_dash(value: int | None) -> str:
    return "–" if value is None else str(value)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _mib(half: Half) -> float:
    return round(half.journey.sent_bytes / 2**20, 1)


def _percent(half: Half) -> float | None:
    share = half.felt.good_tolerable
    return None if share is None else round(share * 100, 1)
