"""The command line's front door: mounts one Typer app or command per noun.

Nouns are imported only when they are used: `virtgrid --version` and completion stay quick.
"""

from __future__ import annotations

import importlib
import platform
import sys
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_command

from virtgrid import __version__

#: noun -> (module, attribute, one line of help). The attribute is a Typer app or a function.
NOUNS: Final[dict[str, tuple[str, str, str]]] = {
    "migrate": ("virtgrid.cli.migrate", "migrate", "Migrate a running domain, gated by its connections."),
    "migration": (
        "virtgrid.cli.migration_control",
        "app",
        "Look at migrations, running and past, and steer them.",
    ),
    "domain": ("virtgrid.cli.domain", "app", "What a domain's owner wishes for its migrations."),
    "evacuate": ("virtgrid.cli.evacuate", "evacuate", "Migrate all domains of this host away."),
    "protocol": ("virtgrid.cli.protocol", "app", "Protocol definitions: list, check, replay."),
    "track": ("virtgrid.cli.track", "track", "Follow a domain's connections, or those in a capture file."),
    "segment": ("virtgrid.cli.segment", "app", "A network segment stretched over two hosts."),
    "sandbox": ("virtgrid.cli.sandbox", "app", "Sandboxes of this host: make, enter, end."),
    "template": ("virtgrid.cli.template", "app", "The trees that sandboxes stand on."),
    "hooks": ("virtgrid.cli.hooks", "app", "What libvirt runs for sandboxes."),
    "doctor": ("virtgrid.cli.doctor", "doctor", "What this host lacks, and the command that mends it."),
    "reserve": (
        "virtgrid.cli.reserve",
        "reserve",
        "Reserve nodes of several sites, and bandwidth between them: all or nothing.",
    ),
    "reservation": ("virtgrid.cli.reservation", "app", "Look at reservations, and cancel them."),
    "job": ("virtgrid.cli.job", "app", "Run a program over the nodes of several sites."),
    "site": ("virtgrid.cli.site", "app", "What the sites of the grid offer."),
    "serve": ("virtgrid.cli.serve_web", "app", "Run a part of the grid: on a host, for a site, above them."),
    "ticket": ("virtgrid.cli.ticket", "app", "What permits a pilot to have a sandbox on a host."),
    "pki": ("virtgrid.cli.pki", "app", "Certificates: request, sign, install, list, revoke."),
    "lab": ("virtgrid.cli.lab", "app", "Two sites on this machine, to try and to test."),
    "bench": ("virtgrid.cli.bench", "app", "Measure: plain libvirt and gated, side by side."),
}

#: What stands below another noun, each in its own file: noun -> {word: module with an ``app``}.
BELOW: Final[dict[str, dict[str, str]]] = {
    "lab": {
        "guest": "virtgrid.cli.guest",
        "load": "virtgrid.cli.load",
        "demo": "virtgrid.cli.demo",
        "job": "virtgrid.cli.lab_job",
    },
}


class _Nouns(TyperGroup):
    """A group whose commands are imported when they are asked for.

    typer brings its own copy of click and exports none of its types, hence Any.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(NOUNS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in NOUNS:
            return None
        module, attribute, text = NOUNS[cmd_name]
        target = getattr(importlib.import_module(module), attribute)
        if not isinstance(target, typer.Typer):
            function, target = target, typer.Typer(add_completion=False, rich_markup_mode=None)
            target.command(cmd_name)(function)
        for word, below in BELOW.get(cmd_name, {}).items():
            target.add_typer(importlib.import_module(below).app, name=word)
        command = get_command(target)
        command.name = cmd_name
        command.help = command.help or text
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        # One line each without importing any of them.
        with formatter.section("Commands"):
            formatter.write_dl([(noun, text) for noun, (_, _, text) in NOUNS.items()])


app = typer.Typer(cls=_Nouns, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if not wanted:
        return
    print(f"virtgrid {__version__} (Python {platform.python_version()})")
    versions = importlib.import_module("virtgrid.virt.versions")
    print(versions.client_versions())
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions.")
    ] = False,
) -> None:
    """Live migration that waits for the guest's clients, and grid sandboxes, on libvirt."""


def main() -> None:
    """Run the command line; usage errors exit with 2."""
    sys.exit(app(prog_name="virtgrid"))


if __name__ == "__main__":
    main()
