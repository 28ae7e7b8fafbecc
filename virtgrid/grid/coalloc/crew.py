"""A crew, as its site (CRM) leads it: which command a pilot is given next. Pure.

The coordinator says what the crew is to become (the goal), each pilot tells its state, and the table says
what follows from both. Nothing else is remembered, so a CRM that was killed goes on from what it wrote
down (the goal) and from what the pilots say when they dial in again. Goals are reached in their order;
GONE overtakes the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from virtgrid.grid.messages.node import Command, State


class Goal(StrEnum):
    """What a crew is to become."""

    READY = "READY"
    UP = "UP"
    GONE = "GONE"


_S, _C = State, Command
_DOWN: Final = {Goal.GONE: _C.SHUT_DOWN}
TABLE: Final[Mapping[State, Mapping[Goal, Command]]] = {
    _S.INITIAL: {Goal.READY: _C.INIT, Goal.UP: _C.INIT, **_DOWN},
    _S.INITIATING: _DOWN,
    _S.HOST_READY: {Goal.UP: _C.SET_KEYS, **_DOWN},
    _S.KEYS_READY: {Goal.UP: _C.RUN, **_DOWN},
    _S.STARTING_UP: _DOWN,
    _S.RUNNING: _DOWN,
    _S.SHUTTING_DOWN: {},
    _S.DONE: {},
    _S.FAILED: _DOWN,
}

#: States in which the pilot has keys to tell.
KEYED: Final = frozenset({_S.HOST_READY, _S.KEYS_READY, _S.STARTING_UP, _S.RUNNING})
#: States from which a pilot that was to be up does not come back.
FALLEN: Final = frozenset({_S.SHUTTING_DOWN, _S.DONE, _S.FAILED})


def command(goal: Goal, state: State) -> Command | None:
    """What a pilot in this state is told; None: nothing, or not yet."""
    return TABLE[state].get(goal)


def further(now: Goal, asked: Goal) -> Goal:
    """The goal after another one was asked for: it never goes back."""
    goals = list(Goal)
    return max(now, asked, key=goals.index)


def markdown() -> str:
    """The table, for docs/reference/jobs.md."""
    lines = [
        f"| a pilot in | {' | '.join(f'goal {goal}' for goal in Goal)} |",
        "|---|" + "---|" * len(Goal),
    ]
    for state, row in TABLE.items():
        lines.append(f"| {state} | {' | '.join(row.get(goal, '-') for goal in Goal)} |")
    return "\n".join(lines) + "\n"
