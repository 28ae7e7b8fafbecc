"""A lab: several sites on one machine, brought up, looked at, broken and taken down.

lab = Lab.up(LabConfig(name="demo"), tell=print)
lab.site("alice").run(["virsh", "-c", "qemu+tls://bob/system", "uri"])
lab.cut_wan(for_s=10)
lab.down()
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from virtgrid.core.errors import DeadlineError, LabError, NotFoundError, RefusedError
from virtgrid.lab import control, network, pki, processes
from virtgrid.lab.layout import (
    CLIENT,
    DEFAULT_DIRECTORY,
    DEFAULT_NAME,
    LabConfig,
    Layout,
    namespace_prefix,
)
from virtgrid.lab.site import Place, Site
from virtgrid.net import netns, syscalls
from virtgrid.wire.pki.authority import Authority

_LOCK_S: Final = 120.0
_NEEDED: Final = {
    "libvirtd": "libvirt-daemon",
    "virsh": "libvirt-clients",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "nsenter": "util-linux",
    "tc": "iproute2",
}
Tell = Callable[[str], None]


def _silent(_: str) -> None:
    return


def obstacle() -> str | None:
    """Why this user on this machine cannot have a lab; None when nothing is in the way."""
    if os.geteuid() != 0:
        return "the lab needs root: it makes namespaces, mounts and network interfaces"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = sorted(
        {package for program, package in _NEEDED.items() if not shutil.which(program, path=path)}
    )
    if missing:
        return f"Debian packages are missing: {' '.join(missing)}"
    if not Path("/dev/net/tun").exists():
        return "the kernel has no TAP devices (/dev/net/tun)"
    return None


def require_possible() -> None:
    """RefusedError when ``obstacle`` names one."""
    if reason := obstacle():
        root = os.geteuid() == 0
        raise RefusedError(reason, hint="make setup" if root else "run it with sudo")


def _way(config: LabConfig) -> str:
    return "stretched" if config.stretched else "a cable to every site"


@dataclass(frozen=True, slots=True)
class Lab:
    """A lab that is up, or was and left something."""

    config: LabConfig
    layout: Layout

    # -- finding one ---------------------------------------------------------------------------

    @staticmethod
    def load(name: str = DEFAULT_NAME, *, directory: Path | None = None) -> Lab:
        """The lab of this name. Errors: NotFoundError, UsageError, LabError (its record is torn)."""
        layout = Layout.of(name, directory=directory)
        try:
            data = json.loads(layout.state_file.read_text())
            config = LabConfig.from_dict(data, directory)
        except FileNotFoundError as error:
            there = sorted(path.parent.name for path in layout.root.parent.glob("*/lab.json"))
            raise NotFoundError(
                f"there is no lab '{name}' in {layout.root.parent}",
                hint=f"there are: {', '.join(there)}" if there else f"virtgrid lab up --lab {name}",
            ) from error
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise LabError(
                f"the record of lab '{name}', {layout.state_file}, cannot be read",
                cause=str(error),
                hint=f"virtgrid lab down --lab {name}",
            ) from error
        return Lab(config=config, layout=Layout.of(name, config.sites, directory))

    # -- parts ---------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(
            Site(layout=self.layout, name=plan.name, netns=plan.namespace, plan=plan)
            for plan in self.layout.sites
        )

    def site(self, name: str) -> Site:
        """A site by name. Errors: NotFoundError."""
        for site in self.sites:
            if site.name == name:
                return site
        raise NotFoundError(
            f"lab '{self.name}' has no site '{name}'", hint=f"its sites: {', '.join(self.config.sites)}"
        )

    @property
    def client(self) -> Place:
        """Where clients live."""
        return Place(layout=self.layout, name=CLIENT, netns=self.layout.client_namespace)

    def place(self, name: str) -> Place:
        """A site, or the client. Errors: NotFoundError."""
        return self.client if name == CLIENT else self.site(name)

    # -- up and down ---------------------------------------------------------------------------

    @staticmethod
    def up(config: LabConfig, tell: Tell = _silent) -> Lab:
        """Make the lab, or mend one that is up; ``tell`` hears what is done, a line each.

        When it fails and the lab was not there before, nothing of it is left. Errors: RefusedError
        (not root, packages missing, another lab of this name elsewhere, other sites), LabError.
        """
        require_possible()
        layout = Layout.of(config.name, config.sites, config.directory)
        for elsewhere in processes.mark_directories(config.name) - {os.fspath(layout.root)}:
            raise RefusedError(
                f"a lab '{config.name}' is up in another directory, {elsewhere}",
                hint="give this one another name with --lab",
            )
        lab = Lab(config=config, layout=layout)
        with lab._locked():
            fresh = lab._check_sites_unchanged()
            try:
                lab._build(tell, fresh=fresh)
            except BaseException as error:
                if fresh:
                    with contextlib.suppress(LabError, OSError):  # the first error is the one to tell
                        lab._clear()
                if isinstance(error, OSError):
                    raise LabError(f"lab '{lab.name}' could not be built", cause=str(error)) from error
                raise
        return lab

    def _check_sites_unchanged(self) -> bool:
        """True when there is no such lab yet. Errors: RefusedError."""
        try:
            before = Lab.load(self.name, directory=self.config.directory).config
        except NotFoundError:
            return True
        for what, old, new in (
            ("sites", before.sites, self.config.sites),
            ("client round-trip time", before.client_rtt_s, self.config.client_rtt_s),
            ("way to the client", _way(before), _way(self.config)),
        ):
            if old != new:
                raise RefusedError(
                    f"lab '{self.name}' is up with another {what}: {old}, not {new}",
                    hint=f"virtgrid lab down --lab {self.name}",
                )
        return False

    def _build(self, tell: Tell, *, fresh: bool) -> None:
        began_s = time.monotonic()
        layout = self.layout
        fresh_file = layout.state_file.with_suffix(".new")
        fresh_file.write_text(json.dumps(self.config.as_dict(), indent=2) + "\n")
        fresh_file.replace(layout.state_file)
        made = network.make_namespaces(layout)
        authority = self.authority()
        for site in self.sites:
            site.write_files(authority)
        tell(f"network: {len(layout.sites)} sites and a client")
        for site in self.sites:
            if site.start_keeper():
                made.append(f"site {site.name}")
        made += network.make_client_side(layout, self.config)
        made += network.make_wan(layout, self.config)
        if self.config.stretched:
            made += network.make_segments(self.sites)
        for site in self.sites:
            if site.libvirtd_state() == "hung" and site.signal_libvirtd(signal.SIGCONT):
                made.append(f"libvirtd of {site.name}, which hung")
        started = [site for site in self.sites if site.launch_libvirtd()]
        if started:
            tell(f"libvirtd: starting at {', '.join(site.name for site in started)}")
        for site in self.sites:
            site.wait_libvirtd()
        made += [f"libvirtd of {site.name}" for site in started]
        if fresh:
            tell(f"lab '{self.name}' is up after {time.monotonic() - began_s:.1f} s")
        elif made:
            tell(f"lab '{self.name}' was up; mended: {', '.join(made)}")
        else:
            tell(f"lab '{self.name}' was up already, nothing was missing")

    def authority(self) -> Authority:
        """The lab's certificate authority, made at first use."""
        return pki.authority(self.layout.authority, f"virtgrid lab {self.name}")

    def down(self, tell: Tell = _silent) -> bool:
        """Take this lab down; see ``take_down``."""
        return take_down(self.name, directory=self.config.directory, tell=tell)

    def _clear(self) -> None:
        _clear(self.layout, _silent)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with _locked(self.layout):
            yield

    # -- the WAN -------------------------------------------------------------------------------

    def wan_status(self) -> dict[str, Any]:
        """kind (user-space or netem), rate_bytes_s, rtt_s, queue_s, loss, cut, changed, restored_in_s,
        directions: a list of {from, to, frames, bytes, dropped}. Errors: LabError."""
        return control.ask(self.layout.link_socket("wan"), {"do": "status"})

    def wan_counters(self) -> dict[tuple[str, str], dict[str, int]]:
        """(from, to) -> frames, bytes (as on the wire, framing included), dropped, since up."""
        return {
            (way["from"], way["to"]): {key: int(way[key]) for key in ("frames", "bytes", "dropped")}
            for way in self.wan_status()["directions"]
        }

    def wan_bytes(self) -> int:
        """Bytes carried by the WAN in all directions since up."""
        return sum(way["bytes"] for way in self.wan_counters().values())

    def cut_wan(self, *, for_s: float | None = None) -> None:
        """Lose every frame, those under way too; mended by itself after ``for_s`` when given."""
        self.change_wan(cut=True, for_s=for_s)

    def change_wan(
        self,
        *,
        cut: bool | None = None,
        rate_bytes_s: float | None = None,
        rtt_s: float | None = None,
        queue_s: float | None = None,
        loss: float | None = None,
        for_s: float | None = None,
    ) -> None:
        """Change what is given and keep the rest, for good or ``for_s`` seconds. Errors: LabError."""
        order = {
            "do": "break", "cut": cut, "rate_bytes_s": rate_bytes_s, "rtt_s": rtt_s, "queue_s": queue_s,
            "loss": loss, "for_s": for_s,
        }  # fmt: skip
        given = {key: value for key, value in order.items() if value is not None}
        control.ask(self.layout.link_socket("wan"), given)

    def restore_wan(self) -> None:
        """The WAN as ``up`` made it."""
        control.ask(self.layout.link_socket("wan"), {"do": "restore"})

    # -- looking -------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Everything ``lab status --json`` shows."""
        try:
            wan: dict[str, Any] = self.wan_status()
        except LabError as error:
            wan = {"kind": "dead", "cause": error.cause, **self.config.wan.as_dict()}
        return {
            "name": self.name,
            "directory": os.fspath(self.layout.root),
            "client": {"namespace": self.client.netns, "rtt_s": self.config.client_rtt_s},
            "wan": wan,
            "sites": [site.status() for site in self.sites],
        }


