"""The embedded backend: this very host has all the nodes, and a pilot is an ordinary process of its user.

A node is a place for one sandbox at a time. Nothing but directories says what there is: one for each hold
and in it one for each pilot, with its ticket, its record and its log. Which pilots run, the kernel is
asked: theirs is the command line that names the ticket's file. So a CRM that was killed finds them all
again, and a host that was switched off has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from virtgrid.core.errors import RefusedError
from virtgrid.core.units import format_size
from virtgrid.grid.crm import place as places
from virtgrid.grid.crm.backend import Node, NodesPromised, PilotOrder, PilotUsage
from virtgrid.wire.endpoint import Endpoint

DIRECTORY: Final = Path("/run/virtgrid/pilots")
KILL_AFTER_S: Final = 10.0
"""How long a pilot may take to shut its sandbox down before it is killed."""
_ASK_S: Final = 2.0
#: A pilot's ticket, record and log.
_FREE_MIN_BYTES: Final = 4 << 20
VIRTGRID: Final = (sys.executable, "-m", "virtgrid.cli.main")


class Embedded:
    """nodes: their names. host: where pilots reach virtgridd. program: virtgrid's own command line."""

    def __init__(
        self,
        *,
        nodes: Sequence[str],
        host: Endpoint,
        directory: Path = DIRECTORY,
        program: Sequence[str] = VIRTGRID,
        kill_after_s: float = KILL_AFTER_S,
    ) -> None:
        """Errors: RefusedError."""
        if len(set(nodes)) != len(nodes):
            raise RefusedError("a node stands there twice")
        self.names, self.guard_s = tuple(nodes), 0
        self._host, self._program = host, tuple(program)
        self._directory, self._kill_after_s = directory, kill_after_s
        self._children: list[subprocess.Popen[bytes]] = []
        self._ending: dict[str, asyncio.Task[None]] = {}
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise RefusedError(f"{directory} cannot be used for pilots", cause=error.strerror) from error

    async def close(self) -> None:
        """For the end of the CRM: pilots go on."""
        for task in self._ending.values():
            task.cancel()
        await asyncio.gather(*self._ending.values(), return_exceptions=True)

    async def nodes(self) -> tuple[Node, ...]:
        return tuple(Node(name=name) for name in self.names)

    async def problems(self) -> tuple[str, ...]:
        found = []
        try:
            async with asyncio.timeout(_ASK_S):
                _, line = await asyncio.open_unix_connection(self._host.path)
            line.close()
        except TimeoutError:
            found.append(f"virtgridd at {self._host} does not answer: no sandbox can be made")
        except OSError as error:
            found.append(f"virtgridd is not at {self._host} ({error.strerror}): no sandbox can be made")
        try:
            free = shutil.disk_usage(self._directory).free
        except OSError as error:
            found.append(f"{self._directory} cannot be used ({error.strerror}): no pilot can be started")
        else:
            if free < _FREE_MIN_BYTES:
                found.append(f"{self._directory} has {format_size(free)} left: no pilot can be started")
        return tuple(found)

    async def promise(self, what: NodesPromised) -> None:
        """The CRM's own table is all there is: nobody else gives these nodes out."""
        if strange := sorted(set(what.nodes) - set(self.names)):
            raise RefusedError(f"there is no node {strange[0]}")

    async def restore(self, promised: Sequence[NodesPromised]) -> Mapping[str, str]:
        return {}

    async def withdraw(self, hold: str) -> None:
        await self.stop(hold, places.names_below(self._directory / hold))
        for name in [one for one in self._ending if one.startswith(f"{hold}/")]:
            await asyncio.gather(self._ending[name], return_exceptions=True)
        await asyncio.to_thread(shutil.rmtree, self._directory / hold, ignore_errors=True)

    async def start(self, orders: Sequence[PilotOrder]) -> None:
        for hold in {order.hold for order in orders}:
            there = await self.running(hold)
            for order in orders:
                if order.hold == hold and order.sandbox not in there:
                    await asyncio.to_thread(self._start, order)

    async def running(self, hold: str) -> frozenset[str]:
        return frozenset(await asyncio.to_thread(self._processes, hold))

    async def stop(self, hold: str, sandboxes: Sequence[str]) -> None:
        there = await asyncio.to_thread(self._processes, hold)
        for sandbox in set(sandboxes) & there.keys():
            name = f"{hold}/{sandbox}"
            if name not in self._ending:
                task = self._ending[name] = asyncio.create_task(self._end(hold, sandbox), name=f"end {name}")
                task.add_done_callback(functools.partial(self._ended, name))

    def _ended(self, name: str, _: object) -> None:
        self._ending.pop(name, None)

    async def usage(self, hold: str) -> tuple[PilotUsage, ...]:
        there = await self.running(hold)
        found = []
        for name in places.names_below(self._directory / hold):
            place = self._directory / hold / name
            ended = _end_mark(place)
            with contextlib.suppress(OSError):
                if name not in there and not ended.exists():
                    ended.touch()
                until_s = ended.stat().st_mtime if ended.exists() else time.time()
                began_s = places.ticket_of(place).stat().st_mtime
                found.append(PilotUsage(sandbox=name, elapsed_s=max(0.0, until_s - began_s)))
        return tuple(found)

    async def holds(self) -> frozenset[str]:
        return frozenset(places.names_below(self._directory))

    # -- processes -----------------------------------------------------------------------------

    def _start(self, order: PilotOrder) -> None:
        """Errors: RefusedError."""
        account = places.account_of(order.account)
        place = places.furnish(self._directory, order, account)
        try:
            _end_mark(place).unlink(missing_ok=True)
            log = places.open_log(place, account)
            try:
                self._children.append(self._spawn(order, account, place, log))
            finally:
                os.close(log)
        except OSError as error:
            raise RefusedError(
                f"the pilot of {order.sandbox} cannot be started", cause=error.strerror
            ) from error

    def _spawn(
        self, order: PilotOrder, account: pwd.struct_passwd, place: Path, log: int
    ) -> subprocess.Popen[bytes]:
        mine = account.pw_uid == os.geteuid()
        groups = None if mine else os.getgrouplist(account.pw_name, account.pw_gid)
        return subprocess.Popen(
            places.command(self._program, order, place, self._host),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            # A session of its own: it goes on without us.
            start_new_session=True,
            user=None if mine else account.pw_uid,
            group=None if mine else account.pw_gid,
            extra_groups=groups,
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": account.pw_dir, "LANG": "C.UTF-8"},
        )

    def _processes(self, hold: str) -> dict[str, int]:
        """Sandbox -> process of its pilot, of those that run."""
        self._children = [child for child in self._children if child.poll() is None]
        if not (self._directory / hold).is_dir():  # of another CRM that has the same place elsewhere
            return {}
        before, found = f"{self._directory / hold}/", {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                except OSError:  # it has ended
                    continue
                for word, following in itertools.pairwise(words):
                    if word == "--ticket" and following.startswith(before):
                        found[following.removeprefix(before).partition("/")[0]] = int(entry.name)
        return found

    async def _end(self, hold: str, sandbox: str) -> None:
        """SIGTERM, and SIGKILL when that was not enough."""
        until_s = time.monotonic() + self._kill_after_s
        number = signal.SIGTERM
        said = 0
        while (pid := (await asyncio.to_thread(self._processes, hold)).get(sandbox)) is not None:
            if time.monotonic() > until_s:
                number = signal.SIGKILL
            if pid != said or number is signal.SIGKILL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
                said = pid
            await asyncio.sleep(0.1)


def _end_mark(place: Path) -> Path:
    """Says by its time when a pilot had ended. Beside its place, where only we write."""
    return place.with_name(f".{place.name}.ended")
