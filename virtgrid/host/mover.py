"""virtgridd's migrations: the queue (``queue``) kept on the disk (``entries``) and brought about.

A worker is the same process that ``virtgrid migrate`` starts, in a session of its own. After a restart it is
found again: its journal says whose it is (the reason it was given), and how it ended. When its writer died,
both hosts are asked, as ``virtgrid migration recover --yes`` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from virtgrid.config import Config
from virtgrid.core import journal as journals
from virtgrid.core.errors import (
    DeadlineError,
    NotFoundError,
    PeerUnreachableError,
    PositionUnknownError,
    RefusedError,
    VirtgridError,
)
from virtgrid.core.events import TERMINAL, Record
from virtgrid.grid.messages.moves import Left
from virtgrid.host import orders
from virtgrid.host.entries import Entries
from virtgrid.host.queue import Entry, Event, State, after_attempt, decide, follow
from virtgrid.migration import domainpolicy, recovery, running, worker
from virtgrid.migration.domainpolicy import DomainPolicy, cheaper, choose
from virtgrid.migration.outcome import Place
from virtgrid.migration.plan import MigrationRequest
from virtgrid.report.files import writer_alive
from virtgrid.virt.connection import Hypervisor
from virtgrid.virt.domain import Domain, DomainState, position, running_domains

_TICK_S: Final = 0.5
_BEGIN_DEADLINE_S: Final = 60.0
"""A worker connects to two hosts, 15 s each at most, before it has a journal."""
_AGAIN_S: Final = 5.0
_PRICES: Final = "prices"
_PRICES_S: Final = 60.0
"""So often it is looked where it is cheaper."""
_REST_S: Final = 900.0
"""A domain that could not go where it is cheaper is left alone so long."""
_TAIL_BYTES: Final = 64 << 10
_YOUNGEST: Final = 200
"""So many journals are looked through for one that is ours."""
_log = logging.getLogger(__name__)

Start = Callable[..., worker.Worker]


class Mover:
    """An async context manager; migrations go on after it.

    uri: of this host's QEMU driver. start: ``worker.start``, but for tests.
    """

    def __init__(
        self, config: Config, entries: Entries, *, uri: str = "qemu:///system", start: Start = worker.start
    ) -> None:
        """Errors: RefusedError (the configuration)."""
        self._config, self._entries, self._uri, self._start = config, entries, uri, start
        self._limits = orders.limits(config)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._recover_at_s: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._turning: asyncio.Task[None] | None = None
        self._closing = False

    async def __aenter__(self) -> Mover:
        for entry in self._entries.active():
            if entry.state is State.STARTING:
                self._adopt(entry)
        self._turning = asyncio.create_task(self._turn(), name="migrations")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        tasks = [*self._busy.values(), *([self._turning] if self._turning else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- what is asked of it -----------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        return self._entries.all()

    async def evacuate(self, to: str | None) -> tuple[list[Entry], list[Left]]:
        """All that run here. Done twice it adds nothing. Errors: RefusedError, PeerUnreachableError."""
        if to is not None and to not in self._config.queue.destination:
            known = ", ".join(self._config.queue.destination) or "none"
            raise RefusedError(f"the configuration has no destination '{to}'", hint=f"it has {known}")
        return await self._ask("the host is evacuated", lambda _: True, to or self._config.queue.to)

    async def _follow_prices(self) -> None:
        """Who is to be where it is cheapest, goes there when prices change."""
        if self._config.queue.name is None:
            return
        here = (self._config.queue.name, self._config.queue.site)
        now_s = time.time()
        resting = {
            entry.uuid
            for entry in self._entries.all()
            if entry.state in (State.FAILED, State.GAVE_UP) and now_s - entry.since_s < _REST_S
        }
        try:
            async with await Hypervisor.open(self._uri, name=self._uri) as hypervisor:
                for domain in await running_domains(hypervisor):
                    with contextlib.suppress(NotFoundError, RefusedError):
                        choice = cheaper(await _policy(domain), self._sites(), here, datetime.now(UTC))
                        if choice.to is not None and domain.uuid not in resting:
                            self._add(domain, choice.to, choice.reason)
        except VirtgridError as error:
            _log.warning("prices are not followed: %s", error.cause or error.what)

    def _sites(self) -> dict[str, str | None]:
        return {name: one.site for name, one in self._config.queue.destination.items()}

    async def make_room(self, sandbox: str) -> None:
        """A sandbox is being prepared here: who yields to jobs goes."""
        if not self._config.queue.destination:
            return
        try:
            asked, left = await self._ask(f"sandbox {sandbox} is prepared here", lambda one: one.yields, None)
        except VirtgridError as error:
            _log.warning("nobody makes way for %s: %s", sandbox, error.cause or error.what)
            return
        for entry in asked:
            _log.info("%s makes way for %s: to %s", entry.domain, sandbox, entry.to)
        for one in left:
            _log.warning("%s does not make way for %s: %s", one.domain, sandbox, one.why)

    def withdraw(self, id_: str) -> Entry:
        """Errors: NotFoundError; RefusedError when it has begun."""
        entry = self._entries.get(id_)
        if entry is None:
            raise NotFoundError(f"there is no '{id_}' in the queue", hint="virtgrid migration queue")
        if entry.state not in (State.QUEUED, State.WAITING):
            hint = f"virtgrid migration abort {entry.migration}" if entry.state is State.RUNNING else None
            raise RefusedError(f"{entry.domain} is {entry.state} already", hint=hint)
        return self._happen(entry, Event.WITHDRAWN, "withdrawn on request")

    async def _ask(
        self, why: str, wanted: Callable[[DomainPolicy], bool], otherwise: str | None
    ) -> tuple[list[Entry], list[Left]]:
        """Put into the queue who is wanted. otherwise: where those go whose policy says nothing."""
        asked: list[Entry] = []
        left: list[Left] = []
        async with await Hypervisor.open(self._uri, name=self._uri) as hypervisor:
            for domain in await running_domains(hypervisor):
                try:
                    policy = await _policy(domain)
                except NotFoundError:
                    continue  # it has just ended
                except VirtgridError as error:
                    left.append(Left(domain=domain.name, why=error.what))
                    continue
                if not wanted(policy):
                    continue
                choice = choose(policy, self._sites(), datetime.now(UTC))
                to = choice.to or otherwise
                if to is None:
                    left.append(Left(domain=domain.name, why=choice.reason))
                else:
                    asked.append(self._add(domain, to, f"{why} ({choice.reason})" if choice.to else why))
        self._wake.set()
        return asked, left

    def _add(self, domain: Domain, to: str, why: str) -> Entry:
        """One entry a domain: who is on the way already is not asked again."""
        for entry in self._entries.active():
            if entry.uuid == domain.uuid:
                return entry
        now = datetime.now(UTC)
        entry = Entry(
            id=f"{journals.new_id(now, domain.name)[:120]}-{secrets.token_hex(4)}",
            domain=domain.name,
            uuid=domain.uuid,
            to=to,
            why=why[:300],
            asked_at_s=now.timestamp(),
            since_s=now.timestamp(),
        )
        self._entries.put(entry)
        _log.info("%s is to go to %s: %s", entry.domain, to, why)
        return entry

    # -- bringing it about -------------------------------------------------------------------------

    async def _turn(self) -> None:
        due_s = time.monotonic()
        while not self._closing:
            try:
                if time.monotonic() >= due_s and _PRICES not in self._busy:
                    due_s = time.monotonic() + _PRICES_S
                    self._begin(_PRICES, self._follow_prices())
                await self._once()
            except VirtgridError as error:
                _log.error("the queue stands still: %s (%s)", error.what, error.cause)
            except Exception:  # ours; whoever else waits is not to wait for ever
                _log.exception("the queue stands still")
            self._wake.clear()
            # Not wait_for: in Python 3.11 it may swallow that we are cancelled as we are woken.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._wake.wait()

    async def _once(self) -> None:
        for id_, process in list(self._processes.items()):
            if process.poll() is not None:
                del self._processes[id_]
        for entry in self._entries.active():
            if entry.id in self._busy:
                continue
            if entry.state is State.RUNNING:
                await self._watch(entry)
            elif entry.state is State.STARTING:
                self._again(entry, "virtgridd was restarted while it began")
        active = self._entries.active()
        ours = {entry.migration for entry in active if entry.state is State.RUNNING}
        busy = {
            entry.uuid: other
            for entry in active
            if entry.state in (State.QUEUED, State.WAITING)
            and (other := running.running_migration(entry.uuid)) is not None
            and other not in ours
        }
        for step in decide(active, self._limits, time.time(), busy):
            known = self._entries.get(step.id)
            assert known is not None
            after = self._happen(known, step.event, step.note)
            if after.state is State.STARTING:
                self._begin(after.id, self._launch(after))

    def _begin(self, id_: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._busy[id_] = task

        def ended(done: asyncio.Task[None]) -> None:
            self._busy.pop(id_, None)
            self._wake.set()
            if not done.cancelled() and (error := done.exception()) is not None:
                _log.error("%s: %s", id_, error, exc_info=error)

        task.add_done_callback(ended)

    def _happen(self, entry: Entry, event: Event, note: str) -> Entry:
        after = follow(entry, event, time.time(), note=note, limits=self._limits)
        self._entries.put(after)
        if after.state is not entry.state:
            _log.info("%s to %s: %s%s", after.domain, after.to, after.state, f" ({note})" if note else "")
        return after

    async def _launch(self, entry: Entry) -> None:
        if self._adopt(entry):
            return
        try:
            request = await self._request(entry)
            if request is None:
                self._happen(entry, Event.WITHDRAWN, f"{entry.domain} does not run here any more")
                return
            deadline_s = time.monotonic() + _BEGIN_DEADLINE_S

            def given_up() -> bool:
                return self._closing or time.monotonic() > deadline_s

            started = await asyncio.to_thread(self._begun, request, given_up)
        except VirtgridError as error:
            cause = f" ({error.cause})" if error.cause else ""
            self._failed(entry, error.exit_status, f"{error.what}{cause}")
        else:
            self._processes[entry.id] = started.process
            self._began(entry, started.journal.stem)

    def _begun(self, request: MigrationRequest, given_up: Callable[[], bool]) -> worker.Worker:
        """In a thread. One that has not begun when we end is ended too: the next of us starts it anew."""
        try:
            return self._start(request, interrupted=given_up)
        except KeyboardInterrupt:
            raise DeadlineError("its worker did not begin in time") from None

    async def _request(self, entry: Entry) -> MigrationRequest | None:
        """None: it is not here any more."""
        async with await Hypervisor.open(self._uri, name=self._uri) as hypervisor:
            found = await position(hypervisor, entry.uuid)
            if found.state not in (DomainState.RUNNING, DomainState.PAUSED):
                return None
            try:
                policy = await _policy(Domain(hypervisor, uuid=entry.uuid, name=entry.domain))
            except RefusedError as error:  # it has become malformed: it goes as one without
                _log.warning("%s goes as if it had no policy: %s", entry.domain, error.what)
                policy = DomainPolicy()
        return orders.request(
            self._config,
            entry.to,
            domain=entry.uuid,
            source_uri=self._uri,
            policy=policy,
            persistent=found.persistent,
            reason=f"{entry.why} [{entry.id}]",
        )

    def _began(self, entry: Entry, migration: str) -> None:
        known = entry.model_copy(update={"tried": (*entry.tried, migration)})
        self._happen(known, Event.BEGAN, "")

    def _failed(self, entry: Entry, exit_status: int, text: str) -> None:
        self._happen(entry, after_attempt(entry, exit_status, self._config.queue.attempts), text)

    def _again(self, entry: Entry, text: str) -> None:
        """Not an attempt that failed: it is looked for first when its turn comes."""
        after = self._happen(entry, Event.AGAIN, text)
        self._entries.put(after.model_copy(update={"attempts": max(0, entry.attempts - 1)}))

    # -- finding it again --------------------------------------------------------------------------

    def _adopt(self, entry: Entry) -> bool:
        """Take up the migration that a virtgridd before us began for this entry, if there is one."""
        for path in _young_journals():
            began = _first(path)
            if began is None or path.stem in entry.tried:
                continue
            if str(began.get("reason", "")).endswith(f"[{entry.id}]"):
                self._began(entry, path.stem)
                return True
        return False

    async def _watch(self, entry: Entry) -> None:
        """What the journal says of a running one; when its writer died, what both hosts say."""
        assert entry.migration is not None
        path = journals.migrations_dir() / f"{entry.migration}.jsonl"
        began, last = _first(path), None
        alive = began is not None and writer_alive(int(began.get("pid", 0)), began.get("pid_started"))
        with contextlib.suppress(OSError):
            last = _last(path)  # after the question: nothing is missed
        if last is not None and last.event in TERMINAL:
            self._ended(entry, began, last)
        elif began is None:
            self._happen(entry, Event.NO, f"{path} is gone: nobody knows what became of it")
        elif not alive and time.monotonic() >= self._recover_at_s.get(entry.id, 0.0):
            self._recover_at_s[entry.id] = time.monotonic() + _AGAIN_S
            self._begin(entry.id, self._recover(entry, path))

    def _ended(self, entry: Entry, began: Record | None, last: Record) -> None:
        if last.event == "failed":
            self._failed(entry, int(last.get("exit_status", 1)), str(last.get("what", "it failed")))
        elif last.event == "recovered" and began is not None and last.get("on") != began.get("destination"):
            text = str(last.get("text", "its worker died"))
            self._failed(entry, 1 if last.get("on") else 4, text)
        else:
            self._happen(entry, Event.ARRIVED, f"runs on {last.get('on', entry.to)}")

    async def _recover(self, entry: Entry, path: Path) -> None:
        _log.warning("the worker of %s died: both hosts are asked", entry.migration)
        try:
            found = await recovery.recover(path, act=True, writer_gone=True)
        except PositionUnknownError as error:
            hint = f"virtgrid migration recover {entry.migration}"
            self._happen(entry, Event.NO, f"{error.where or error.what}; {hint}")
            return
        except (RefusedError, PeerUnreachableError) as error:
            _log.warning("%s: %s; it is asked again", entry.migration, error.cause or error.what)
            return
        text = found.situation.text
        match found.situation.place:
            case Place.DESTINATION:
                self._happen(entry, Event.ARRIVED, text)
            case Place.SOURCE:
                self._failed(entry, 1, f"its worker died; {text}")
            case _:
                self._happen(entry, Event.WITHDRAWN, text)


async def _policy(domain: Domain) -> DomainPolicy:
    """Errors: RefusedError with the line."""
    text = await domain.metadata(domainpolicy.NAMESPACE)
    if text is None:
        return DomainPolicy()
    return domainpolicy.parse(text.encode(), what=f"policy of {domain.name}")


def _young_journals() -> Iterable[Path]:
    return (path for path, _ in zip(journals.newest_first(), range(_YOUNGEST), strict=False))


def _first(path: Path) -> Record | None:
    """The first line of a journal; None: there is none (yet)."""
    try:
        with path.open("rb") as file:
            line = file.readline(_TAIL_BYTES)
        record = journals.parse_line(line.decode())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if record.event == "started" else None


def _last(path: Path) -> Record | None:
    """The last whole line of a journal that is being written."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().split(b"\n")
    try:
        return journals.parse_line(lines[-2].decode()) if len(lines) > 1 else None
    except (ValueError, KeyError, TypeError):
        return None
