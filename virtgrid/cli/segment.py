"""``virtgrid segment``: one network segment stretched over two hosts, so that guests keep their addresses.

And the segments that reservations have on this host.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from virtgrid.cli.output import print_json, print_table, run
from virtgrid.core.errors import RefusedError
from virtgrid.net import reserving, segment
from virtgrid.net.segment import Segment

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="A segment stretched over two hosts: give `up` at both, each naming the other. And reserved ones.",
)

Json = Annotated[bool, typer.Option("--json", help="One JSON array on standard output.")]


@app.command()
@run
def up(
    bridge: Annotated[str, typer.Argument(metavar="BRIDGE", help="The guests' bridge on this host.")],
    host: Annotated[str, typer.Argument(metavar="HOST", help="The other host: a name or an address.")],
    vni: Annotated[int, typer.Option(metavar="N", help="The segment's number, the same at both hosts.")] = 1,
    as_json: Json = False,
) -> None:
    """Make the segment, or mend it; nothing is changed where frames would not fit or go in circles."""
    _require_root()
    _show([segment.up(bridge, host, vni)], as_json)


@app.command()
@run
def down(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `status` tells it: vgs1.")],
) -> None:
    """Remove a segment on this host. Guests go on, without a way to the other host."""
    _require_root()
    if not segment.down(name):
        print(f"there is no {name}, nothing to remove", file=sys.stderr)


@app.command()
@run
def status(as_json: Json = False) -> None:
    """Show the segments of this host."""
    _show(segment.status(), as_json)


@app.command()
@run
def reserved(as_json: Json = False) -> None:
    """Show the segments that reservations have on this host, as virtgridd made them."""
    found = reserving.status()
    if as_json:
        print_json(found)
        return
    rows = [
        (
            one.segment,
            one.bridge,
            one.reservation,
            " ".join(one.peers) or "-",
            one.mtu,
            f"{one.guaranteed_bytes_s * 8 / 1e6:.4g} Mbit/s" if one.guaranteed_bytes_s else "-",
            "up" if one.up else "down",
        )
        for one in found
    ]
    print_table(("SEGMENT", "BRIDGE", "RESERVATION", "OTHER HOSTS", "MTU", "GUARANTEED", "STATE"), rows)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise RefusedError("making and removing interfaces needs root", hint="run it with sudo")


def _show(found: Sequence[Segment], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    rows = [
        (one.name, one.bridge, one.tunnel.vni, one.tunnel.local, one.tunnel.remote, one.mtu, _state(one))
        for one in found
    ]
    print_table(("NAME", "BRIDGE", "VNI", "LOCAL", "REMOTE", "MTU", "STATE"), rows)


def _state(one: Segment) -> str:
    if not one.up:
        return "down"
    return "up" if one.ushered else "up, its usher is gone (segment up starts it again)"
