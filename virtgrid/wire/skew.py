"""How far another host's clock is off, as far as it can be told over a line. Pure.

Reservations and tickets name moments, so hosts must agree on the time. Certificates are issued with a
little slack (``virtgrid.wire.pki``); nothing else is made to bear a wrong clock: it is refused, by name.
"""

from __future__ import annotations

from typing import Final

from virtgrid.core.errors import RefusedError

LIMIT_S: Final = 10.0
"""NTP keeps hosts within milliseconds. More than this has lost it, and would start jobs at wrong moments."""


def skew_s(*, sent_s: float, at_s: float, received_s: float) -> float:
    """How far the other clock is ahead of ours, at least; negative: behind; 0: the way there and back
    explains it.

    sent_s, received_s: when we asked and heard, by our clock; at_s: its clock's in between. A slow line
    thus never makes a good clock look wrong.
    """
    if at_s > received_s:
        return at_s - received_s
    return min(0.0, at_s - sent_s)


def require_agreement(name: str, ahead_s: float) -> None:
    """Errors: RefusedError when the clock of ``name`` is too far off."""
    if abs(ahead_s) > LIMIT_S:
        way = "ahead of" if ahead_s > 0 else "behind"
        raise RefusedError(
            f"the clock of {name} is {abs(ahead_s):.0f} s {way} ours; at most {LIMIT_S:g} s are borne",
            hint="'chronyc tracking' or 'timedatectl' on both hosts says whose clock is wrong",
        )
