"""The guest's connections during one migration, as the driver asks about them."""

from __future__ import annotations

from typing import Protocol

from virtgrid.tracker.tracker import Change
from virtgrid.tracker.views import Snapshot


class Watch(Protocol):
    """What the driver asks. Times are CLOCK_MONOTONIC seconds of this host.

    capture: how the frames are had: ``ebpf``, or ``classic: `` and why.
    """

    capture: str

    def snapshot(self) -> Snapshot:
        """All connections now; ``at_s`` is now as long as the capture lives."""
        ...

    def changes(self) -> list[Change]:
        """Verdicts that changed since the last call, oldest first."""
        ...

    def unsuitable_at(self, at_s: float) -> int | None:
        """How many were unsuitable at a moment of the last half minute; None when not known."""
        ...

    def addresses(self) -> tuple[str, ...]:
        """The guest's own addresses, as seen on its tap."""
        ...

    def close(self) -> None: ...


def capture_note(capture: str) -> str | None:
    """What a person should know of the capture; None when it is as it should be."""
    if capture == "ebpf":
        return None
    why = capture.partition(": ")[2] or capture
    return f"the capture does without eBPF ({why}): large transfers cost more to follow"
