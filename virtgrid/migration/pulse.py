"""The destination's pulse: asked every other second while a switchover may come.

A destination whose libvirtd hangs when the guest is let go wakes up later, runs the guest it was
sent, and by then libvirt's client may have resumed the source: the guest would run twice. Nobody
is let go towards a destination that does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from virtgrid.core.errors import VirtgridError

EVERY_S: Final = 2.0
#: An unanswered question of this age is an answer too.
PATIENCE_S: Final = 6.0


class Pulse:
    """Asks ``is_silent`` in the background, one question at a time. Times: the caller's monotonic."""

    def __init__(self, is_silent: Callable[[], Awaitable[bool]]) -> None:
        self._is_silent = is_silent
        self._question: asyncio.Future[bool] | None = None
        self._asked_s = float("-inf")
        self._silent_since_s: float | None = None

    def beat(self, now_s: float) -> None:
        """Take the last answer, ask again when it is time."""
        question = self._question
        if question is not None and question.done():
            self._question = None
            try:
                silent = question.result()
            except VirtgridError:
                silent = True
            if not silent:
                self._silent_since_s = None
            elif self._silent_since_s is None:
                self._silent_since_s = self._asked_s
        if self._question is None and now_s - self._asked_s >= EVERY_S:
            self._asked_s = now_s
            self._question = asyncio.ensure_future(self._is_silent())

    def silent_s(self, now_s: float) -> float:
        """For how long the destination has not answered; 0 when it has, or is just being asked."""
        if self._silent_since_s is not None:
            return now_s - self._silent_since_s
        waiting_s = now_s - self._asked_s if self._question is not None else 0.0
        return waiting_s if waiting_s >= PATIENCE_S else 0.0

    async def close(self) -> None:
        if self._question is not None:
            self._question.cancel()
            with contextlib.suppress(asyncio.CancelledError, VirtgridError):
                await self._question
