"""``virtgrid site``: what the sites of the grid offer."""

from __future__ import annotations

from typing import Annotated

import typer

from virtgrid.cli.asking import Grc, ask
from virtgrid.cli.output import print_json, print_table, run
from virtgrid.core.errors import NotFoundError
from virtgrid.grid.messages.coalloc import SITES, Empty, SiteList, SiteView
from virtgrid.wire.endpoint import GRC

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Sites: their nodes and addresses, as their managers advertise them.",
)

Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


@app.command("list")
@run
def list_(grc: Grc = GRC, as_json: Json = False) -> None:
    """Show everybody the coordinator knows, and what is free for the next hour."""
    _print(list(ask(grc, SITES, Empty(), SiteList).sites), as_json)


@app.command()
@run
def show(name: Annotated[str, typer.Argument(metavar="NAME")], grc: Grc = GRC, as_json: Json = False) -> None:
    """Show one of them."""
    found = [one for one in ask(grc, SITES, Empty(), SiteList).sites if one.party == name]
    if not found:
        raise NotFoundError(f"there is no site '{name}'", hint="virtgrid site list")
    _print(found, as_json)


def _print(found: list[SiteView], as_json: bool) -> None:
    if as_json:
        print_json([one.model_dump(mode="json") for one in found])
        return
    rows = [
        (
            one.party,
            one.kind,
            one.nodes,
            one.nodes_free,
            " ".join(one.advertised),
            one.problem or "answers",
        )
        for one in found
    ]
    print_table(("NAME", "KIND", "NODES", "FREE", "ADDRESSES", "NOW"), rows, shrink="NOW")
