"""What root of a host asks of its virtgridd about migrations."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import StringConstraints

from virtgrid.grid.messages.common import Model

Text = Annotated[str, StringConstraints(max_length=500)]


class Look(Model):
    """``moves``: the queue."""


class Evacuate(Model):
    """``evacuate``: all that run here, away. to: whose policy names no destination goes there."""

    to: Text | None = None


class Withdraw(Model):
    """``withdraw``: an entry that has not begun is given up."""

    id: Text


class Left(Model):
    """A domain that cannot go, and why."""

    domain: str
    why: str


class Moves(Model):
    """The answer to all three. entries: those asked for, oldest first; left: by ``evacuate``."""

    entries: tuple[dict[str, Any], ...] = ()
    left: tuple[Left, ...] = ()


METHODS: Final[dict[str, type[Model]]] = {"moves": Look, "evacuate": Evacuate, "withdraw": Withdraw}
