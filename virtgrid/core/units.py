"""Text to base units and back: bytes, bytes per second, seconds.

Rates on the command line are network rates, as tc(8) writes them: ``100mbit`` is 10^8 bit/s,
``12mbps`` is 12 * 10^6 *bytes* per second. Sizes with an ``i`` are binary: ``4MiB``.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Final

from virtgrid.core.errors import UsageError

_NUMBER: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z/]*)\s*")

_RATE_BYTES_S: Final = {
    "bit": 1 / 8, "kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8,
    "bps": 1.0, "kbps": 1e3, "mbps": 1e6, "gbps": 1e9,
}  # fmt: skip
_DURATION_S: Final = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_BYTES: Final = {
    "b": 1, "k": 2**10, "kib": 2**10, "kb": 10**3, "m": 2**20, "mib": 2**20, "mb": 10**6,
    "g": 2**30, "gib": 2**30, "gb": 10**9, "t": 2**40, "tib": 2**40, "tb": 10**12,
}  # fmt: skip


def _parse(text: str, units: dict[str, float] | dict[str, int], default: str | None, kind: str) -> float:
    match = _NUMBER.fullmatch(text)
    unit = match[2].lower() if match else ""
    if match and not unit and default is not None:
        unit = default
    if not match or unit not in units:
        raise UsageError(f"'{text}' is not a {kind}", hint=f"write a number with one of: {', '.join(units)}")
    value = float(match[1]) * units[unit]
    if math.isinf(value):
        raise UsageError(f"'{text[:20]}…' is too large for a {kind}")
    return value


def parse_rate(text: str) -> float:
    """``100mbit`` -> bytes per second. A bare number is refused: it could mean bits or bytes."""
    return _parse(text, _RATE_BYTES_S, None, "rate")


def parse_duration(text: str) -> float:
    """``100ms``, ``40s``, ``5m`` or a bare number of seconds -> seconds."""
    return _parse(text, _DURATION_S, "s", "duration")


def parse_size(text: str) -> int:
    """``4MiB``, ``8G`` (binary, as qemu-img) or a bare number of bytes -> bytes."""
    return round(_parse(text, _SIZE_BYTES, "b", "size"))


def parse_time(text: str) -> int:
    """``2026-11-27T10:00+09:00`` or ``…Z`` -> seconds since the epoch. Without a zone it is refused."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"'{text[:40]}' is not a time", hint="write 2026-11-27T10:00Z") from None
    if found.tzinfo is None:
        raise UsageError(
            f"'{text}' does not say in which zone", hint=f"write {text}Z for UTC, or {text}+09:00"
        )
    return int(found.timestamp())


def format_time(at_s: int) -> str:
    """Seconds since the epoch for people, as ``parse_time`` reads it: ``2026-11-27T10:00:00Z``."""
    return datetime.fromtimestamp(at_s, UTC).isoformat().replace("+00:00", "Z")


def format_size(count_bytes: float) -> str:
    """Bytes for people: ``3.1 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        # Rounded first: 1048575 bytes are 1.0 MiB, not 1024.0 KiB.
        if abs(round(count_bytes, 0 if unit == "B" else 1)) < 1024:
            return f"{count_bytes:.0f} B" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.1f} TiB"


def format_rate(bytes_s: float) -> str:
    """Bytes per second for people: ``9.2 MiB/s``."""
    return f"{format_size(bytes_s)}/s"


def format_duration(seconds: float) -> str:
    """Seconds for people: ``41 ms``, ``4.2 s``, ``1m10s``, ``2h03m``."""
    if seconds * 1000 < 999.5:
        return f"{seconds * 1000:.0f} ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"
