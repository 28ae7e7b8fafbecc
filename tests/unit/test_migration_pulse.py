"""The destination's pulse: silence is noticed, and forgotten when it answers again."""

from __future__ import annotations

import asyncio

from virtgrid.core.errors import PeerUnreachableError
from virtgrid.migration.pulse import EVERY_S, PATIENCE_S, Pulse


class Destination:
    """Answers what it is told to; ``None``: not at all."""

    def __init__(self) -> None:
        self.silent: bool | None = False
        self.asked = 0

    async def __call__(self) -> bool:
        self.asked += 1
        if self.silent is None:
            await asyncio.Event().wait()
        if self.silent:
            raise PeerUnreachableError("no answer")
        return False


async def beats(pulse: Pulse, *times_s: float) -> None:
    for now_s in times_s:
        pulse.beat(now_s)
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_a_destination_that_answers_is_not_silent_and_not_pestered() -> None:
    destination = Destination()
    pulse = Pulse(destination)
    await beats(pulse, *(n * 0.1 for n in range(1, 60)))
    assert pulse.silent_s(6.0) == 0
    assert destination.asked == 3
    await pulse.close()


async def test_silence_is_noticed_and_forgotten() -> None:
    destination = Destination()
    pulse = Pulse(destination)
    await beats(pulse, 0.0, 0.1)
    destination.silent = True
    await beats(pulse, EVERY_S, EVERY_S + 0.1)
    assert pulse.silent_s(EVERY_S + 1.0) == 1.0
    destination.silent = False
    await beats(pulse, 2 * EVERY_S, 2 * EVERY_S + 0.1)
    assert pulse.silent_s(2 * EVERY_S + 0.2) == 0
    await pulse.close()


async def test_a_question_without_an_answer_is_silence_after_a_while() -> None:
    destination = Destination()
    destination.silent = None
    pulse = Pulse(destination)
    await beats(pulse, 0.0, 1.0, PATIENCE_S - 0.1)
    assert pulse.silent_s(PATIENCE_S - 0.1) == 0
    assert pulse.silent_s(PATIENCE_S + 1) == PATIENCE_S + 1
    assert destination.asked == 1
    await pulse.close()
