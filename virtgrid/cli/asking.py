"""Asking a coordinator: what ``reserve``, ``reservation`` and ``site`` have in common."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from virtgrid.cli.once import ask_once
from virtgrid.core.errors import DeadlineError, OutcomeUnknownError
from virtgrid.core.units import format_duration, format_time
from virtgrid.grid.doors import identity
from virtgrid.grid.messages.coalloc import Nodes, Paths, ReservationState, View, Window
from virtgrid.grid.messages.common import Model
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.identity import Role
from virtgrid.wire.line import LineLostError
from virtgrid.wire.pki import places

M = TypeVar("M", bound=Model)

Grc = Annotated[
    str, typer.Option(metavar="ENDPOINT", help="The coordinator.", envvar="VIRTGRID_GRC", show_envvar=False)
]


def ask(grc: str, method: str, asked: Model, answer: type[M]) -> M:
    """One question; over the network with the user's certificate. Errors: the coordinator's;
    PeerUnreachableError.
    """
    where = Endpoint.parse(grc)
    tls = identity(_pki(), Role.USER) if where.is_network else None
    return ask_once(where, "the coordinator", method, asked, answer, tls=tls, expect=Role.GRC)


def _pki() -> Path:
    """Where a user's certificate is."""
    given = os.environ.get("VIRTGRID_PKI")
    return Path(given) if given else places.default()


def ask_to_change(grc: str, method: str, asked: Model, id_: str) -> View:
    """RESERVE or CANCEL. Errors: the same; OutcomeUnknownError when it may have been done or not."""
    try:
        view = ask(grc, method, asked, View)
    except (LineLostError, DeadlineError) as error:  # not when it could not even be dialled
        raise unknown(*_asking(id_), error.what) from error
    if view.state in (ReservationState.HOLDING, ReservationState.COMMITTING):
        raise unknown(*_asking(id_), f"{view.state}: {view.reason}")
    return view


def _asking(id_: str) -> tuple[str, str]:
    return f"reservation {id_}", f"virtgrid reservation show {id_}"


def unknown(what: str, command: str, cause: str) -> OutcomeUnknownError:
    """What has become of something is not known (yet). command: that asks again."""
    return OutcomeUnknownError(
        f"it is not known yet what becomes of {what}", cause=cause, hint=f"ask again: {command}"
    )


def view_json(view: View) -> Mapping[str, Any]:
    """A reservation for ``--json``: the message itself, and its times for people."""
    found = view.model_dump(mode="json")
    found["begins_at"] = format_time(view.window.begins_at_s)
    found["ends_at"] = format_time(view.window.ends_at_s)
    return found


def when(window: Window) -> str:
    """``2026-11-27T10:00:00Z for 1h00m``."""
    return f"{format_time(window.begins_at_s)} for {format_duration(window.lasts_s)}"


def party_rows(view: View) -> list[tuple[str, ...]]:
    """Each party: what was asked of it, and what it keeps or why not."""
    rows: list[tuple[str, ...]] = []
    for one in view.parties:
        asked = kept = ""
        if isinstance(one.wanted, Nodes):
            nodes = "1 node" if one.wanted.nodes == 1 else f"{one.wanted.nodes} nodes"
            asked = f"{nodes}, {one.wanted.addresses}"
        elif isinstance(one.wanted, Paths):
            rates = {path.rate_bytes_s for path in one.wanted.paths}
            asked = ", ".join(f"{rate * 8 / 1e6:g} Mbit/s" for rate in sorted(rates)) or "a segment"
        if one.grant is not None and view.state is ReservationState.COMMITTED:
            kept = " ".join(one.grant.nodes) or f"segment {one.grant.segment}"
        rows.append((one.party, str(one.state), asked, one.why or kept))
    return rows


PARTY_COLUMNS: Final = ("PARTY", "STATE", "ASKED FOR", "KEEPS, OR WHY NOT")
