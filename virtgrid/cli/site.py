"""``virtgrid site``: what the sites of the grid offer, and which there are."""

from __future__ import annotations

from typing import Annotated

import typer

from virtgrid.cli.asking import Grc, ask
from virtgrid.cli.output import print_json, print_table, run
from virtgrid.core.errors import NotFoundError
from virtgrid.grid.messages.coalloc import JOIN, LEAVE, SITES, Empty, Join, Leave, Party, SiteList, SiteView
from virtgrid.grid.messages.common import require
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.wellknown import GRC

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
    """Show one of them: also who answers there, by its certificate."""
    found = [one for one in ask(grc, SITES, Empty(), SiteList).sites if one.party == name]
    if not found:
        raise NotFoundError(f"there is no site '{name}'", hint="virtgrid site list")
    _print(found, as_json)
    if not as_json:
        for problem in found[0].problems:
            print(f"  {problem}")
    if not as_json and found[0].who is not None:
        print(f"{found[0].who} answers there" + (f"; {name} has joined" if found[0].joined else ""))


@app.command()
@run
def join(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The site's, as its certificates say it.")],
    endpoint: Annotated[str, typer.Argument(metavar="ENDPOINT", help="Its CRM: tls://crm.c.example:7430.")],
    grc: Grc = GRC,
    as_json: Json = False,
) -> None:
    """Make a site known to the coordinator of this host, as root; it is spoken to first."""
    require(Party, "NAME", name)
    where = Endpoint.parse(endpoint)
    joined = ask(grc, JOIN, Join(site=name, at=str(where)), SiteView)
    if not as_json:
        print(f"site {name} has joined: {joined.who or 'its CRM'} at {joined.at}")
    _print([joined], as_json)


@app.command()
@run
def leave(name: Annotated[str, typer.Argument(metavar="NAME")], grc: Grc = GRC) -> None:
    """Undo join; not while a reservation has nodes there."""
    require(Party, "NAME", name)
    ask(grc, LEAVE, Leave(site=name), Empty)
    print(f"site {name} has left")


def _how_it_is(one: SiteView) -> str:
    if not one.problems:
        return "answers"
    first, *others = one.problems
    more = f" (and {len(others)} more: virtgrid site show {one.party})" if others else ""
    return f"answers; {first}{more}"


def _print(found: list[SiteView], as_json: bool) -> None:
    if as_json:
        print_json([one.model_dump(mode="json") for one in found])
        return
    rows = [
        (
            one.party,
            one.kind,
            one.at,
            one.nodes,
            one.nodes_free,
            " ".join(one.advertised),
            one.problem or _how_it_is(one),
        )
        for one in found
    ]
    print_table(("NAME", "KIND", "AT", "NODES", "FREE", "ADDRESSES", "NOW"), rows, shrink="NOW")
