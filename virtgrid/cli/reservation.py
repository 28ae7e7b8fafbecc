"""``virtgrid reservation``: look at reservations, and cancel them."""

from __future__ import annotations

from typing import Annotated

import typer

from virtgrid.cli.asking import (
    PARTY_COLUMNS,
    Grc,
    ask,
    ask_to_change,
    party_rows,
    view_json,
    when,
)
from virtgrid.cli.output import print_json, print_table, run
from virtgrid.core.units import format_duration, format_time
from virtgrid.grid.coalloc.coordinator import TABLE
from virtgrid.grid.messages.coalloc import CANCEL, LIST, SHOW, AskList, Line, Listed, View, Which
from virtgrid.grid.messages.common import Name as NameType
from virtgrid.grid.messages.common import require
from virtgrid.wire.wellknown import GRC

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Reservations: what was promised, by whom, until when.",
)

Name = Annotated[str, typer.Argument(metavar="NAME")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


@app.command("list")
@run
def list_(grc: Grc = GRC, as_json: Json = False) -> None:
    """Show your reservations; root sees everybody's."""
    found: list[Line] = []
    listed = ask(grc, LIST, AskList(), Listed)
    found += listed.reservations
    while listed.more:
        listed = ask(grc, LIST, AskList(after=found[-1].id), Listed)
        found += listed.reservations
    if as_json:
        print_json([one.model_dump(mode="json") for one in found])
        return
    rows = [
        (
            one.id,
            one.state,
            format_time(one.window.begins_at_s),
            format_duration(one.window.lasts_s),
            one.nodes,
            ",".join(one.sites),
            one.reason,
        )
        for one in found
    ]
    print_table(("NAME", "STATE", "BEGINS", "LASTS", "NODES", "SITES", "WHY"), rows, shrink="WHY")


@app.command()
@run
def show(name: Name, grc: Grc = GRC, as_json: Json = False) -> None:
    """Show one: how it stands, and what each party keeps of it or why not."""
    require(NameType, "NAME", name)
    _print(ask(grc, SHOW, Which(id=name), View), as_json)


@app.command()
@run
def cancel(name: Name, grc: Grc = GRC, as_json: Json = False) -> None:
    """Give everything back."""
    require(NameType, "NAME", name)
    _print(ask_to_change(grc, CANCEL, Which(id=name), name), as_json)


def _print(view: View, as_json: bool) -> None:
    if as_json:
        print_json(view_json(view))
        return
    print(f"reservation {view.id}   {view.state}   {TABLE[view.state].answer}")
    print(f"window  {when(view.window)}")
    print(f"why     {view.reason}")
    print_table(PARTY_COLUMNS, party_rows(view))
    if view.nearest:
        print("all could from " + " or ".join(format_time(one.begins_at_s) for one in view.nearest))
