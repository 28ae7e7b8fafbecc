"""What the tests of sandboxes do at a site: make some, run things in them, count what is left."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

from virtgrid.grid.node import template
from virtgrid.grid.node.sandbox import Sandbox, Sandboxes
from virtgrid.grid.node.spec import MIB, SandboxLimits, SandboxSpec
from virtgrid.lab import faults
from virtgrid.lab.inside import Inside
from virtgrid.lab.layout import BRIDGE
from virtgrid.lab.site import Site

T = TypeVar("T")

LIMITS: Final = SandboxLimits(memory_bytes=96 * MIB, layer_bytes=16 * MIB, processes=32)
STATE: Final = Path("/var/lib/virtgrid/sandboxes")


@dataclass(frozen=True, slots=True)
class Traces:
    """What sandboxes leave while they exist; all empty when none does."""

    directories: tuple[str, ...]
    mounts: tuple[str, ...]
    cables: tuple[str, ...]
    domains: tuple[str, ...]
    processes: tuple[str, ...]
    control_groups: tuple[str, ...]


class SandboxHost:
    """A site as a host of sandboxes. Accounts: ann (4101), bea (4102); their homes are the lab's."""

    def __init__(self, site: Site, *, template: str) -> None:
        self.site = site
        self.template = template
        self._inside = Inside(site)
        self._sandboxes: Sandboxes | None = None
        self._addresses = itertools.count(100)
        self._groups_before = _control_groups()

    def __enter__(self) -> SandboxHost:
        self.homes = self.site.plan.root / "homes"
        self.homes.mkdir(exist_ok=True)
        for name, uid in (("ann", 4101), ("bea", 4102)):
            self.add_account(name, uid)
        self.inside(lambda _: _call(lambda: template.build(self.template)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
        self.inside(lambda _: _call(lambda: template.remove(self.template)))
        if self._sandboxes is not None:
            self._inside.call(self._sandboxes.close)
        self._inside.close()

    def add_account(self, name: str, uid: int, *, home: Path | None = None, make_home: bool = True) -> Path:
        """An account of the site only (its /etc is its own)."""
        place = home or self.homes / name
        if make_home:
            place.mkdir(exist_ok=True)
            os.chown(place, uid, uid)
        self.site.run(["sh", "-c", f"echo '{name}:x:{uid}:{uid}::{place}:/bin/bash' >> /etc/passwd"])
        return place

    # --- the sandboxes ----------------------------------------------------------------

    def inside(self, work: Callable[[Sandboxes], Coroutine[Any, Any, T]], *, timeout_s: float = 60.0) -> T:
        """Call a coroutine at the site with its sandboxes."""

        async def run() -> T:
            lost = self._sandboxes is not None and not all(h.usable for h in self._sandboxes._hypervisors)
            if self._sandboxes is None or (lost and self.site.libvirtd_state() == "running"):
                self._sandboxes = await Sandboxes.open(connections=2)
            return await work(self._sandboxes)

        return self._inside.call(run, timeout_s=timeout_s)

    def spec(self, name: str = "box", **more: Any) -> SandboxSpec:
        words = {
            "user": "grid",
            "account": "ann",
            "address": f"10.77.0.{next(self._addresses) % 100 + 100}/24",
            "bridge": BRIDGE,
            "template": self.template,
            "limits": LIMITS,
            **more,
        }
        return SandboxSpec(name=name, **words)

    def make(self, name: str = "box", **more: Any) -> Sandbox:
        spec = self.spec(name, **more)
        return self.inside(lambda sandboxes: sandboxes.make(spec))

    def destroy(self, name: str = "box") -> bool:
        return self.inside(lambda sandboxes: sandboxes.destroy(name))

    def names(self) -> list[str]:
        async def work(sandboxes: Sandboxes) -> list[str]:
            return [box.name for box in await sandboxes.list()]

        return self.inside(work)

    def start(self, box: Sandbox, argv: Sequence[str], **more: Any) -> subprocess.Popen[str]:
        """A program in a sandbox, running."""

        async def work(sandboxes: Sandboxes) -> subprocess.Popen[str]:
            call = sandboxes.command(box, argv, **more)
            # From here, so that it is at the site; asyncio's own would be bound to this loop.
            return subprocess.Popen(  # noqa: ASYNC220
                call.argv,
                env=dict(call.env),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        return self.inside(work)

    def run(
        self,
        box: Sandbox,
        argv: Sequence[str] | str,
        *,
        check: bool = True,
        timeout_s: float = 30.0,
        **more: Any,
    ) -> subprocess.CompletedProcess[str]:
        """A program in a sandbox to its end; a string is a shell's."""
        words = ["/bin/sh", "-c", argv] if isinstance(argv, str) else list(argv)
        with self.start(box, words, **more) as child:
            try:
                out, err = child.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                child.kill()
                raise
        if check and child.returncode != 0:
            raise AssertionError(f"{words} ended with {child.returncode}: {err.strip()} {out.strip()}")
        return subprocess.CompletedProcess(words, child.returncode, out, err)

    def out(self, box: Sandbox, argv: Sequence[str] | str, **more: Any) -> str:
        return self.run(box, argv, **more).stdout.strip()

    def virsh(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.site.run(["virsh", "-q", "-c", "lxc:///", *words], check=check)

    # --- the traces -------------------------------------------------------------------

    def traces(self) -> Traces:
        run = lambda text: tuple(self.site.run(["sh", "-c", text]).stdout.split())  # noqa: E731
        return Traces(
            directories=run(
                # Where virtgridd keeps its own records is no trace; a record of a sandbox is.
                f"ls -A {STATE} {STATE}/.claims {STATE}/.tenancies 2>/dev/null"
                " | grep -v -e : -e '^[.]' || true"
            ),
            mounts=run("grep -o 'sandboxes/[^ ]*/[^ ]*' /proc/self/mountinfo || true"),
            cables=run("ls /sys/class/net | grep '^vg' || true"),
            domains=run("virsh -q -c lxc:/// list --all --name"),
            processes=tuple(self._processes()),
            control_groups=tuple(sorted(_control_groups() - self._groups_before)),
        )

    def _processes(self) -> list[str]:
        """libvirt_lxc of this site, and what descends from it."""
        found = []
        run = self.site.plan.run.stat()
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or (entry / "comm").read_text().strip() != "libvirt_lxc":
                    continue
                seen = (entry / "root/run").stat()
                if (seen.st_dev, seen.st_ino) == (run.st_dev, run.st_ino):
                    found.append(entry.name)
            except OSError:
                continue
        return found

    def wait_clean(self, timeout_s: float = 10.0) -> None:
        """Until nothing of any sandbox is left."""
        wait_for(lambda: not any(_values(self.traces())), timeout_s, lambda: f"left: {self.traces()}")

    def clear(self) -> None:
        """No sandboxes, no domains, a libvirtd that answers."""
        if self.site.libvirtd_state() == "dead":
            faults.restore_libvirtd(self.site)
        for name in self.site.run(["virsh", "-q", "-c", "lxc:///", "list", "--all", "--name"]).stdout.split():
            self.virsh("destroy", name, check=False)
            self.virsh("undefine", name, check=False)
            self.destroy(name)
        for entry in sorted(self.site.run(["ls", str(STATE)]).stdout.split()):
            self.destroy(entry)
        self.wait_clean()


def _control_groups() -> set[str]:
    """Names of libvirt's groups of containers, without those of living ones of other sites.

    Control groups are the whole machine's: ``lxc-PID-NAME.libvirt-lxc``.
    """
    found = subprocess.run(
        ["find", "/sys/fs/cgroup", "-maxdepth", "4", "-type", "d", "-name", "lxc-*.libvirt-lxc"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = {line.rpartition("/")[2] for line in found.stdout.splitlines()}
    return {name for name in names if not Path(f"/proc/{name.split('-')[1]}").exists()}


def _values(traces: Traces) -> list[tuple[str, ...]]:
    return [getattr(traces, name) for name in Traces.__slots__]


async def _call(function: Callable[[], T]) -> T:
    return function()


def wait_for(state: Callable[[], Any], timeout_s: float = 10.0, words: Callable[[], str] = str) -> Any:
    """Wait until ``state()`` is true and return it."""
    deadline_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while True:
        if value := state():
            return value
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {timeout_s:g} s: {words()}")
        pause.wait(0.02)


def kill(pid: int) -> None:
    """SIGKILL one process, and wait for its end."""
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        wait_for(lambda: not os.path.exists(f"/proc/{pid}") or _zombie(pid))
    finally:
        os.close(descriptor)


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def emptied(directory: Path) -> None:
    """Remove what is in a directory, not the directory."""
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
