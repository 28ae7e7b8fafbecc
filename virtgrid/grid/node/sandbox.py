"""Sandboxes of this host: make, enter, end. The interface for whoever drives them.

    async with await Sandboxes.open() as sandboxes:
        keys = await sandboxes.prepare(spec)       # root and keys; nothing runs        (INIT, GET_KEYS)
        await sandboxes.trust(spec.name, trust)    # known_hosts, authorized_keys, …    (SET_KEYS)
        await sandboxes.stage(spec.name)           # optional: runs, its cable unplugged
        box = await sandboxes.start(spec.name)     # runs, cable plugged                (RUN)
        await sandboxes.wait_ready(box)            # sshd answers
        call = sandboxes.command(box, ["hostname"])  # argv and environment to spawn      (EXEC)
        sandboxes.kill(box)                        # no process, no network: milliseconds
        await sandboxes.destroy(spec.name)         # and nothing is left                (SHUT_DOWN)

``make(spec)`` is prepare, start and wait. Everything may be called twice. Two calls for the *same*
sandbox must not overlap; different ones may. It must run as root, in the mount and network namespace of
libvirtd. What a running sandbox is stands in its domain's XML, so nothing is lost with this process:
``find`` and ``list`` see what others made, with plain virsh too.

Errors: RefusedError (nothing was touched: what is wrong with account, home, template, address),
NotFoundError, VirtgridError with libvirt's or the hook's words. After an error of ``prepare``, ``stage``
or ``start`` nothing of the sandbox is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeVar

from virtgrid.core.errors import NotFoundError, RefusedError, VirtgridError
from virtgrid.grid.node import cables, domain, layer, leftovers, root, running
from virtgrid.grid.node.keys import PublicKeys
from virtgrid.grid.node.layer import Trust
from virtgrid.grid.node.running import FirstProcess
from virtgrid.grid.node.spec import SandboxSpec, base_candidates, port_of
from virtgrid.virt import container
from virtgrid.virt.connection import Hypervisor

T = TypeVar("T")

DEFAULT_URI: Final = "lxc:///system"
READY_S: Final = 20.0
#: libvirt notices the end of a domain's first process after a fifth of a second, of 64 at once after one;
#: once in some thousand ends not at all, and then it is told.
_NOTICED_S: Final = 2.0
#: For a libvirt_lxc whose libvirtd was killed while it began to end by itself.
_CRASHED_S: Final = 2.0
_ENTER: Final = Path(__file__).parent / "enter.py"


class SandboxState(StrEnum):
    """prepared: its root is there, nothing runs. staged: runs without a network. running.
    left: a root whose domain ended without its hook; ``destroy`` removes it."""

    PREPARED = "prepared"
    STAGED = "staged"
    RUNNING = "running"
    LEFT = "left"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """One sandbox. uid, gid: of its user, inside and on the host; -1 when the host has lost the account.
    init: None unless staged or running."""

    spec: SandboxSpec
    state: SandboxState
    uuid: str
    uid: int
    gid: int
    init: FirstProcess | None = None

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What to spawn on the host so that it runs inside. Its status: see enter.py."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


class Sandboxes:
    """The sandboxes of one libvirtd."""

    def __init__(self, hypervisors: Sequence[Hypervisor], state: str) -> None:
        self._hypervisors = hypervisors
        self._busy = [0] * len(hypervisors)
        self.state = state

    @classmethod
    async def open(
        cls, uri: str = DEFAULT_URI, *, connections: int = 1, state: str = root.STATE
    ) -> Sandboxes:
        """Connect. connections: how many calls libvirt works on at once (each needs its own)."""
        opened: list[Hypervisor] = []
        try:
            for number in range(connections):
                opened.append(await Hypervisor.open(uri, name=f"{uri} {number + 1}" if number else uri))
        except BaseException:
            for hypervisor in opened:
                await hypervisor.close()
            raise
        return cls(opened, state)

    @property
    def usable(self) -> bool:
        """False once libvirtd went away or hung: open anew."""
        return all(hypervisor.usable for hypervisor in self._hypervisors)

    async def close(self) -> None:
        for hypervisor in self._hypervisors:
            await hypervisor.close()

    async def __aenter__(self) -> Sandboxes:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @contextlib.contextmanager
    def _hypervisor(self) -> Any:
        """The least busy connection."""
        number = min(range(len(self._busy)), key=self._busy.__getitem__)
        self._busy[number] += 1
        try:
            yield self._hypervisors[number]
        finally:
            self._busy[number] -= 1

    # --- making -----------------------------------------------------------------------

    async def prepare(self, spec: SandboxSpec) -> PublicKeys:
        """Root, layer and keys; nothing runs yet. What was prepared before is kept, with its keys."""
        if await self._container(spec.name) is not None:
            raise RefusedError(
                f"there is a domain '{spec.name}' already", hint=f"virtgrid sandbox destroy {spec.name}"
            )
        with self._hypervisor() as hypervisor:
            await container.forget(hypervisor, spec.name)
        return await self._root(lambda: self._prepare(spec))

    def _prepare(self, spec: SandboxSpec) -> PublicKeys:
        before = self._note(spec.name)
        if before is not None and before.spec != spec:
            root.release(spec.name, state=self.state)
        cables.delete(spec.port)  # of a domain that libvirt did not live to take down
        request = root.RootRequest(
            name=spec.name,
            user=spec.user,
            account=spec.host_account,
            template=spec.template,
            address=spec.ip,
            bridge=spec.bridge,
            base=0,
            layer_bytes=spec.limits.layer_bytes,
            parameters=domain.parameters(spec),
        )

        def fill(directory: str, account: root.Account) -> None:
            layer.write_keys(directory, spec.name, spec.user, account, request.base)
            xml = domain.build(spec, account, base=request.base, uuid=str(uuid.uuid4()), state=self.state)
            layer.write_new(f"{root.home_of(spec.name, self.state)}/note.xml", xml)

        bases = base_candidates(spec.name) if spec.user_namespace else ()
        root.prepare(request, bases=bases, fill=fill, state=self.state)
        return layer.read_keys(self._home(spec.name))

    async def stage(self, name: str) -> Sandbox:
        """Run a prepared sandbox with its cable unplugged; one that runs already is left as it is."""
        found = await self.find(name)
        if found.state in (SandboxState.STAGED, SandboxState.RUNNING):
            return found
        return await self._create(found, plugged=False)

    async def start(self, name: str) -> Sandbox:
        """Run a prepared sandbox, or plug in a staged one's cable."""
        found = await self.find(name)
        if found.state is SandboxState.RUNNING:
            return found
        if found.state is SandboxState.STAGED:
            self._set_port(found.spec, up=True)
            await asyncio.to_thread(running.announce, _init(found), found.spec)
            return _with_state(found, SandboxState.RUNNING)
        return await self._create(found, plugged=True)

    async def make(self, spec: SandboxSpec) -> Sandbox:
        """prepare, start and wait_ready; when it fails nothing is left."""
        await self.prepare(spec)
        box = await self.start(spec.name)
        try:
            await self.wait_ready(box)
        except BaseException:
            await self.destroy(spec.name)
            raise
        return box

    async def _create(self, prepared: Sandbox, *, plugged: bool) -> Sandbox:
        name = prepared.name
        if prepared.state is SandboxState.LEFT:
            raise RefusedError(
                f"sandbox '{name}' has ended and was not cleaned up", hint=f"virtgrid sandbox destroy {name}"
            )
        xml = await self._root(lambda: Path(self._home(name), "note.xml").read_text())
        try:
            with self._hypervisor() as hypervisor:
                made = await container.create(hypervisor, xml, name)
            await self._root(lambda: self._mark_started(name))
            init = await asyncio.to_thread(running.first_process, made.controller)
            made_box = _with_state(prepared, SandboxState.RUNNING if plugged else SandboxState.STAGED, init)
            if plugged:
                await asyncio.to_thread(running.announce, init, made_box.spec)
            else:
                self._set_port(prepared.spec, up=False)
        except BaseException:
            await self._clear(name, patience_s=_CRASHED_S)
            raise
        return made_box

    def _mark_started(self, name: str) -> None:
        """Where the hook is not installed nobody else has."""
        try:
            root.mark_started(name, self.state)
        except FileNotFoundError as error:  # the hook has cleaned up after it already
            raise VirtgridError(f"sandbox '{name}' ended as soon as it began") from error

    def _set_port(self, spec: SandboxSpec, *, up: bool) -> None:
        try:
            cables.set_up(spec.port, up=up)
        except OSError as error:
            raise VirtgridError(
                f"the cable of sandbox '{spec.name}' cannot be {'plugged in' if up else 'unplugged'}",
                cause=error.strerror,
            ) from error

    async def wait_ready(self, box: Sandbox, *, timeout_s: float = READY_S) -> None:
        """Until its sshd answers.

        Errors: VirtgridError when the sandbox ends first, with what sshd said; DeadlineError.
        """
        log = f"{self._home(box.name)}/layer/over/upper/var/log/sshd.log"
        await asyncio.to_thread(running.wait_for_sshd, _init(box), box.spec, log, timeout_s)

    # --- looking ----------------------------------------------------------------------

    async def find(self, name: str) -> Sandbox:
        """A sandbox by name. Errors: NotFoundError."""
        found = await self._look(name)
        if found is None:
            raise NotFoundError(f"there is no sandbox '{name}'", hint="virtgrid sandbox list")
        return found

    async def list(self) -> list[Sandbox]:
        """Every sandbox of this host, by name."""
        with self._hypervisor() as hypervisor:
            names = {one.name for one in await container.running(hypervisor)}
        names |= await self._root(lambda: set(root.names(self.state)))
        found = [await self._look(name) for name in sorted(names)]
        return [one for one in found if one is not None]

    async def _look(self, name: str) -> Sandbox | None:
        with self._hypervisor() as hypervisor:
            there = await container.find(hypervisor, name)
            text = await container.xml(hypervisor, name) if there is not None else None
        init = None
        if there is not None:
            if text is None or (made := domain.parse(text)) is None:  # gone meanwhile, or not ours
                return None
            staged = cables.is_up(made.spec.port) is False
            state = SandboxState.STAGED if staged else SandboxState.RUNNING
            try:
                init = await asyncio.to_thread(running.first_process, there.controller)
            except VirtgridError:  # it is ending
                return None
        else:
            if (made := await self._root(lambda: self._note(name))) is None:
                return None
            used = await self._root(lambda: root.was_started(name, self.state))
            state = SandboxState.LEFT if used else SandboxState.PREPARED
        owner = made.spec.host_account
        try:
            account = await self._root(lambda: root.account_of(owner))
            uid, gid = account.uid, account.gid
        except RefusedError:  # it can still be looked at and ended
            uid, gid = -1, -1
        return Sandbox(spec=made.spec, state=state, uuid=made.uuid, uid=uid, gid=gid, init=init)

    async def keys(self, name: str) -> PublicKeys:
        """The public keys of a sandbox. Errors: NotFoundError when there are none (yet)."""
        root.check_name(name, "sandbox")
        return await self._root(lambda: layer.read_keys(self._home(name)))

    # --- using ------------------------------------------------------------------------

    async def trust(self, name: str, trust: Trust) -> None:
        """Write whom a sandbox knows and trusts, before or while it runs; each file is replaced whole."""
        found = await self.find(name)
        base = await self._root(lambda: root.base_of(name, self.state))
        await self._root(
            lambda: layer.write_trust(self._home(name), found.spec, found.uid, found.gid, base, trust)
        )

    def command(
        self,
        box: Sandbox,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        as_root: bool = False,
        terminal: bool = False,
    ) -> Command:
        """What to spawn on the host to run ``argv`` inside as its user, in its home unless ``cwd`` says else.

        env: beside HOME, USER, PATH and the like. terminal: give it one of the sandbox's own, relayed to the
        caller's. The program shares the sandbox's limits and ends with it, and with the spawned process.
        """
        init = _init(box)
        if box.uid < 0 and not as_root:
            raise RefusedError(f"account '{box.spec.host_account}' of sandbox '{box.name}' is gone")
        user, home = ("root", "/root") if as_root else (box.spec.user, f"/home/{box.spec.user}")
        inside = {
            "HOME": home,
            "USER": user,
            "LOGNAME": user,
            "SHELL": "/bin/sh" if as_root else "/bin/bash",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "TERM": os.environ.get("TERM", "dumb") if terminal else "dumb",
            **(env or {}),
        }
        order = {
            "init": init.pid,
            "started": init.started,
            "uid": 0 if as_root else box.uid,
            "gid": 0 if as_root else box.gid,
            "processes": box.spec.limits.processes,
            "argv": list(argv),
            "env": inside,
            "cwd": cwd or home,
            "terminal": terminal,
        }
        return Command(
            argv=(sys.executable, "-I", "-S", os.fspath(_ENTER)),
            env={"VIRTGRID_ENTER": json.dumps(order), "PATH": os.environ.get("PATH", "/usr/bin:/bin")},
        )

    # --- ending -----------------------------------------------------------------------

    def kill(self, box: Sandbox) -> None:
        """No frame and no process of it from now on: milliseconds. ``destroy`` cleans up afterwards."""
        with contextlib.suppress(OSError):  # gone with its namespace
            cables.set_up(box.spec.port, up=False)
        if box.init is not None:
            running.kill(box.init)

    async def destroy(self, name: str) -> bool:
        """End a sandbox, whatever state it is in, and remove everything of it; False when there was none."""
        try:
            root.check_name(name, "sandbox")
        except root.RootError as error:
            raise NotFoundError(f"there is no sandbox {name[:80]!r}", cause=error.what) from error
        found = await self._look(name)
        if found is not None and found.init is not None:
            self.kill(found)
            # Nothing uses it any more, and libvirt takes a fifth of a second to notice the end.
            await self._root(lambda: root.release(name, state=self.state))
        elif found is None and await self._foreign(name):
            raise NotFoundError(f"there is no sandbox '{name}'", cause="the domain of this name is none")
        # One whose first process nobody knows ended in a crash, perhaps a moment ago.
        whole = found is not None and found.init is not None
        return await self._clear(name, patience_s=0.0 if whole else _CRASHED_S) or found is not None

    async def _foreign(self, name: str) -> bool:
        """Is there a domain of this name that is no sandbox? (One of ours that is just ending is.)"""
        with self._hypervisor() as hypervisor:
            text = await container.xml(hypervisor, name)
        return text is not None and domain.parse(text) is None

    async def _clear(self, name: str, *, patience_s: float) -> bool:
        """Wait for the domain's end, help it if need be, and release what the hook has not."""
        deadline_s = time.monotonic() + _NOTICED_S
        while await self._container(name) is not None:
            if time.monotonic() > deadline_s:
                with self._hypervisor() as hypervisor:
                    await container.destroy(hypervisor, name)
                break
            await asyncio.sleep(0.005)
        with self._hypervisor() as hypervisor:
            await container.forget(hypervisor, name)

        def release() -> bool:
            left = root.release(name, state=self.state)
            leftovers.remove(name, patience_s=patience_s)
            cables.delete(port_of(name))
            return left

        return await self._root(release)

    # --- inside -----------------------------------------------------------------------

    async def _container(self, name: str) -> container.Container | None:
        with self._hypervisor() as hypervisor:
            return await container.find(hypervisor, name)

    def _home(self, name: str) -> str:
        return root.home_of(name, self.state)

    def _note(self, name: str) -> domain.Made | None:
        """What was written down when it was prepared."""
        try:
            return domain.parse(Path(self._home(name), "note.xml").read_text())
        except FileNotFoundError:
            return None

    async def _root(self, function: Callable[[], T]) -> T:
        """Run what touches files in a thread, its errors in our words."""
        try:
            return await asyncio.to_thread(function)
        except root.RootError as error:
            raise RefusedError(error.what, hint=error.hint) from error
        except OSError as error:
            raise VirtgridError("a file of the sandbox cannot be used", cause=str(error)) from error


def _with_state(box: Sandbox, state: SandboxState, init: FirstProcess | None = None) -> Sandbox:
    return Sandbox(spec=box.spec, state=state, uuid=box.uuid, uid=box.uid, gid=box.gid, init=init or box.init)


def _init(box: Sandbox) -> FirstProcess:
    if box.init is None:
        raise RefusedError(f"sandbox '{box.name}' does not run", hint=f"virtgrid sandbox show {box.name}")
    return box.init
