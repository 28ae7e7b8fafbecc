"""``virtgrid evacuate``: every domain of this host to somewhere else, by virtgridd's queue."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any, Final

import typer

from virtgrid.cli import moves
from virtgrid.cli.keys import Interrupts
from virtgrid.cli.output import print_json, run
from virtgrid.core.errors import HoldTimeoutError, InterruptedByUserError, VirtgridError
from virtgrid.core.units import format_duration, parse_duration
from virtgrid.grid.messages.moves import Evacuate, Evacuated, Left
from virtgrid.report.model import clean
from virtgrid.wire.wellknown import VIRTGRIDD

_POLL_S: Final = 0.5
_ENDED: Final = ("done", "failed", "gave up")


@run
def evacuate(
    to: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Where those go whose policy names no destination."),
    ] = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="Wait at most this long; the queue goes on. Exit 5.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return as soon as they are in the queue.")
    ] = False,
    host: moves.Host = VIRTGRIDD,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per change.")] = False,
) -> None:
    """Migrate all domains of this host away, gated, as many at a time as the configuration permits.

    Interrupted, virtgridd goes on; said again, what is on its way is followed, and nothing is asked twice.
    """
    limit_s = parse_duration(timeout) if timeout is not None else float("inf")
    asked = moves.ask(host, "evacuate", Evacuate(to=to), Evacuated)
    ids = set(asked.asked)
    for one in asked.left:
        _tell_left(one, as_json)
    if detach:
        entries = [entry for entry in moves.queue(host) if entry["id"] in ids]
        print_json({"entries": entries, "left": asked.left}) if as_json else moves.show(entries)
        raise SystemExit(1 if asked.left else 0)
    ended = _follow(host, ids, limit_s, as_json)
    stayed = [entry for entry in ended if entry["state"] != "done"]
    told = {"moved": len(ended) - len(stayed), "stayed": len(stayed) + len(asked.left)}
    if as_json:
        print_json({"event": "evacuated", **told}, line=True)
    else:
        print(f"{told['moved']} moved, {told['stayed']} stayed")
    if told["stayed"]:
        unknown = any(entry["state"] == "failed" and "recover" in entry["note"] for entry in stayed)
        raise SystemExit(7 if unknown else 1)


def _follow(host: str, ids: set[str], limit_s: float, as_json: bool) -> list[dict[str, Any]]:
    """Print what changes until all have ended. Errors: HoldTimeoutError, InterruptedByUserError."""
    began_s, seen = time.monotonic(), dict[str, tuple[Any, ...]]()
    with Interrupts() as interrupts:
        while True:
            entries = [entry for entry in moves.queue(host) if entry["id"] in ids]
            for entry in entries:
                told = (entry["state"], entry["note"], entry["migration"])
                if seen.get(entry["id"]) != told:
                    seen[entry["id"]] = told
                    _tell(entry, len([one for one in entries if one["state"] in _ENDED]), len(ids), as_json)
            if len(entries) < len(ids):
                raise VirtgridError("the queue has forgotten a migration", hint="virtgrid migration list")
            if all(entry["state"] in _ENDED for entry in entries):
                return entries
            if interrupts.count:
                raise InterruptedByUserError(
                    "virtgridd goes on without a view", hint="virtgrid migration queue"
                )
            if time.monotonic() - began_s > limit_s:
                raise HoldTimeoutError(
                    f"this host is not empty after {format_duration(limit_s)}; virtgridd goes on",
                    hint="virtgrid migration queue",
                )
            time.sleep(_POLL_S)


def _tell(entry: dict[str, Any], ended: int, of: int, as_json: bool) -> None:
    if as_json:
        print_json({"event": "move", **entry}, line=True)
        return
    text = entry["note"] or entry["migration"] or ""
    line = f"[{ended}/{of}] {entry['domain']} → {entry['to']}: {entry['state']}{f' ({text})' if text else ''}"
    print(clean(line, 500), flush=True)


def _tell_left(one: Left, as_json: bool) -> None:
    if as_json:
        print_json({"event": "left", "domain": one.domain, "why": one.why}, line=True)
    else:
        print(clean(f"{one.domain} cannot go: {one.why}", 500), file=sys.stderr)
