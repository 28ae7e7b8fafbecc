"""``virtgrid track``: what the tracker makes of a guest's connections, live or in a capture file."""

from __future__ import annotations

import os
import time
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated

import typer

from virtgrid.cli.complete import domains
from virtgrid.cli.output import print_json, print_table, run
from virtgrid.core.errors import NotFoundError, RefusedError, UsageError
from virtgrid.core.units import parse_duration, parse_size
from virtgrid.report.tracking import ORDERS, Selection
from virtgrid.tracker.definition import Definition, load_all
from virtgrid.tracker.pcap import read_blocks
from virtgrid.tracker.replay import Replayed, replay_blocks
from virtgrid.tracker.state import BYTES_MAX as STATE_BYTES_MAX
from virtgrid.tracker.tracker import LARGE_BYTES
from virtgrid.tracker.views import Verdict

CaptureFile = Annotated[Path | None, typer.Option("--read", metavar="FILE", help="A pcap or pcapng file.")]
Json = Annotated[
    bool, typer.Option("--json", help="JSON lines: one per connection of a file; live, one per change.")
]
Timeline = Annotated[bool, typer.Option("--timeline", help="With every change of each connection's verdict.")]
Large = Annotated[
    str, typer.Option("--large", metavar="SIZE", help="A transfer of this size or more is large.")
]


Words = Annotated[
    list[str] | None, typer.Option("--protocol", metavar="NAME", help="Only this protocol; may be repeated.")
]
Verdicts = Annotated[
    list[str] | None,
    typer.Option(
        "--verdict", metavar="VERDICT", help="Only suitable, unsuitable or unknown; may be repeated."
    ),
]
Clients = Annotated[
    list[str] | None,
    typer.Option(
        "--client", metavar="ADDRESS", help="Only clients in this address or network; may be repeated."
    ),
]


Import = Annotated[
    Path | None,
    typer.Option("--import", metavar="FILE", help="Begin with what --export has written, here or elsewhere."),
]
Export = Annotated[
    Path | None,
    typer.Option("--export", metavar="FILE", help="At the end, write what is known of the connections."),
]


@run
def track(
    domain: Annotated[
        str | None,
        typer.Argument(
            metavar="DOMAIN", autocompletion=domains, help="Name, id or UUID of a running domain."
        ),
    ] = None,
    connect: Annotated[
        str | None,
        typer.Option(
            "-c", "--connect", metavar="URI", envvar="LIBVIRT_DEFAULT_URI", help="Its host (qemu:///system)."
        ),
    ] = None,
    tap: Annotated[
        str | None,
        typer.Option(metavar="INTERFACE", help="Follow the connections on this interface of the domain."),
    ] = None,
    protocol: Words = None,
    verdict: Verdicts = None,
    client: Clients = None,
    sort: Annotated[
        str, typer.Option(metavar="KEY", help=f"Order on the screen: {', '.join(ORDERS)}.")
    ] = "verdict",
    for_time: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="End after this time.")
    ] = None,
    known: Import = None,
    keep: Export = None,
    read: CaptureFile = None,
    as_json: Json = False,
    timeline: Timeline = False,
    large: Large = "4MiB",
) -> None:
    """Follow the connections of a running domain, or those in a capture file: which are suitable, and why."""
    large_bytes = parse_large(large)
    live: dict[str, object] = {
        "DOMAIN": domain,
        "--tap": tap,
        "--protocol": protocol,
        "--verdict": verdict,
        "--client": client,
    }
    live |= {"--for": for_time, "--sort": None if sort == "verdict" else sort}
    live |= {"--import": known, "--export": keep}
    if read is not None:
        if given := [name for name, value in live.items() if value]:
            raise UsageError(f"{given[0]} goes with a running domain, not with --read")
        found = replay_file(read, load_all(), large_bytes=large_bytes, timeline=timeline)
        show(found, as_json=as_json, timeline=timeline)
        return
    if domain is None:
        raise UsageError(
            "nothing to follow", hint="virtgrid track DOMAIN, or virtgrid track --read FILE.pcap"
        )
    if timeline:
        raise UsageError("--timeline goes with --read", hint="--json tells every change as it comes")
    chosen = selection(protocol or [], verdict or [], client or [], sort)
    for_s = None if for_time is None else parse_duration(for_time)
    from virtgrid.cli import track_live  # here: a capture file needs no libvirt

    data = None if known is None else _imported(known)
    if keep is not None and not keep.parent.is_dir():
        raise NotFoundError(f"no directory {keep.parent} to write {keep.name} in")
    guest = track_live.find(connect or "qemu:///system", domain, tap)
    last = track_live.follow(guest, chosen, large_bytes=large_bytes, for_s=for_s, as_json=as_json, known=data)
    if keep is not None:
        _export(keep, last.export_state(time.monotonic()))


