"""How a link treats a frame: its turn on the wire, the delay, the queue's end. Pure: no clock, no I/O."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from virtgrid.lab.layout import LinkSpec
from virtgrid.net.tap import VNET_HEADER_BYTES

FRAMING_BYTES: Final = 24
"""Preamble, checksum and gap that Ethernet adds to every frame on the wire."""


def wire_bytes(frame: bytes) -> int:
    """What the frame costs on the wire, in bytes.

    frame: virtio-net header (10 bytes: flags, gso_type, hdr_len, gso_size, …) and Ethernet frame.
    A super-frame that the kernel left unsegmented is charged every segment's headers and framing.
    """
    count = len(frame) - VNET_HEADER_BYTES
    segments = 1
    if frame[1] & 0x7F:
        header = frame[2] | frame[3] << 8
        segment = frame[4] | frame[5] << 8
        if segment:
            segments = max(1, -(-(count - header) // segment))
            count += (segments - 1) * header
    return count + segments * FRAMING_BYTES


@dataclass(slots=True)
class Direction:
    """One direction between two ports: a wire that is free again at ``free_at_s``, and who is under way.

    Times are the caller's monotonic seconds. dropped: at the queue's end, by loss, by a cut.
    """

    spec: LinkSpec
    random: random.Random = field(default_factory=random.Random)
    cut: bool = False
    free_at_s: float = 0.0
    frames: int = 0
    wire_bytes: int = 0
    dropped: int = 0
    in_flight: deque[tuple[float, bytes]] = field(default_factory=deque)

    def push(self, now_s: float, frame: bytes) -> bool:
        """Send a frame; False when it is lost."""
        spec = self.spec
        start_s = self.free_at_s if self.free_at_s > now_s else now_s
        if self.cut or start_s - now_s > spec.queue_s or (spec.loss and self.random.random() < spec.loss):
            self.dropped += 1
            return False
        cost = wire_bytes(frame)
        if spec.rate_bytes_s:
            start_s += cost / spec.rate_bytes_s
            self.free_at_s = start_s
        self.in_flight.append((start_s + spec.rtt_s / 2, frame))
        self.frames += 1
        self.wire_bytes += cost
        return True

    def due_s(self) -> float | None:
        """When the next frame arrives; None when nothing is under way."""
        return self.in_flight[0][0] if self.in_flight else None

    def change(self, now_s: float, spec: LinkSpec, *, cut: bool) -> None:
        """Behave differently from now on. What waits goes at the new rate; a cut loses what is under way."""
        backlog_s = self.free_at_s - now_s
        if backlog_s > 0:
            new = spec.rate_bytes_s
            self.free_at_s = now_s + (backlog_s * self.spec.rate_bytes_s / new if new else 0.0)
        self.spec, self.cut = spec, cut
        if cut:
            self.dropped += len(self.in_flight)
            self.in_flight.clear()

    def counters(self) -> dict[str, int]:
        return {"frames": self.frames, "bytes": self.wire_bytes, "dropped": self.dropped}


@dataclass(slots=True)
class LinkState:
    """What a link is asked to be: its own spec, and for a while something else.

    ``until_s`` None means: until somebody restores it.
    """

    base: LinkSpec
    changed: LinkSpec | None = None
    cut: bool = False
    until_s: float | None = None

    @property
    def spec(self) -> LinkSpec:
        return self.changed or self.base

    def break_(self, now_s: float, order: dict[str, Any]) -> None:
        """Apply an order: ``cut``, any of LinkSpec's fields, ``for_s``. Errors: UsageError, ValueError."""
        values = self.spec.as_dict()
        values.update({key: float(order[key]) for key in values if order.get(key) is not None})
        changed = LinkSpec(**values)
        for_s = order.get("for_s")
        if for_s is not None and not 0 < float(for_s) <= 86400:
            raise ValueError("a fault lasts more than 0 s and at most a day")
        self.changed = changed if changed != self.base else None
        self.cut = bool(order.get("cut", self.cut))
        self.until_s = None if for_s is None else now_s + float(for_s)

    def restore(self) -> None:
        self.changed, self.cut, self.until_s = None, False, None

    def expired(self, now_s: float) -> bool:
        return self.until_s is not None and now_s >= self.until_s

    def as_dict(self, now_s: float) -> dict[str, Any]:
        left = None if self.until_s is None else max(0.0, self.until_s - now_s)
        return {
            **self.spec.as_dict(),
            "cut": self.cut,
            "changed": self.changed is not None,
            "restored_in_s": left,
        }
