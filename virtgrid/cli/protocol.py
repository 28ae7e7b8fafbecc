"""``virtgrid protocol``: protocol definitions, listed, checked, drawn and tried on a capture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from virtgrid.cli.output import print_json, print_table, run
from virtgrid.cli.track import Json, Large, Timeline, parse_large, replay_file, show
from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.tracker.definition import Definition, builtin, load_all, load_file
from virtgrid.tracker.draw import as_svg, as_text

app = typer.Typer(no_args_is_help=True, help="Protocol definitions: list, check, draw, replay.")

DefinitionFile = Annotated[Path, typer.Argument(metavar="FILE", help="A definition, *.pdl.")]
NameOrFile = Annotated[str, typer.Argument(metavar="PROTOCOL", help="A protocol's name, or a file, *.pdl.")]
Svg = Annotated[
    Path | None, typer.Option("--svg", metavar="FILE", help="Write a picture instead of printing text.")
]
CaptureFile = Annotated[Path, typer.Argument(metavar="CAPTURE", help="A pcap or pcapng file.")]
Only = Annotated[Path | None, typer.Option("--definition", metavar="FILE", help="Use only this definition.")]


@app.command("list")
@run
def list_(as_json: Json = False) -> None:
    """The protocols that are recognised, in the order in which they are tried."""
    own = {d.path for d in builtin()}
    rows: list[tuple[str, str, str]] = []
    for definition in load_all():
        origin = "built in" if definition.path in own else definition.path
        if as_json:
            print_json({**_described(definition), "origin": origin}, line=True)
        rows.append((definition.name, " ".join(map(str, definition.ports)), origin))
    if not as_json:
        print_table(("PROTOCOL", "PORTS", "ORIGIN"), rows)


@app.command()
@run
def check(file: DefinitionFile, as_json: Json = False) -> None:
    """Read a definition and say what is wrong with it, with file and line."""
    if not file.exists():
        raise NotFoundError(f"no file {file}")
    definition = load_file(file)
    if as_json:
        print_json({**_described(definition), "origin": str(file)}, line=True)
    else:
        described = _described(definition)
        rules = described["client_rules"] + described["server_rules"]
        typer.echo(f"{file}: protocol {definition.name}, {rules} rules, good")


@app.command()
@run
def draw(protocol: NameOrFile, svg: Svg = None) -> None:
    """Show a definition's states, and which of its rules lead from one to another."""
    path = Path(protocol)
    if path.suffix == ".pdl" or path.exists():
        if not path.exists():
            raise NotFoundError(f"no file {path}")
        definition = load_file(path)
    else:
        found = [d for d in load_all() if d.name == protocol]
        if not found:
            names = " ".join(d.name for d in load_all())
            raise NotFoundError(f"no protocol '{protocol}'", hint=f"known are {names}; or give a file, *.pdl")
        definition = found[0]
    if svg is None:
        typer.echo(as_text(definition), nl=False)
        return
    try:
        svg.write_text(as_svg(definition), encoding="utf-8")
    except OSError as error:
        raise RefusedError(f"{svg} cannot be written", cause=error.strerror) from error


@app.command("replay")
@run
def replay_(
    capture: CaptureFile,
    definition: Only = None,
    as_json: Json = False,
    timeline: Timeline = False,
    large: Large = "4MiB",
) -> None:
    """Run a capture through the definitions and show every connection."""
    if definition is not None and not definition.exists():
        raise NotFoundError(f"no file {definition}")
    definitions = load_all() if definition is None else (load_file(definition),)
    show(
        replay_file(capture, definitions, large_bytes=parse_large(large), timeline=timeline),
        as_json=as_json,
        timeline=timeline,
    )


def _described(definition: Definition) -> dict[str, Any]:
    return {
        "name": definition.name,
        "ports": list(definition.ports),
        "client_rules": len(definition.client) + len(definition.client_more),
        "server_rules": len(definition.server) + len(definition.server_more),
    }