def take_down(name: str, *, directory: Path | None = None, tell: Tell = _silent) -> bool:
    """End and remove everything of a lab, whatever state it is in; False when there was nothing.

    Errors: RefusedError (not root, called from inside the lab), LabError (something does not go).
    """
    layout = Layout.of(name, directory=directory)
    if os.geteuid() != 0:
        require_possible()
    elsewhere = processes.mark_directories(name) - {os.fspath(layout.root)}
    if elsewhere:
        raise RefusedError(
            f"lab '{name}' is up in another directory, {sorted(elsewhere)[0]}",
            hint="set VIRTGRID_LAB_DIR to the directory above it",
        )
    if not layout.root.exists():
        signs = processes.Signs.of(name, layout.root)
        if not netns.names(namespace_prefix(name)) and not processes.find(signs):
            return False
    with _locked(layout):
        _clear(layout, tell)
    return True


def _clear(layout: Layout, tell: Tell) -> None:
    signs = processes.Signs.of(layout.name, layout.root)
    cgroups = processes.cgroup_directories(processes.find(signs))
    ended = processes.kill_all(signs)
    tell(f"{ended} processes ended")
    processes.remove_cgroups(cgroups)
    _unmount_below(layout.root)
    for namespace in netns.names(namespace_prefix(layout.name)):
        netns.delete(namespace)
    _remove(layout.root)
    tell(f"lab '{layout.name}' is down")


