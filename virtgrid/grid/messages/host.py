"""The conversation of a pilot with virtgridd, the root agent of its host, on virtgridd's unix socket.

The pilot says ``hello`` with its ticket first; everything after concerns the one sandbox the ticket
names. ``exec`` turns the connection it comes on into the program's output
(``virtgrid.grid.messages.frames``), so a pilot opens one more connection per program.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from pydantic import StringConstraints

from virtgrid.grid.messages.common import Model
from virtgrid.grid.messages.node import Exec, HostEntry, Init, Keys


class Stage(StrEnum):
    """How far a sandbox is on its host: what is really there, not what somebody remembers."""

    ABSENT = "absent"
    PREPARED = "prepared"
    RUNNING = "running"
    STOPPED = "stopped"


class HelloHost(Model):
    """``hello``: the ticket's text."""

    ticket: Annotated[str, StringConstraints(max_length=16 << 10)]


class View(Model):
    """What ``hello`` and ``look`` answer. ready: everybody's keys are in it."""

    stage: Stage
    ready: bool = False
    keys: Keys | None = None


class Prepare(Model):
    """``prepare``: make the tree and the keys. Again with the same words: the same sandbox, the same keys."""

    init: Init


class Entries(Model):
    """``set_keys``: all nodes of the cluster."""

    hosts: tuple[HostEntry, ...]


class Empty(Model):
    """``look``, ``start``, ``stop`` and ``remove`` take nothing."""


class Ended(Model):
    """Notification ``ended``: the sandbox's first process is gone, and why if that is known."""

    reason: str


METHODS: Final[dict[str, type[Model]]] = {
    "hello": HelloHost,
    "look": Empty,
    "prepare": Prepare,
    "set_keys": Entries,
    "start": Empty,
    "stop": Empty,
    "remove": Empty,
    "exec": Exec,
}
