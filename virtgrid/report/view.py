"""The live view of a migration on a terminal: what it does, how far it is, and for whom it waits.

``render_model`` is pure: a Status and the time in, a renderable out. ``LiveView`` holds the
fold and the screen; whoever runs the migration drives it. Every text goes through rich's Text,
which knows no markup, and through ``clean``, which lets no control character pass.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from virtgrid.core.events import Record
from virtgrid.core.units import format_duration, format_rate, format_size
from virtgrid.report.fold import Fold
from virtgrid.report.model import Outcome, State, Status
from virtgrid.report.words import (
    busy_text,
    checks_text,
    hold_facts,
    ram_facts,
    storage_facts,
    verdict,
)

#: What the person sees for each phase of the journal; release and switchover are one moment.
STEPS: Final = (
    ("preflight", ("preflight", "prepare")),
    ("storage copy", ("storage",)),
    ("precopy", ("precopy",)),
    ("holding", ("hold",)),
    ("switchover", ("release", "switchover")),
    ("verify", ("verify",)),
    ("clean-up", ("cleanup",)),
)
MOST_BUSY_SHOWN: Final = 5
_LABEL_WIDTH: Final = 13
_INDENT: Final = 2 + 2 + _LABEL_WIDTH + 1
_GAP: Final = "   "
_MARKS: Final = {"done": ("✓", "green"), "now": ("●", "cyan"), "next": ("○", "dim"), "broken": ("✗", "red")}


def flow(facts: Iterable[str], width: int, indent: int = _INDENT) -> list[str]:
    """Facts set side by side, in as many lines as the width asks for."""
    lines: list[str] = []
    for fact in facts:
        if lines and indent + cell_len(lines[-1]) + len(_GAP) + cell_len(fact) <= width:
            lines[-1] += _GAP + fact
        else:
            lines.append(fact)
    return lines


def bar(fraction: float, cells: int) -> str:
    """A bar of ``cells`` characters."""
    full = round(min(1.0, max(0.0, fraction)) * cells)
    return "━" * full + "╌" * (cells - full)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _step_state(names: tuple[str, ...], status: Status) -> str:
    spans = [span for span in status.phases if span.name in names]
    if not spans:
        return "next"
    if any(span.broken for span in spans):
        return "broken"
    if spans[-1].end_s is None:
        return "broken" if status.outcome is Outcome.CRASHED else "now"
    return "done"


def _facts(names: tuple[str, ...], mark: str, status: Status, now_s: float) -> list[str]:
    spans = [span for span in status.phases if span.name in names]
    took = format_duration(
        max(0.0, (now_s if spans[-1].end_s is None else spans[-1].end_s) - spans[0].start_s)
    )
    first = names[0]
    if first == "preflight":
        return [text for text in (checks_text(status), took) if text]
    if first == "storage" and status.disks:
        return [*storage_facts(status), *([f"in {took}"] if mark == "done" else [])]
    if first == "precopy" and status.ram:
        if mark == "done":
            return [f"{format_size(status.ram.sent_bytes)} sent in {took}"]
        return ram_facts(status.ram)
    if first == "hold" and status.hold:
        if mark == "done":
            held = [format_duration(status.held_s)] if status.held_s is not None else []
            gone = status.released
            return [*held, *([f"released by {gone.by}: {gone.reason}"] if gone else [])]
        return hold_facts(status, now_s)
    if first == "release" and status.downtime_s is not None:
        return [f"guest stopped {format_duration(status.downtime_s)}"]
    if first == "release" and status.stopped_s is not None:
        return [f"guest stopped, {format_duration(max(0.0, now_s - status.stopped_s))} so far"]
    if first == "verify" and status.verified:
        word = {"yes": "the guest answers", "no": "the guest does NOT answer"}.get(
            status.verified.answering, "not known whether the guest answers"
        )
        return [word, status.verified.how]
    return [took, *([spans[-1].text] if spans[-1].text else [])]


def _progress(names: tuple[str, ...], mark: str, status: Status, width: int) -> Text | None:
    """A bar, only for the two things that can only grow: the storage copy and the first pass."""
    share = None
    if mark == "now" and names == ("storage",):
        share = status.storage_fraction
    elif mark == "now" and names == ("precopy",) and (status.first_pass or 1.0) < 1.0:
        share = status.first_pass
    if share is None:
        return None
    cells = max(8, min(40, width - _INDENT - 8))
    return _line(f"{' ' * _INDENT}{bar(share, cells)} {int(share * 100):3d} %", "cyan")


def _holding(status: Status, now_s: float, width: int) -> list[Text]:
    """For whom it waits: the memory that is kept small, the gate's word, the connections."""
    out: list[Text] = []
    pad = " " * 6
    if status.ram is not None:
        facts = [f"remaining {format_size(status.ram.remaining_bytes)}"]
        if status.ram.dirty_bytes_s is not None:
            facts.append(f"dirty {format_rate(status.ram.dirty_bytes_s)}")
        if status.gate and status.gate.allowed is not None:
            fewer = " or fewer" if status.gate.allowed else ""
            facts.append(f"switches at {status.gate.allowed} unsuitable{fewer}")
        if status.hold and status.hold.kind:
            facts.append(f"hold: {status.hold.kind}")
        out += [_line(" " * _INDENT + text, "dim") for text in flow(facts, width)]
    for busy in status.unsuitable[:MOST_BUSY_SHOWN]:
        line = Text(pad, no_wrap=True, overflow="ellipsis")
        since = format_duration(max(0.0, now_s - busy.since_s))
        room = width - len(pad) - 12 - len(since) - 3
        body = busy_text(busy)
        if cell_len(body) > room > 8:
            body = Text(body)[: room - 1].plain + "…"
        line.append(f"{busy.verdict:<12}", style="yellow" if busy.verdict == "unknown" else "bright_red")
        line.append(f"{body}   {since}")
        out.append(line)
    more = len(status.unsuitable) - MOST_BUSY_SHOWN
    if more > 0:
        out.append(_line(f"{pad}{'':12}and {more} more", "dim"))
    return out


