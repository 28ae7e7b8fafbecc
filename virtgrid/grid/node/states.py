"""The NodeManager's states: a table, and the theory above it. Pure.

Source: Nakada et al. 2009, tables 4 and 5. What the paper leaves open is settled here:

* *Resting* states wait for a command; *working* states have something under way and leave by themselves.
  What is under way in a working state can be begun again from the start and leads to the same end
  (preparing, starting and removing a sandbox are idempotent). So a NodeManager that was killed writes its
  state down before it acts, and when it comes back it simply does again what its state says. In a resting
  state it looks whether its sandbox is still there.
* A command is answered as soon as the state has changed; what it set off is told by notifications.
* A command that is illegal in a state is refused with a sentence, and nothing changes.
* SHUT_DOWN is legal in every state and may be said again: nobody needs to know the state to be sure of
  the end. It overtakes what is under way. In FAILED it clears away what the failure left.
* In FAILED the sandbox's processes are stopped; the reason stays, and everything else waits for SHUT_DOWN.
* The reservation's end is a SHUT_DOWN that nobody sends.

DONE is the only state without a way out: the NodeManager ends when its CRM has heard of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from virtgrid.core.errors import RefusedError
from virtgrid.grid.messages.node import Command, State


class Event(StrEnum):
    """What happens without a command."""

    PREPARED = "prepared"
    STARTED = "started"
    STOPPED = "stopped"
    BROKEN = "broken"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One state: what it means, what is under way, and what may follow.

    commands: those that are legal and change something, with the state they lead to. The others that are
    legal (``asks``) leave everything as it is. events: the same for what happens by itself.
    """

    meaning: str
    work: str = ""
    commands: Mapping[Command, State]
    asks: frozenset[Command] = frozenset()
    events: Mapping[Event, State]


_STATUS: Final = frozenset({Command.GET_STATUS})
_KEYS: Final = frozenset({Command.GET_STATUS, Command.GET_KEYS})
_DOWN: Final = {Command.SHUT_DOWN: State.SHUTTING_DOWN}
_END: Final = {Event.ENDED: State.SHUTTING_DOWN}
_FALL: Final = {Event.BROKEN: State.FAILED, Event.ENDED: State.SHUTTING_DOWN}

TABLE: Final[Mapping[State, Row]] = {
    State.INITIAL: Row(
        meaning="Just started; nothing has been made.",
        commands={Command.INIT: State.INITIATING, Command.SHUT_DOWN: State.SHUTTING_DOWN},
        asks=_STATUS,
        events=_END,
    ),
    State.INITIATING: Row(
        meaning="The sandbox's tree is made, and its key pairs.",
        work="prepare",
        commands=_DOWN,
        asks=_STATUS,
        events={Event.PREPARED: State.HOST_READY, **_FALL},
    ),
    State.HOST_READY: Row(
        meaning="The public keys can be fetched; waits for everybody's keys.",
        commands={Command.SET_KEYS: State.KEYS_READY, **_DOWN},
        asks=_KEYS,
        events=_FALL,
    ),
    State.KEYS_READY: Row(
        meaning="Everybody's keys and addresses are in the sandbox; it can be started, or given others.",
        commands={Command.SET_KEYS: State.KEYS_READY, Command.RUN: State.STARTING_UP, **_DOWN},
        asks=_KEYS,
        events=_FALL,
    ),
    State.STARTING_UP: Row(
        meaning="The sandbox is starting; its sshd does not answer yet.",
        work="start",
        commands=_DOWN,
        asks=_KEYS,
        events={Event.STARTED: State.RUNNING, **_FALL},
    ),
    State.RUNNING: Row(
        meaning="The sandbox runs and can be reached; programs may be started in it.",
        commands=_DOWN,
        asks=_KEYS | {Command.EXEC},
        events=_FALL,
    ),
    State.SHUTTING_DOWN: Row(
        meaning="The sandbox is being stopped and removed.",
        work="remove",
        commands={Command.SHUT_DOWN: State.SHUTTING_DOWN},
        asks=_STATUS,
        events={Event.STOPPED: State.DONE, Event.BROKEN: State.FAILED, Event.ENDED: State.SHUTTING_DOWN},
    ),
    State.DONE: Row(
        meaning="Nothing is left of the sandbox; the NodeManager ends.",
        commands={Command.SHUT_DOWN: State.DONE},
        asks=_STATUS,
        events={Event.ENDED: State.DONE},
    ),
    State.FAILED: Row(
        meaning="Something went wrong; the reason says what. Waits for SHUT_DOWN or the reservation's end.",
        work="stop",
        commands=_DOWN,
        asks=_STATUS,
        events={Event.ENDED: State.SHUTTING_DOWN},
    ),
}


def after_command(state: State, command: Command) -> State:
    """The state a command leads to. Errors: RefusedError when it is illegal here."""
    row = TABLE[state]
    if command in row.asks:
        return state
    following = row.commands.get(command)
    if following is None:
        raise RefusedError(
            refusal(state, command), hint=f"in {state} there may come {', '.join(legal(state))}"
        )
    return following


def refusal(state: State, command: Command) -> str:
    """Why a command is illegal in a state, in one sentence."""
    where = [one for one in State if command in TABLE[one].commands or command in TABLE[one].asks]
    return f"{command} is not possible in {state}, only in {' or '.join(where)}"


def legal(state: State) -> list[str]:
    """The commands that may come in a state, in the paper's order."""
    row = TABLE[state]
    return [str(command) for command in Command if command in row.commands or command in row.asks]


def after_event(state: State, event: Event) -> State | None:
    """The state something leads to; None where it comes too late to mean anything."""
    return TABLE[state].events.get(event)


# -- for people ----------------------------------------------------------------------------------


def markdown() -> str:
    """The table and its diagram, for docs/reference/node.md."""
    lines = ["| state | means | commands | may follow |", "|---|---|---|---|"]
    for state, row in TABLE.items():
        following = {*row.commands.values(), *row.events.values()} - {state}
        lines.append(
            f"| {state} | {row.meaning} | {' '.join(legal(state))} |"
            f" {' '.join(one for one in State if one in following) or '-'} |"
        )
    return "\n".join([*lines, "", *_diagram()]) + "\n"


def _diagram() -> list[str]:
    """The ways that move on, as a Mermaid state diagram; those to the end are summed up in a note."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> INITIAL"]
    leaving: list[str] = []
    falling: list[str] = []
    for state, row in TABLE.items():
        for cause, following in (*row.commands.items(), *row.events.items()):
            if cause in (Command.SHUT_DOWN, Event.ENDED):
                if following is State.SHUTTING_DOWN and state is not following and state not in leaving:
                    leaving.append(state)
            elif cause is Event.BROKEN:
                falling.append(state)
            else:
                lines.append(f"    {state} --> {following}: {cause}")
    lines += [f"    {state} --> SHUTTING_DOWN: SHUT_DOWN, end" for state in leaving]
    lines += [f"    {state} --> FAILED: broken" for state in falling]
    return [*lines, "    DONE --> [*]", "```"]


if __name__ == "__main__":
    print(markdown(), end="")
