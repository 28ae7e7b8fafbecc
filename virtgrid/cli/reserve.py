"""``virtgrid reserve``: nodes of several sites and bandwidth between them, all or nothing."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Final

import typer
from pydantic import ValidationError

from virtgrid.cli.asking import PARTY_COLUMNS, Grc, ask_to_change, party_rows, view_json, when
from virtgrid.cli.output import print_json, print_table, run
from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.core.units import format_time, parse_duration, parse_rate, parse_time
from virtgrid.grid.messages.coalloc import RESERVE, ReservationState, Reserve, SiteWish, View, Window
from virtgrid.grid.messages.common import first_fault
from virtgrid.wire.wellknown import GRC

_BELOW: Final = "\n         "
"""Between the reasons of two parties, each on a line of its own below ``cause:``."""


@run
def reserve(
    nodes: Annotated[str, typer.Option(metavar="SITE:N,...", help="How many nodes of which sites.")],
    walltime: Annotated[str, typer.Option(metavar="TIME", help="For how long: 30m, 2h.")],
    begin: Annotated[
        str | None, typer.Option(metavar="TIME", help="With its zone: 2026-11-27T10:00Z. Default: now.")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(metavar="RATE", help="Between each two sites, each way: 100mbit.")
    ] = None,
    addresses: Annotated[
        list[str] | None,
        typer.Option(metavar="SITE=RANGE", help="Of a site's nodes, instead of any that are free."),
    ] = None,
    segment: Annotated[int | None, typer.Option(metavar="N", help="This one, instead of any.")] = None,
    id_: Annotated[
        str | None,
        typer.Option("--id", metavar="NAME", help="Its name; said again it is the same reservation."),
    ] = None,
    grc: Grc = GRC,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Reserve nodes of several sites, and bandwidth between them: all or nothing."""
    wish = wish_of(nodes, walltime, begin, bandwidth, addresses or [], segment, id_)
    view = ask_to_change(grc, RESERVE, wish, wish.id)
    if as_json:
        print_json(view_json(view))
    if view.state is not ReservationState.COMMITTED:
        if as_json:
            raise SystemExit(RefusedError.exit_status)
        raise refused(view)
    if not as_json:
        print(f"reservation {view.id} stands: {when(view.window)}")
        print_table(PARTY_COLUMNS, party_rows(view))


def wish_of(
    nodes: str,
    walltime: str,
    begin: str | None,
    bandwidth: str | None,
    addresses: list[str],
    segment: int | None,
    id_: str | None,
) -> Reserve:
    """What the options mean. Errors: UsageError."""
    ranges = dict(_pair(text, "=", "--addresses", "alpha=10.77.1.0/28") for text in addresses)
    counts = dict(_pair(text, ":", "--nodes", "alpha:2,beta:2") for text in nodes.split(","))
    if strange := sorted(ranges.keys() - counts.keys()):
        raise UsageError(f"--addresses: {strange[0]} is not among the sites of --nodes")
    if not all(count.isascii() and count.isdigit() for count in counts.values()):
        raise UsageError(f"--nodes: '{nodes[:80]}' has a site without a number", hint="alpha:2,beta:2")
    if len(counts) != len(nodes.split(",")):
        raise UsageError("--nodes: a site stands there twice")
    begins_at_s = int(time.time()) if begin is None else parse_time(begin)
    try:
        return Reserve(
            id=id_ or f"r-{secrets.token_hex(6)}",
            window=Window(begins_at_s=begins_at_s, ends_at_s=begins_at_s + round(parse_duration(walltime))),
            sites=tuple(
                SiteWish(site=site, nodes=int(count), addresses=ranges.get(site))
                for site, count in counts.items()
            ),
            bandwidth_bytes_s=None if bandwidth is None else round(parse_rate(bandwidth)),
            segment=segment,
        )
    except ValidationError as error:
        raise UsageError(f"such a reservation cannot be: {first_fault(error)}") from None


def _pair(text: str, by: str, option: str, example: str) -> tuple[str, str]:
    left, found, right = text.partition(by)
    if not found or not left or not right:
        raise UsageError(f"{option}: '{text[:80]}' is not SITE{by}…", hint=example)
    return left, right


def refused(view: View) -> RefusedError:
    reasons = [f"{one.party}: {one.why}" for one in view.parties if one.why]
    hint = None
    if view.nearest:
        hint = "all could from " + " or ".join(format_time(one.begins_at_s) for one in view.nearest)
        hint += f"; virtgrid reserve --begin {format_time(view.nearest[0].begins_at_s)} …"
    return RefusedError(
        f"reservation {view.id} was not made", cause=_BELOW.join(reasons) or view.reason, hint=hint
    )