def _unmount_below(root: Path) -> None:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        where = line.split(" ")[4].encode().decode("unicode_escape")
        if where == str(root) or where.startswith(f"{root}/"):
            found.append(where)
    for where in reversed(found):
        syscalls.umount(where, syscalls.MNT_DETACH)


def _remove(root: Path) -> None:
    if root.is_symlink():
        raise LabError(f"{root} is a symbolic link; it is left alone", hint="remove it by hand")
    if root.exists():
        try:
            shutil.rmtree(root)
        except OSError as error:
            raise LabError(f"{root} could not be removed", cause=str(error)) from error
    if root.parent == DEFAULT_DIRECTORY:
        with contextlib.suppress(OSError):  # other labs are in it
            root.parent.rmdir()
            root.parent.parent.rmdir()


@contextlib.contextmanager
def _locked(layout: Layout) -> Iterator[None]:
    """Hold the lab's lock; ``down`` removes the file with the rest, so look whether it is still the same."""
    deadline_s = time.monotonic() + _LOCK_S
    while True:
        layout.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            file = layout.lock_file.open("a")
        except FileNotFoundError:
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise DeadlineError(
                        f"another command has been working on lab '{layout.name}' for {_LOCK_S:.0f} s"
                    ) from None
                time.sleep(0.1)
                continue
            try:
                same = layout.lock_file.stat().st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                same = False
            if same:
                yield
                return
