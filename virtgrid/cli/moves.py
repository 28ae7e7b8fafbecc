"""Asking virtgridd about its migrations: what ``migration queue`` and ``evacuate`` have in common."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from virtgrid.cli.output import print_table
from virtgrid.core.errors import PeerUnreachableError
from virtgrid.core.units import format_duration

if TYPE_CHECKING:
    from virtgrid.grid.messages.common import Model

M = TypeVar("M", bound="Model")

COLUMNS: Final = ("ID", "DOMAIN", "TO", "STATE", "FOR", "WHY", "NOTE")

Host = Annotated[str, typer.Option("--host", metavar="ENDPOINT", help="virtgridd.")]


def ask(host: str, method: str, asked: Model, answer: type[M]) -> M:
    """One question. Errors: virtgridd's; PeerUnreachableError."""
    # They take a quarter of a second to load, which whoever only looks at journals does not owe.
    from virtgrid.cli.once import ask_once
    from virtgrid.wire.endpoint import Endpoint

    try:
        return ask_once(Endpoint.parse(host), "virtgridd", method, asked, answer)
    except PeerUnreachableError as error:
        error.hint = error.hint or "systemctl start virtgridd, or virtgrid serve host"
        raise


def queue(host: str) -> list[dict[str, Any]]:
    """All of it, oldest first. Errors: as ``ask``."""
    from virtgrid.grid.messages.moves import Look, Moves

    found: list[dict[str, Any]] = []
    while True:
        page = ask(host, "moves", Look(after=found[-1]["id"] if found else None), Moves)
        found += page.entries
        if not page.more or not page.entries:
            return found


def rows(entries: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    """As a table shows them."""
    now_s = time.time()
    return [
        (
            str(one["id"]),
            str(one["domain"]),
            str(one["to"]),
            str(one["state"]),
            format_duration(max(0.0, now_s - float(one["since_s"]))),
            str(one["why"]),
            str(one["note"] or one["migration"] or "-"),
        )
        for one in entries
    ]


def show(entries: Iterable[dict[str, Any]]) -> None:
    print_table(COLUMNS, rows(entries), shrink="NOTE")
