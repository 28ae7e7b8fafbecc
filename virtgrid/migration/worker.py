"""The process that drives a migration, apart from the one a person looks at.

The command starts it, reads its first line (a journal's path, or why there is none) and then
only follows the journal. So a closed terminal ends the view, not the migration, and Ctrl-C is a
request like any other. A worker killed with -9 takes its libvirt connections along, which makes
libvirt cancel the migration and leave the guest on the source.

Protocol: the request as JSON on standard input, one JSON line back on standard output.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter

from virtgrid.core.clock import SystemClock
from virtgrid.core.errors import VirtgridError
from virtgrid.core.journal import Journal, migrations_dir, new_id
from virtgrid.core.process import let_go_of_stdout, process_started
from virtgrid.migration import facts
from virtgrid.migration.driver import Driver
from virtgrid.migration.plan import MigrationPlan, MigrationRequest, make_plan
from virtgrid.migration.tapwatch import open_watch
from virtgrid.virt.connection import Hypervisor
from virtgrid.virt.domain import Domain

_REQUEST: Final = TypeAdapter(MigrationRequest)
_INTERRUPTED_POLL_S: Final = 0.1

Drive = Callable[[Hypervisor, Hypervisor, Domain], Awaitable[Any]]


async def connected(request: MigrationRequest, drive: Drive) -> Any:
    """Run ``drive(source, destination, domain)`` with control connections to both hosts.

    Errors: PeerUnreachableError, NotFoundError.
    """
    source, destination = await facts.connect_both(request)
    async with source, destination:
        domain = await Domain.find(source, request.domain)
        return await drive(source, destination, domain)


async def dry_run(request: MigrationRequest) -> MigrationPlan:
    """The plan with all its facts; nothing is changed and no journal is written."""

    async def drive(source: Hypervisor, destination: Hypervisor, domain: Domain) -> MigrationPlan:
        found = await facts.gather(request, source, destination, domain, own_id=f"look{os.getpid()}")
        return make_plan(request, found)

    result = await connected(request, drive)
    assert isinstance(result, MigrationPlan)
    return result


@dataclass(slots=True)
class Worker:
    """A running worker: its process and the journal it writes."""

    process: subprocess.Popen[bytes]
    journal: Path
    uuid: str


def start(request: MigrationRequest, *, interrupted: Callable[[], bool] = lambda: False) -> Worker:
    """Start a worker and wait until it has a journal, or says why not.

    interrupted: asked now and then; true gives up. A worker that has told its journal is returned
    all the same: then whoever follows it passes the interrupt on, and learns where the domain is.
    Errors: whatever kept it from beginning (domain not found, peer unreachable); KeyboardInterrupt.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "virtgrid.migration.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if os.environ.get("VIRTGRID_DEBUG") == "1" else subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(_REQUEST.dump_json(request))
        while not select.select([process.stdout], [], [], _INTERRUPTED_POLL_S)[0]:
            if interrupted():
                raise KeyboardInterrupt
        line = process.stdout.readline()
    except BaseException:
        # Ctrl-C while it connects: who was told "interrupted" must not find the guest elsewhere later.
        process.terminate()
        raise
    process.stdout.close()
    try:
        answer = json.loads(line)
        if "journal" in answer:
            return Worker(process=process, journal=Path(answer["journal"]), uuid=answer["uuid"])
        raise _rebuild(answer)
    except (ValueError, KeyError, TypeError) as error:
        process.wait()
        raise VirtgridError(
            f"the migration's process ended before it began (status {process.returncode})",
            hint="VIRTGRID_DEBUG=1 shows what it said",
        ) from error


def _rebuild(told: dict[str, Any]) -> VirtgridError:
    """An error told by the worker, as the class it was."""
    kinds = {kind.code: kind for kind in _family(VirtgridError)}
    kind = kinds.get(told["error"], VirtgridError)
    error = VirtgridError.__new__(kind)
    VirtgridError.__init__(error, told["what"], where=told["where"], cause=told["cause"], hint=told["hint"])
    return error


def _family(kind: type[VirtgridError]) -> list[type[VirtgridError]]:
    return [kind, *(sub for child in kind.__subclasses__() for sub in _family(child))]


def rebuild_from_record(fields: dict[str, Any]) -> VirtgridError:
    """The error a ``failed`` record tells of, to be shown and exited with."""
    return _rebuild({"where": None, "cause": None, "hint": None, **fields})


# --- inside the worker --------------------------------------------------------------------


async def _drive(request: MigrationRequest) -> int:
    clock = SystemClock()

    async def drive(source: Hypervisor, destination: Hypervisor, domain: Domain) -> int:
        migration_id, opened = await begin_journal(request, clock, source, destination, domain)
        with opened as journal:
            driver = Driver(request, journal, clock, migration_id, open_watch=open_watch)
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTERM, driver.request_abort, "SIGTERM")
            _tell({"journal": str(journal.path), "uuid": domain.uuid})
            try:
                await driver.run(source, destination, domain)
            except VirtgridError as error:
                return error.exit_status
            return 0

    try:
        return int(await connected(request, drive))
    except VirtgridError as error:
        _tell(error.as_dict())
        return error.exit_status


async def begin_journal(
    request: MigrationRequest,
    clock: SystemClock,
    source: Hypervisor,
    destination: Hypervisor,
    domain: Domain,
) -> tuple[str, Journal]:
    """(The migration's id, its journal, begun); the journal is the caller's to close."""
    source_name, destination_name = await source.hostname(), await destination.hostname()
    migration_id, journal = await _new_journal(clock, domain.name)
    journal.write(
        "started",
        sync=True,
        id=migration_id,
        domain=domain.name,
        uuid=domain.uuid,
        source=source_name,
        destination=destination_name,
        source_uri=request.source_uri,
        dest_uri=request.dest_uri,
        policy=request.policy.name,
        options=_options(request),
        pid=os.getpid(),
        pid_started=process_started(os.getpid()),
        **({"reason": request.reason} if request.reason else {}),
    )
    return migration_id, journal


async def _new_journal(clock: SystemClock, domain: str) -> tuple[str, Journal]:
    """A journal under a name of its own: names count seconds, so one that is taken waits for the next."""
    while True:
        migration_id = new_id(clock.utc(), domain)
        with contextlib.suppress(FileExistsError):
            return migration_id, Journal(migrations_dir() / f"{migration_id}.jsonl", clock)
        await clock.sleep(0.2)


def _options(request: MigrationRequest) -> dict[str, Any]:
    """The request as the journal keeps it: what a person would want to see or repeat."""
    told = json.loads(_REQUEST.dump_json(request, exclude_none=True))
    for long in ("destination_xml", "persistent_xml", "source_uri", "dest_uri", "domain"):
        told.pop(long, None)
    return dict(told)


def _tell(answer: dict[str, Any]) -> None:
    """The one line to whoever started us; afterwards they have only the journal."""
    if sys.stdout.closed:
        return
    with contextlib.suppress(OSError):
        print(json.dumps(answer), flush=True)
    with contextlib.suppress(OSError):
        sys.stdout.close()
    let_go_of_stdout()


def _main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = _REQUEST.validate_json(sys.stdin.buffer.read(1 << 22))
    # The guest's pause is watched from here: be ahead of what merely computes. Best effort.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    status = asyncio.run(_drive(request))
    # A libvirt call that hangs must not keep the process: its threads are daemons, but exit
    # handlers of the C library could wait for their locks.
    os._exit(status)


if __name__ == "__main__":
    _main()
