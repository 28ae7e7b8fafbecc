"""``virtgrid hooks``: what libvirt runs for sandboxes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from virtgrid.cli.output import print_json, print_table, run
from virtgrid.host import hooks

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="The hooks that prepare sandboxes and clean up after them.",
)

Json = Annotated[bool, typer.Option("--json", help="One JSON array on standard output.")]


@app.command()
@run
def install(as_json: Json = False) -> None:
    """Link our hook into /etc/libvirt/hooks; your own stay as they are."""
    _show(hooks.install(), as_json)


@app.command()
@run
def status(as_json: Json = False) -> None:
    """Show what is installed, and what else libvirt runs there."""
    _show(hooks.status(), as_json)


@app.command()
@run
def remove(as_json: Json = False) -> None:
    """Take our links away again."""
    hooks.remove()
    _show(hooks.status(), as_json)


def _show(found: list[hooks.Hook], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    rows = [
        (hook.driver, hook.state, hook.path, hook.target, ", ".join(map(str, hook.others))) for hook in found
    ]
    print_table(("DRIVER", "STATE", "PATH", "TARGET", "OTHERS"), rows)
    if any(hook.restart_needed for hook in found):
        print("libvirt looks for hooks when it starts: restart libvirtd (guests go on)", file=sys.stderr)
