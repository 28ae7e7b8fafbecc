"""``virtgrid template``: the trees that sandboxes stand on."""

from __future__ import annotations

from typing import Annotated

import typer

from virtgrid.cli.output import print_json, print_table, run
from virtgrid.core.errors import NotFoundError
from virtgrid.core.units import format_size
from virtgrid.grid.node import template
from virtgrid.grid.node.spec import DEFAULT_TEMPLATE

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Template trees, shared by all sandboxes of this host.",
)

Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


@app.command()
@run
def build(
    name: Annotated[str, typer.Argument(metavar="NAME")] = DEFAULT_TEMPLATE, as_json: Json = False
) -> None:
    """Build a template from this host, again after its packages have changed."""
    made = template.build(name)
    if as_json:
        print_json(made)
    else:
        print(f"template '{made.name}': {made.files} files, {format_size(made.size_bytes)}, {made.path}")


@app.command("list")
@run
def list_(as_json: Json = False) -> None:
    """Show the templates of this host."""
    found = template.built()
    if as_json:
        print_json(found)
        return
    rows = [(one.name, f"{one.made:%Y-%m-%d %H:%M}", one.files, format_size(one.size_bytes)) for one in found]
    print_table(("NAME", "MADE (UTC)", "FILES", "SIZE"), rows)


@app.command()
@run
def remove(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Remove a template that no sandbox uses."""
    if not template.remove(name):
        raise NotFoundError(f"there is no template '{name}'", hint="virtgrid template list")