def render_model(status: Status, now_s: float, *, width: int = 80, keys: bool = True) -> RenderableType:
    """The view of one moment. now_s: seconds since the journal's first record."""
    out: list[Text] = []
    head = Text(no_wrap=True, overflow="ellipsis")
    head.append(f"{status.domain}: {status.source} → {status.destination}", style="bold")
    elapsed = status.total_s if status.end is not None and status.total_s is not None else now_s
    head.append(f"   {format_duration(max(0.0, elapsed))}", style="cyan")
    head.append(f"   {status.id}", style="dim")
    out.append(head)
    ended = status.outcome is not Outcome.RUNNING
    for label, names in STEPS:
        mark = _step_state(names, status)
        if mark == "next" and (ended or names == ("cleanup",)):
            continue
        if mark == "next" and names == ("hold",) and status.policy == "immediate":
            continue  # plain migrations do not hold
        symbol, style = _MARKS[mark]
        facts = _facts(names, mark, status, now_s) if mark != "next" else []
        lines = flow(facts, width) or [""]
        first = Text("  ", no_wrap=True, overflow="ellipsis")
        first.append(f"{symbol} ", style=style)
        first.append(
            f"{label:<{_LABEL_WIDTH}} ", style="bold" if mark == "now" else style if mark == "next" else ""
        )
        first.append(lines[0])
        first.rstrip()
        out.append(first)
        out += [_line(" " * _INDENT + text) for text in lines[1:]]
        if (progress := _progress(names, mark, status, width)) is not None:
            out.append(progress)
        if mark == "now" and names == ("hold",):
            out += _holding(status, now_s, width)
    if status.note is not None and not ended:
        out.append(_line(f"  ! {status.note.text}", "yellow"))
    if ended:
        good = status.outcome is Outcome.FINISHED and status.answering != "no"
        out.append(Text(verdict(status), style="bold green" if good else "bold red", overflow="fold"))
        if status.outcome is Outcome.FINISHED and status.end and status.end.hint:
            out.append(Text(f"hint: {status.end.hint}", style="yellow", overflow="fold"))
    elif keys:
        release = "[r] release now   " if status.state is State.HOLDING else ""
        out.append(_line(f"  {release}[a] abort   [d] detach", "dim"))
    return Group(*out)


class LiveView:
    """The view kept current on a console: a journal's listener, refreshed at most ten times a second.

    Use it as a context manager; hand ``on_record`` to ``Journal.listen`` (from any thread) and
    call ``tick`` now and then, so that times move while nothing happens. ``monotonic_s`` must be
    the journal writer's clock.
    """

    def __init__(
        self,
        console: Console,
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
        min_interval_s: float = 0.1,
        keys: bool = True,
    ) -> None:
        self._console = console
        self._monotonic_s = monotonic_s
        self._min_interval_s = max(0.1, min_interval_s)
        self._keys = keys
        self._fold = Fold()
        self._lock = threading.RLock()
        self._drawn_s = float("-inf")
        self._live = Live(console=console, auto_refresh=False, transient=False, vertical_overflow="crop")

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._live.update(self.render(), refresh=True)
            self._live.stop()

    @property
    def status(self) -> Status:
        with self._lock:
            return self._fold.status()

    def on_record(self, record: Record) -> None:
        """Take a record; redraw when a tenth of a second has passed since the last time."""
        with self._lock:
            self._fold.add(record)
            self.tick()

    def tick(self) -> None:
        """Redraw if it is time to."""
        with self._lock:
            now = self._monotonic_s()
            if now - self._drawn_s >= self._min_interval_s and self._live.is_started:
                self._drawn_s = now
                self._live.update(self.render(), refresh=True)

    def render(self) -> RenderableType:
        """What the screen should show now."""
        with self._lock:
            status = self._fold.status()
            if not status.id:
                return Text("")
            now_s = max(status.last_s, self._monotonic_s() - status.origin_mono_s)
            return render_model(status, now_s, width=self._console.width, keys=self._keys)
