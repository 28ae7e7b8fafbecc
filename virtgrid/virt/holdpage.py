"""docs/reference/hold.md's diagram and figures from the code: ``python -m virtgrid.virt.holdpage FILE``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

from virtgrid.core.units import format_rate, format_size
from virtgrid.virt.switchover import (
    CLAMP_BYTES_S,
    DRIP_FLOOR_BYTES_S,
    HOLD_DOWNTIME_S,
    RELEASE_DOWNTIME_S,
    TRANSITIONS,
    HoldConfig,
    HoldMode,
)

_PART: Final = "<!-- generated: {} -->\n{}<!-- end -->\n"


def diagram() -> str:
    """The table of transitions as a Mermaid state diagram."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {HoldMode.FULL}"]
    for mode, after in TRANSITIONS.items():
        lines += [f"    {mode} --> {following}" for following in HoldMode if following in after]
    return "\n".join([*lines, f"    {HoldMode.RELEASED} --> [*]", "```", ""])


def figures() -> str:
    """The numbers of a hold as a table."""
    config = HoldConfig(full_bytes_s=0, budget_bytes=1 << 62)
    rows = (
        ("clamp", f"{CLAMP_BYTES_S} B/s", "`max-bandwidth` while held"),
        ("downtime limit, held", f"{HOLD_DOWNTIME_S * 1000:.0f} ms", "libvirt's smallest"),
        (
            "downtime limit, released",
            f"{RELEASE_DOWNTIME_S:.0f} s",
            "QEMU's largest; the gate has checked before",
        ),
        ("drip", format_rate(DRIP_FLOOR_BYTES_S), "what QEMU 10 lets out under any limit"),
        (
            "landing begins at",
            format_size(config.mark_min_bytes),
            f"or {config.mark_s:g} s of the speed seen",
        ),
        (
            "target",
            format_size(config.target_bytes),
            "or a quarter of the budget; clamped below 1.5 times of it",
        ),
        ("landing", f"{config.landing_per_s:g} /s", "what is above the target, times this, is the limit"),
        ("refresh", f"{config.refresh_per_s:g} /s", "what is left, times this, is the limit"),
        ("slowest landing or refresh", format_rate(config.landing_floor_bytes_s), ""),
        ("refresh at most every", f"{config.refresh_min_s:g} s", ""),
        (
            "kind is told from",
            f"{config.detect_from_s:g}–{config.detect_until_s:g} s",
            f"after clamping; less than {format_size(config.strict_bytes)} sent is strict",
        ),
    )
    lines = [f"| {name} | {value} | {why} |" for name, value, why in rows]
    return "\n".join(["| number | value | |", "|---|---|---|", *lines, ""])


def refreshed(page: str) -> str:
    """The page with its generated parts as the code has them now."""
    for name, text in (("diagram", diagram()), ("figures", figures())):
        parts = re.findall(_PART.format(name, "(?s:.*?)"), page)
        if len(parts) != 1:
            raise ValueError(f"the page has {len(parts)} parts named '{name}'")
        page = page.replace(parts[0], _PART.format(name, text))
    return page


if __name__ == "__main__":
    _path = Path(sys.argv[1])
    _path.write_text(refreshed(_path.read_text(encoding="utf-8")), encoding="utf-8")
