"""Following a migration on the terminal: its journal shown as it grows, keys and Ctrl-C passed on."""

from __future__ import annotations

import contextlib
import time
from typing import Final

from virtgrid.cli.keys import Interrupts, key_presses
from virtgrid.cli.output import console, interactive, print_error, print_json
from virtgrid.core import journal as journals
from virtgrid.core.errors import NotFoundError, PositionUnknownError, VirtgridError
from virtgrid.core.events import TERMINAL, Record
from virtgrid.migration import control, running, worker
from virtgrid.report.lines import PlainLines
from virtgrid.report.view import LiveView

_FOLLOW_POLL_S: Final = 0.1


class _JsonLines:
    """``--json``: the journal's lines as they come."""

    def on_record(self, record: Record) -> None:
        print_json(record.as_dict(), line=True)

    def tick(self) -> None:
        return


def follow(started: worker.Worker, as_json: bool, interrupts: Interrupts) -> int:
    """Show a migration until it ends -> the exit status. Detaching leaves it running (0).

    interrupts: counting already; one that came before is passed on too.
    """
    live = not as_json and interactive()
    follower = journals.Follower(started.journal)
    last: Record | None = None
    with contextlib.ExitStack() as stack:
        stack.callback(follower.close)
        pressed = stack.enter_context(key_presses())
        view: LiveView | PlainLines | _JsonLines
        if live:
            view = stack.enter_context(LiveView(console()))
        else:
            view = _JsonLines() if as_json else PlainLines(lambda line: print(line, flush=True))
        asked = 0
        while last is None or last.event not in TERMINAL:
            ended = started.process.poll() is not None  # looked at before the file: nothing is missed
            for record in follower.poll():
                last = record
                view.on_record(record)
            if ended and (last is None or last.event not in TERMINAL):
                break
            view.tick()
            key = pressed()
            if key == "d" or interrupts.count > 1:
                break
            if key in ("r", "a"):
                _ask(started.uuid, "release" if key == "r" else "abort", "the person watching")
            if interrupts.count > asked and _ask(started.uuid, "abort", "Ctrl-C"):
                asked = interrupts.count
            time.sleep(_FOLLOW_POLL_S)
    return _ending(started, last, interrupted=interrupts.count > 0, as_json=as_json)


def _ask(uuid: str, command: str, by: str) -> bool:
    """False when nobody listens, which early on means: not yet. The journal tells what became of it."""
    try:
        control.ask(running.socket_path(uuid), command, by=by)
    except NotFoundError:
        return False
    except VirtgridError:
        return True
    return True


def _ending(started: worker.Worker, last: Record | None, *, interrupted: bool, as_json: bool) -> int:
    migration_id = started.journal.stem
    if last is not None and last.event == "finished":
        return 0
    if last is not None and last.event == "failed":
        if not as_json:
            print_error(worker.rebuild_from_record(dict(last.fields)))
        return 130 if interrupted else int(last["exit_status"])
    if started.process.poll() is None:
        if not as_json:
            print(f"{migration_id} goes on without a view: virtgrid migration show {migration_id}")
        return 130 if interrupted else 0
    print_error(
        PositionUnknownError(
            "the migration's driver died before the end",
            where="libvirt cancels what it had begun, so the domain should be on the source",
            hint=f"virtgrid migration recover {migration_id}",
        ),
        as_json,
    )
    return PositionUnknownError.exit_status
