"""The sandboxes that virtgridd makes for pilots, one ``Guest`` per ticket's sandbox.

Every step may be asked for again, and looks first at what is there. A libvirtd that was restarted under a
step makes the step begin anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

from virtgrid.core.errors import NotFoundError, PeerUnreachableError, RefusedError, VirtgridError
from virtgrid.grid.messages.host import Stage, View
from virtgrid.grid.messages.network import bridge_of
from virtgrid.grid.messages.node import Exec, HostEntry, Init, Keys
from virtgrid.grid.messages.ticket import Ticket
from virtgrid.grid.node import root, sshfiles
from virtgrid.grid.node.keys import PublicKeys
from virtgrid.grid.node.sandbox import DEFAULT_URI, Sandbox, Sandboxes, SandboxState
from virtgrid.grid.node.spec import SandboxLimits, SandboxSpec
from virtgrid.host.tenancies import Tenancies, Tenancy
from virtgrid.wire import message
from virtgrid.wire.line import Line
from virtgrid.wire.message import Response

T = TypeVar("T")

GRACE_S: Final = 10.0
"""So long after the reservation's end a pilot may take to clean up before virtgridd does it."""
_LIBVIRTD_S: Final = 20.0
"""How long a libvirtd that is being restarted is waited for."""
_CONNECTIONS: Final = 4
_RUNNER: Final = Path(__file__).with_name("runner.py")
_log = logging.getLogger(__name__)


class Libvirt:
    """The way to this host's sandboxes, found again when libvirtd was restarted."""

    def __init__(self, uri: str = DEFAULT_URI, state: str = root.STATE) -> None:
        self._uri, self.state = uri, state
        self._open: Sandboxes | None = None
        self._opening = asyncio.Lock()

    async def do(self, step: Callable[[Sandboxes], Awaitable[T]]) -> T:
        """Do a step that may be done twice; again from the start when libvirtd went away under it."""
        deadline_s = time.monotonic() + _LIBVIRTD_S
        wait_s = 0.05
        while True:
            sandboxes: Sandboxes | None = None
            try:
                sandboxes = await self._sandboxes()
                return await step(sandboxes)
            except PeerUnreachableError as error:
                if sandboxes is not None:
                    if sandboxes.usable:  # it is not libvirtd that did not answer
                        raise
                    await self._drop(sandboxes)
                if time.monotonic() > deadline_s:
                    raise
                _log.info("libvirtd is away: %s", error.cause or error.what)
            await asyncio.sleep(wait_s)
            wait_s = min(1.0, wait_s * 2)

    async def _sandboxes(self) -> Sandboxes:
        async with self._opening:
            if self._open is None:
                self._open = await Sandboxes.open(self._uri, connections=_CONNECTIONS, state=self.state)
            return self._open

    async def _drop(self, sandboxes: Sandboxes) -> None:
        if self._open is sandboxes:
            self._open = None
            await sandboxes.close()

    async def close(self) -> None:
        if self._open is not None:
            await self._open.close()


def spec_of(ticket: Ticket, init: Init, *, account: str, bridge: str, mtu: int, now_s: float) -> SandboxSpec:
    """What a ticket and an INIT together make. Pure. now_s: seconds since the epoch. Errors: UsageError."""
    left_s = ticket.ends_at_s - now_s + GRACE_S
    return SandboxSpec(
        name=ticket.sandbox,
        user=init.user,
        account=account,
        address=f"{init.address}/{init.prefix}",
        bridge=bridge,
        mtu=mtu,
        limits=SandboxLimits(
            memory_bytes=ticket.memory_bytes,
            processes=ticket.processes,
            cpuset=ticket.cpus,
            # Should virtgridd itself be gone by then, the sandbox still ends.
            walltime_s=max(1, round(left_s)),
        ),
    )


