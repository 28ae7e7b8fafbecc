"""What root of a host asks of its virtgridd about migrations."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import StringConstraints

from virtgrid.grid.messages.common import Model

Text = Annotated[str, StringConstraints(max_length=500)]


#: A line has a limit: so many entries are told at a time.
PAGE: Final = 200


class Look(Model):
    """``moves``: the queue, oldest first. after: an entry's id, to go on behind it."""

    after: Text | None = None


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
    """The answer to ``moves`` and ``withdraw``. more: there are entries behind these."""

    entries: tuple[dict[str, Any], ...] = ()
    more: bool = False


class Evacuated(Model):
    """The answer to ``evacuate``. asked: ids in the queue, new and old; left: who cannot go."""

    asked: tuple[str, ...] = ()
    left: tuple[Left, ...] = ()


METHODS: Final[dict[str, type[Model]]] = {"moves": Look, "evacuate": Evacuate, "withdraw": Withdraw}