def _imported(path: Path) -> bytes:
    """What --export has written; one byte more than that can be, where it is too much."""
    try:
        with path.open("rb") as file:
            return file.read(STATE_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"no file {path}") from error
    except OSError as error:
        raise RefusedError(f"{path} cannot be read", cause=error.strerror) from error


def _export(path: Path, data: bytes) -> None:
    """Whole or not at all; for its owner alone, for requests are in it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.touch(mode=0o600)
        beside.write_bytes(data)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RefusedError(f"{path} cannot be written", cause=error.strerror) from error


def selection(protocols: list[str], verdicts: list[str], clients: list[str], order: str) -> Selection:
    """What the options ask for. Errors: UsageError."""
    if order not in ORDERS:
        raise UsageError(f"--sort: '{order}' is none of {', '.join(ORDERS)}")
    for word in verdicts:
        if word not in set(Verdict):
            raise UsageError(f"--verdict: '{word}' is none of {', '.join(Verdict)}")
    try:
        networks = tuple(ip_network(text, strict=False) for text in clients)
    except ValueError as error:
        raise UsageError(
            f"--client: {error}", hint="an address, or a network such as 192.0.2.0/24"
        ) from error
    return Selection(
        protocols=frozenset(protocols), verdicts=frozenset(verdicts), clients=networks, order=order
    )


def parse_large(text: str) -> int:
    """The threshold of a large transfer, in bytes. Errors: UsageError."""
    size = parse_size(text)
    if size < 1:
        raise UsageError("--large must be at least one byte")
    return size


def replay_file(
    path: Path,
    definitions: tuple[Definition, ...] | None = None,
    *,
    large_bytes: int = LARGE_BYTES,
    timeline: bool = False,
) -> list[Replayed]:
    """The connections of a capture file. Errors: NotFoundError, RefusedError."""
    try:
        with path.open("rb") as file:
            blocks = read_blocks(file, str(path), _warn)
            return replay_blocks(blocks, definitions, large_bytes=large_bytes, timeline=timeline)
    except FileNotFoundError as error:
        raise NotFoundError(f"no file {path}") from error
    except OSError as error:
        raise RefusedError(f"{path} cannot be read", cause=error.strerror) from error


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def show(connections: list[Replayed], *, as_json: bool, timeline: bool) -> None:
    """Print connections: JSON lines, or lines for a person."""
    if as_json:
        for one in connections:
            print_json(one.as_dict(timeline=timeline), line=True)
        return
    if not connections:
        typer.echo("no TCP connection in this file")
        return
    table = [
        (
            "unsuitable" if not one.view.suitable else "suitable" if one.end is None else "closed",
            one.view.protocol,
            one.view.client,
            one.view.server,
            f"{one.view.requests}/{one.view.responses}",
            one.end or one.view.reason,
        )
        for one in connections
    ]
    columns = ("VERDICT", "PROTOCOL", "CLIENT", "SERVER", "REQ/RESP", "REASON")
    if not timeline:
        print_table(columns, table, shrink="REASON")
        return
    for one, row in zip(connections, table, strict=True):
        print_table(columns, [row], shrink="REASON")
        start_s = one.timeline[0].at_s if one.timeline else 0.0
        for change in one.timeline:
            typer.echo(f"  {change.at_s - start_s:10.3f} s  {change.verdict:<10}  {change.reason}")
