"""The connections of one guest on a terminal: which to show, in which order, and the screen. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final

from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.text import Text

from virtgrid.core.units import format_duration, format_size
from virtgrid.report.model import clean
from virtgrid.tracker.tracker import Change
from virtgrid.tracker.views import ConnectionView, Snapshot, Verdict

_GAP: Final = 2
_REASON_MIN: Final = 12
_STYLES: Final = {
    Verdict.UNSUITABLE: "bright_red",
    Verdict.UNKNOWN: "yellow",
    Verdict.SUITABLE: "green",
}
#: From what hurts most to what hurts least.
_RANK: Final = {Verdict.UNSUITABLE: 0, Verdict.UNKNOWN: 1, Verdict.SUITABLE: 2}

Key = Callable[[ConnectionView], tuple[float | str, ...]]
#: What can be sorted by; ties are broken by who has waited longest.
ORDERS: Final[dict[str, Key]] = {
    "verdict": lambda c: (_RANK[c.verdict], c.since_s),
    "time": lambda c: (c.since_s,),
    "bytes": lambda c: (-(c.bytes_to_client + c.bytes_to_server), c.since_s),
    "protocol": lambda c: (c.protocol, _RANK[c.verdict], c.since_s),
    "client": lambda c: (c.client, c.since_s),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which connections are shown, and how they are sorted. Empty: all of them."""

    protocols: frozenset[str] = frozenset()
    verdicts: frozenset[str] = frozenset()
    clients: tuple[IPv4Network | IPv6Network, ...] = ()
    order: str = "verdict"

    @property
    def narrows(self) -> bool:
        return bool(self.protocols or self.verdicts or self.clients)

    def wants(self, one: ConnectionView | Change) -> bool:
        """Whether a connection, or a change of one, is to be shown; an end is, whatever the verdict."""
        if self.protocols and one.protocol not in self.protocols:
            return False
        if self.verdicts and one.verdict not in self.verdicts and one.verdict != "closed":
            return False
        if not self.clients:
            return True
        address = ip_address(one.client.rpartition(":")[0].strip("[]"))
        return any(address in network for network in self.clients)

    def chosen(self, snapshot: Snapshot) -> list[ConnectionView]:
        """The connections to show, in order."""
        return sorted(filter(self.wants, snapshot.connections), key=ORDERS[self.order])


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What the screen is made from: a snapshot and where it came from.

    elapsed_s: since tracking began. dropped: frames the ring had no room for.
    """

    domain: str
    tap: str
    capture: str
    elapsed_s: float
    dropped: int
    snapshot: Snapshot


def count_line(scene: Scene) -> str:
    """``web on vnet3: 12 connections, 2 unsuitable, 1 unknown   ebpf   41 s``."""
    now = scene.snapshot
    counts = [f"{now.total} connection{'' if now.total == 1 else 's'}"]
    counts += [f"{now.unsuitable - now.unknown} unsuitable", f"{now.unknown} unknown"]
    parts = [
        f"{clean(scene.domain)} on {clean(scene.tap)}: {', '.join(counts)}",
        f"capture {clean(scene.capture)}",
        format_duration(scene.elapsed_s),
    ]
    if scene.dropped:
        parts.append(f"{scene.dropped} frames lost")
    return "   ".join(parts)


def change_line(change: Change, clock: str) -> str:
    """A verdict's change, for pipes and logs."""
    who = f"{change.client} → {change.server}"
    return f"{clock} {change.verdict:<10} {change.protocol:<8} {who}  {clean(change.reason)}"


def render(
    scene: Scene, selection: Selection, *, width: int, height: int, keys: bool = True
) -> RenderableType:
    """The screen of one moment, never taller than ``height``."""
    shown = selection.chosen(scene.snapshot)
    first = Text(count_line(scene), style="bold", no_wrap=True, overflow="ellipsis")
    out = [first]
    footer = []
    if selection.narrows:
        footer.append(f"{len(shown)} of {scene.snapshot.total} shown")
    room = max(1, height - 3 - (1 if keys or selection.narrows else 0))
    if len(shown) > room:
        footer.append(f"and {len(shown) - room + 1} more below")
        shown = shown[: room - 1]
    if keys:
        footer.append("[q] quit")
    out += _table(shown, scene.snapshot.at_s, width) if shown else [_dim(_nothing(scene, selection))]
    if footer:
        out.append(_dim("   ".join(footer)))
    return Group(*out)


def _nothing(scene: Scene, selection: Selection) -> str:
    if scene.snapshot.total and selection.narrows:
        return "no connection that is asked for"
    return "no TCP connection seen yet; one that is silent shows with its next packet"


def _dim(text: str) -> Text:
    return Text(text, style="dim", no_wrap=True, overflow="ellipsis")


_COLUMNS: Final = (
    "VERDICT",
    "SINCE",
    "PROTOCOL",
    "CLIENT",
    "SERVER",
    "REQ/RESP",
    "SENT",
    "RECEIVED",
    "REASON",
)


def _table(shown: list[ConnectionView], now_s: float, width: int) -> list[Text]:
    rows = [
        (
            str(one.verdict),
            format_duration(max(0.0, now_s - one.since_s)),
            clean(one.protocol),
            one.client,
            one.server,
            f"{one.requests}/{one.responses}",
            format_size(one.bytes_to_client),
            format_size(one.bytes_to_server),
            clean(one.reason),
        )
        for one in shown
    ]
    keep = list(range(len(_COLUMNS)))
    widths = [max(map(cell_len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    # In a narrow terminal the reason is worth more than the counters.
    for column in (7, 6, 5, 4, 2):
        if sum(widths[i] + _GAP for i in keep[:-1]) + _REASON_MIN <= width:
            break
        keep.remove(column)
    room = width - sum(widths[i] + _GAP for i in keep[:-1])
    widths[-1] = max(_REASON_MIN, min(widths[-1], room))
    out = [_row(_COLUMNS, keep, widths, "bold")]
    for one, row in zip(shown, rows, strict=True):
        line = _row(row, keep, widths, "")
        line.stylize(_STYLES[one.verdict], 0, len(row[0]))
        out.append(line)
    return out


def _row(cells: tuple[str, ...], keep: list[int], widths: list[int], style: str) -> Text:
    parts = []
    for i in keep:
        text, size = cells[i], widths[i]
        parts.append(
            set_cell_size(text, size - 1) + "…" if cell_len(text) > size else set_cell_size(text, size)
        )
    return Text((" " * _GAP).join(parts).rstrip(), style=style, no_wrap=True, overflow="ellipsis")