class Guest:
    """One sandbox. lines: its pilot's connections; left_s: since when there is none (monotonic)."""

    def __init__(self, ticket: Ticket, *, libvirt: Libvirt, tenancies: Tenancies, bridge: str) -> None:
        self.ticket = ticket
        self.lines: set[Line] = set()
        self.left_s = time.monotonic()
        self._libvirt, self._tenancies, self._bridge = libvirt, tenancies, bridge
        self._busy = asyncio.Lock()
        self._staging: set[asyncio.Task[None]] = set()
        self._failed: VirtgridError | None = None
        self._watched: int | None = None
        self._ending = False

    @property
    def name(self) -> str:
        return self.ticket.sandbox

    # -- looking -------------------------------------------------------------------------------

    async def _found(self) -> Sandbox | None:
        """Our sandbox, if it is there; one of this name that was made without a ticket is not ours."""
        if self._tenancies.load(self.name) is None:
            return None
        try:
            return await self._libvirt.do(lambda sandboxes: sandboxes.find(self.name))
        except NotFoundError:
            return None

    async def look(self) -> View:
        """What is there."""
        async with self._busy:
            tenancy = self._tenancies.load(self.name)
            found = None if tenancy is None else await self._found()
            if tenancy is None or found is None:
                return View(stage=Stage.ABSENT)
            stage = {
                SandboxState.PREPARED: Stage.PREPARED,
                SandboxState.STAGED: Stage.PREPARED,
                SandboxState.RUNNING: Stage.RUNNING,
                SandboxState.LEFT: Stage.STOPPED,
            }[found.state]
            self._watch(found)
            keys = None
            if stage is not Stage.STOPPED:
                keys = _wire_keys(await self._libvirt.do(lambda sandboxes: sandboxes.keys(self.name)))
            return View(stage=stage, ready=tenancy.ready, keys=keys)

    # -- steps ---------------------------------------------------------------------------------

    async def prepare(self, init: Init) -> Keys:
        """Tree and keys; then, meanwhile, everything but the network."""
        async with self._busy:
            self._ending, self._failed = False, None
            tenancy = self._tenancies.load(self.name)
            if tenancy is None:
                await self._require_free()
                spec = await asyncio.to_thread(self._spec, init)
                tenancy = Tenancy(ticket=self.ticket, init=init, spec=spec.as_dict())
                self._tenancies.save(tenancy)
            elif tenancy.init != init:
                raise RefusedError(f"sandbox '{self.name}' was prepared with another address, tag or user")
            found = await self._found()
            if found is None or found.state in (SandboxState.PREPARED, SandboxState.LEFT):
                spec = tenancy.sandbox
                keys = await self._libvirt.do(lambda sandboxes: sandboxes.prepare(spec))
            else:
                keys = await self._libvirt.do(lambda sandboxes: sandboxes.keys(self.name))
        staging = asyncio.create_task(self._stage(), name=f"stage {self.name}")
        self._staging.add(staging)
        staging.add_done_callback(self._staging.discard)
        return _wire_keys(keys)

    async def _require_free(self) -> None:
        try:
            await self._libvirt.do(lambda sandboxes: sandboxes.find(self.name))
        except NotFoundError:
            return
        raise RefusedError(f"there is a sandbox '{self.name}' that no ticket made")

    def _spec(self, init: Init) -> SandboxSpec:
        bridge = bridge_of(init.tag, self._bridge)
        place = Path("/sys/class/net", bridge)
        if "/" in bridge or not (place / "bridge").is_dir():
            raise RefusedError(f"there is no bridge {bridge} for network {init.tag} on this host")
        return spec_of(
            self.ticket,
            init,
            account=_account(self.ticket.uid),
            bridge=bridge,
            # A bridge carries what the smallest of its ports does, a VXLAN's among them.
            mtu=int((place / "mtu").read_text()),
            now_s=time.time(),
        )

    async def _stage(self) -> None:
        """Ahead of RUN: only the cable is missing then. A failure is told by ``start``, which finds
        nothing.
        """
        async with self._busy:
            if self._ending:
                return
            try:
                self._watch(await self._libvirt.do(lambda sandboxes: sandboxes.stage(self.name)))
            except VirtgridError as error:
                self._failed = error
                self._tell_ended(f"it could not be started ahead: {error.cause or error.what}")
                _log.warning("%s cannot be staged: %s", self.name, error.cause or error.what)

    async def set_keys(self, hosts: tuple[HostEntry, ...]) -> None:
        async with self._busy:
            tenancy = self._require(self._tenancies.load(self.name))
            trust = sshfiles.render(hosts)
            await self._libvirt.do(lambda sandboxes: sandboxes.trust(self.name, trust))
            self._tenancies.save(tenancy.model_copy(update={"ready": True}))

    async def start(self) -> None:
        """Runs, cable plugged, sshd answers."""
        if (wait_s := self.ticket.begins_at_s - time.time()) > 0:
            raise RefusedError(f"reservation {self.ticket.reservation} begins in {wait_s:.0f} s")
        async with self._busy:
            self._require(self._tenancies.load(self.name))
            if (error := self._failed) is not None:
                raise error

            async def run(sandboxes: Sandboxes) -> Sandbox:
                box = await sandboxes.start(self.name)
                await sandboxes.wait_ready(box)
                return box

            self._watch(await self._libvirt.do(run))

    async def stop(self) -> None:
        """No process and no frame of it any more."""
        self._ending = True
        await self._kill()
        async with self._busy:  # what was being made meanwhile
            await self._kill()

    async def remove(self) -> None:
        """Nothing is left of it, and of what is known of it."""
        self._ending = True
        await self._kill()  # before waiting for our turn: who is starting it gives up then
        async with self._busy:
            if self._tenancies.load(self.name) is not None:
                await self._libvirt.do(lambda sandboxes: sandboxes.destroy(self.name))
                self._tenancies.remove(self.name)

    async def _kill(self) -> None:
        if (found := await self._found()) is not None:
            await self._libvirt.do(lambda sandboxes: asyncio.to_thread(sandboxes.kill, found))

    def _require(self, tenancy: Tenancy | None) -> Tenancy:
        if tenancy is None:
            raise RefusedError(f"sandbox '{self.name}' was not prepared")
        return tenancy

    # -- programs ------------------------------------------------------------------------------

    async def run_program(self, line: Line, what: Exec) -> subprocess.Popen[str]:
        """Start a program and give it the line; returns who carries its output. Errors: RefusedError when
        the sandbox does not run.
        """
        found = await self._found()
        if found is None or found.state is not SandboxState.RUNNING:
            raise RefusedError(f"sandbox '{self.name}' does not run")
        command = await self._libvirt.do(
            lambda sandboxes: asyncio.to_thread(sandboxes.command, found, what.argv, env=what.env)
        )
        order = {
            "argv": command.argv,
            "env": dict(command.env),
            "answer": message.encode(Response(id=line.answering, result={})).decode(),
        }
        return await asyncio.to_thread(_spawn, line, json.dumps(order))

    # -- the end by itself ---------------------------------------------------------------------

    def _watch(self, box: Sandbox) -> None:
        """Hear of the end of its first process from the kernel, hook or no hook."""
        if box.init is None or self._watched is not None:
            return
        try:
            descriptor = os.pidfd_open(box.init.pid)
        except ProcessLookupError:
            return
        self._watched = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._gone)

    def _gone(self) -> None:
        self.unwatch()
        if self._ending:
            return
        late = time.time() >= self.ticket.ends_at_s
        self._tell_ended("its time was over" if late else "its first process is gone")

    def _tell_ended(self, reason: str) -> None:
        for line in self.lines:
            task = asyncio.create_task(_tell(line, reason))
            _telling.add(task)
            task.add_done_callback(_telling.discard)

    def unwatch(self) -> None:
        if self._watched is not None:
            asyncio.get_running_loop().remove_reader(self._watched)
            os.close(self._watched)
            self._watched = None

    async def close(self) -> None:
        """For the end of virtgridd: the sandbox stays."""
        self.unwatch()
        await asyncio.gather(*self._staging, return_exceptions=True)


def _account(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        raise RefusedError(f"this host has no account with the number {uid}") from None


_telling: set[asyncio.Task[None]] = set()


async def _tell(line: Line, reason: str) -> None:
    with contextlib.suppress(VirtgridError):
        await line.notify("ended", {"reason": reason})


def _spawn(line: Line, order: str) -> subprocess.Popen[str]:
    with line.give_socket() as sock:
        # In a session of its own: it belongs to the pilot's connection, and goes on without us.
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.fspath(_RUNNER), str(sock.fileno())],
            env={"PATH": os.environ.get("PATH", os.defpath)},
            pass_fds=(sock.fileno(),),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            text=True,
        )
    assert process.stdin is not None
    with process.stdin, contextlib.suppress(BrokenPipeError):
        process.stdin.write(order)  # not in its environment, whose words have a limit
    return process


def _wire_keys(keys: PublicKeys) -> Keys:
    def bare(key: str) -> str:
        return " ".join(key.split()[:2])

    return Keys(user_key=bare(keys.user), host_key=bare(keys.host))
