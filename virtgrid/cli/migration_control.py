"""``virtgrid migration wait|release|abort|recover``: steering a migration that runs, or was cut short."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Final

import typer

from virtgrid.cli import moves
from virtgrid.cli.migration import Json, Reference, app  # the same noun, its verbs that act
from virtgrid.cli.output import console, print_json, run
from virtgrid.core import journal as journals
from virtgrid.core.errors import HoldTimeoutError, UsageError, VirtgridError
from virtgrid.core.events import TERMINAL
from virtgrid.core.units import format_duration, parse_duration
from virtgrid.migration import control, recovery
from virtgrid.report.files import writer_alive
from virtgrid.wire.wellknown import VIRTGRIDD

_POLL_S: Final = 0.1
#: What can be waited for -> the events that mean it has come.
CONDITIONS: Final = {
    "hold": frozenset({"hold", "released"}) | TERMINAL,
    "switchover": frozenset({"stopped", "resumed"}) | TERMINAL,
    "finished": TERMINAL,
}


@app.command()
@run
def wait(
    reference: Reference,
    condition: Annotated[
        str, typer.Option("--for", metavar="STATE", help="hold, switchover or finished.")
    ] = "finished",
    timeout: Annotated[str | None, typer.Option(metavar="TIME", help="At most this long; exit 5.")] = None,
    as_json: Json = False,
) -> None:
    """Wait until a migration holds, switches or ends; exits with the migration's status at its end."""
    if condition not in CONDITIONS:
        raise UsageError(f"--for: '{condition}' is none of {', '.join(CONDITIONS)}")
    limit_s = parse_duration(timeout) if timeout is not None else float("inf")
    path = journals.find(reference)
    writer = _writer(path.stem)  # not the reference: a domain's newest may be another one by now
    follower = journals.Follower(path)
    began_s = time.monotonic()
    try:
        while True:
            alive = writer_alive(*writer)  # asked before the file is read: nothing is missed
            for record in follower.poll():
                if record.event in CONDITIONS[condition]:
                    print_json(record.as_dict()) if as_json else print(f"{path.stem}: {record.event}")
                    raise SystemExit(int(record.get("exit_status", 0)))
            if not alive:
                raise VirtgridError(
                    f"{path.stem} ended without an end: its driver died",
                    hint=f"virtgrid migration recover {path.stem}",
                )
            if time.monotonic() - began_s > limit_s:
                raise HoldTimeoutError(
                    f"{path.stem} did not come to '{condition}' within {format_duration(limit_s)}"
                )
            time.sleep(_POLL_S)
    finally:
        follower.close()


def _writer(reference: str) -> tuple[int, int]:
    began = journals.read(journals.find(reference))[0]
    return int(began.get("pid", 0)), int(began.get("pid_started", 0))


def _steer(reference: str, command: str, by: str, as_json: bool) -> None:
    answer = control.steer(journals.find(reference), command, by=by)
    print_json(answer) if as_json else print(answer.get("text", ""))


@app.command()
@run
def release(
    reference: Reference,
    by: Annotated[str, typer.Option(metavar="NAME", help="Who asks; written into the journal.")] = "",
    as_json: Json = False,
) -> None:
    """Let go of a held switchover now, whatever its connections do."""
    _steer(reference, "release", by or "virtgrid migration release", as_json)


@app.command()
@run
def abort(
    reference: Reference,
    by: Annotated[str, typer.Option(metavar="NAME", help="Who asks; written into the journal.")] = "",
    as_json: Json = False,
) -> None:
    """End a running migration; the domain stays on the source."""
    _steer(reference, "abort", by or "virtgrid migration abort", as_json)


@app.command()
@run
def recover(
    reference: Reference,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this it is only said.")] = False,
    as_json: Json = False,
) -> None:
    """After a driver died or lost sight: look on both hosts, say where the domain is, put things right."""
    path = journals.find(reference)
    alive = writer_alive(*_writer(path.stem))
    found = asyncio.run(recovery.recover(path, act=yes, writer_gone=not alive))
    if as_json:
        print_json(found)
    else:
        out = console()
        out.print(found.situation.text, soft_wrap=True)
        for action in found.actions:
            out.print(f"  {'done' if found.done else 'would do'}: {action}", soft_wrap=True)
        if not found.actions:
            out.print("  nothing needs doing")
        elif not found.done:
            out.print(f"  virtgrid migration recover {path.stem} --yes does it", soft_wrap=True)
    if not found.situation.certain:
        raise SystemExit(7)


@app.command()
@run
def queue(
    withdraw: Annotated[
        str | None, typer.Option(metavar="ID", help="Give up an entry that has not begun.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Those that have ended, too.")] = False,
    host: moves.Host = VIRTGRIDD,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False,
) -> None:
    """Show virtgridd's queue of migrations on this host: who goes, who waits, and for what."""
    from virtgrid.grid.messages.moves import Moves, Withdraw

    if withdraw is not None:
        found = list(moves.ask(host, "withdraw", Withdraw(id=withdraw), Moves).entries)
    else:
        ended = ("done", "failed", "gave up")
        found = [one for one in moves.queue(host) if everything or one["state"] not in ended]
    if as_json:
        print_json(found)
    else:
        moves.show(found)
