"""What a host lacks for sandboxes, and the command that mends it: the other half of ``virtgrid doctor``.

``gather`` looks, ``judge`` decides. Nothing is changed: what can only be known by trying is tried in a
mount namespace that ends with the question.
"""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from virtgrid.core.errors import VirtgridError
from virtgrid.grid.node import mounts, root, template
from virtgrid.grid.node.sandbox import DEFAULT_URI
from virtgrid.grid.node.spec import BASES, DEFAULT_TEMPLATE, FIRST_BASE
from virtgrid.host import hooks
from virtgrid.host.hooks import Hook, HookState
from virtgrid.migration.preflight import Check, CheckVerdict
from virtgrid.net import syscalls
from virtgrid.virt.connection import Hypervisor
from virtgrid.wire import message
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.line import Line
from virtgrid.wire.wellknown import VIRTGRIDD

_ANSWER_S: Final = 2.0
_IDS: Final = range(FIRST_BASE, FIRST_BASE + BASES * 65536)
#: What a container's first process needs to close one descriptor that is not open, on a slow machine.
_CLOSE_S: Final = 0.3e-6
_DESCRIPTORS: Final = 16384
_RESTART: Final = "systemctl restart libvirtd"


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxFacts:
    """What there is. Each ``no_…`` says why something does not work; None when it does.

    stale: templates whose linker cache is not the host's any more. subordinate: lines of /etc/subuid and
    /etc/subgid that give away ids of sandboxes. descriptors: how many files libvirtd may open.
    """

    hooks: tuple[Hook, ...]
    templates: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    no_virtgridd: str | None = None
    no_driver: str | None = None
    tried_root: bool = True
    no_root: str | None = None
    no_programs: tuple[str, ...] = ()
    subordinate: tuple[str, ...] = ()
    descriptors: int | None = None
    virtgridd_was_here: bool = False


# --- judging: pure --------------------------------------------------------------------------


def judge(facts: SandboxFacts) -> list[Check]:
    """All findings; a single one on a host that nobody has prepared for sandboxes."""
    absent = all(hook.state is HookState.ABSENT for hook in facts.hooks)
    if absent and not facts.templates and not facts.virtgridd_was_here:
        text = (
            "this host is not prepared for sandboxes; 'virtgrid hooks install' and 'template build' do that"
        )
        return [_pass("sandboxes", text)]
    return [
        *(_hook(hook) for hook in facts.hooks),
        _template(facts),
        _verdict("virtgridd", facts.no_virtgridd, "virtgridd answers", "virtgrid serve host"),
        _verdict(
            "lxc", facts.no_driver, "libvirt runs containers",
            "systemctl start libvirtd; if it has no such driver, apt-get install libvirt-daemon-driver-lxc",
        ),
        *_root(facts),
        _programs(facts.no_programs),
        _ids(facts.subordinate),
        *_descriptors(facts.descriptors),
    ]  # fmt: skip


def _pass(name: str, text: str) -> Check:
    return Check(name=name, verdict=CheckVerdict.PASS, text=text)


def _warn(name: str, text: str, hint: str) -> Check:
    return Check(name=name, verdict=CheckVerdict.WARN, text=text, hint=hint)


def _verdict(name: str, problem: str | None, good: str, hint: str) -> Check:
    return _pass(name, good) if problem is None else _warn(name, problem, hint)


#: What a host without a driver's hook does not have.
_WITHOUT: Final = {
    "lxc": "sandboxes start by 'virtgrid sandbox' only, not by virsh",
    "qemu": "virtgridd does not hear of machines, and what arrives keeps the names it had",
}


def _hook(hook: Hook) -> Check:
    name = f"{hook.driver} hook"
    match hook.state:
        case HookState.ABSENT:
            text = f"the hook is not installed: {_WITHOUT[hook.driver]}"
            return _warn(name, text, f"virtgrid hooks install && {_RESTART}")
        case HookState.OLD:
            text = f"{hook.path} leads to another virtgrid, {hook.target}"
            return _warn(name, text, f"virtgrid hooks install && {_RESTART}")
        case HookState.FOREIGN:
            hint = "give it another name, all files of the directory are run; then virtgrid hooks install"
            return _warn(name, f"{hook.path} is not virtgrid's", hint)
        case HookState.INSTALLED:
            if hook.restart_needed:
                return _warn(name, "the hook was installed after libvirtd had looked for hooks", _RESTART)
            return _pass(name, f"{hook.path} is this virtgrid's")


def _template(facts: SandboxFacts) -> Check:
    if not facts.templates:
        return _warn("template", "no template is built", "virtgrid template build")
    if facts.stale:
        name = facts.stale[0]
        text = f"packages have changed since template '{name}' was built: programs may miss libraries"
        return _warn(
            "template", text, f"virtgrid template build{'' if name == DEFAULT_TEMPLATE else f' {name}'}"
        )
    return _pass("template", f"built: {', '.join(facts.templates)}")


def _root(facts: SandboxFacts) -> list[Check]:
    if not facts.tried_root:
        return []
    good = "overlayfs over a template with shifted owners works"
    hint = "a kernel of 5.19 or newer with overlayfs and user namespaces (sysctl user.max_user_namespaces)"
    return [_verdict("overlay", facts.no_root, good, hint)]


def _programs(missing: tuple[str, ...]) -> Check:
    if missing:
        hint = f"apt-get install {' '.join(missing)}"
        return _warn("sandbox programs", f"missing: {', '.join(missing)}", hint)
    return _pass("sandbox programs", "sshd and unshare are there")


def _ids(lines: tuple[str, ...]) -> Check:
    if lines:
        text = f"ids of sandboxes ({_IDS[0]} to {_IDS[-1]}) are given away: {', '.join(lines[:3])}"
        return _warn("ids", text, "give that account another range: usermod --add-subuids, --del-subuids")
    return _pass("ids", f"{_IDS[0]} to {_IDS[-1]} belong to sandboxes alone")


def _descriptors(limit: int | None) -> list[Check]:
    """libvirt closes all that might be open, one by one, in each container's first process."""
    if limit is None:
        return []
    if limit <= _DESCRIPTORS:
        return [_pass("open files", f"libvirtd may open {limit} files")]
    text = (
        f"libvirtd may open {limit} files, and each container closes as many before its first program:"
        f" some {limit * _CLOSE_S * 1e3:.0f} ms"
    )
    hint = f"systemctl edit libvirtd: [Service] LimitNOFILE=1024:8192; then {_RESTART}"
    return [_warn("open files", text, hint)]


# --- looking --------------------------------------------------------------------------------


async def gather() -> SandboxFacts:
    """Look at this host. Every question has a deadline or needs none."""
    no_virtgridd, no_driver = await asyncio.gather(_no_virtgridd(Endpoint.parse(VIRTGRIDD)), _no_driver())
    return replace(await asyncio.to_thread(_seen), no_virtgridd=no_virtgridd, no_driver=no_driver)


def _seen() -> SandboxFacts:
    """What can be seen without asking anybody."""
    built = [one.name for one in template.built()]
    return SandboxFacts(
        hooks=tuple(hooks.status()),
        templates=tuple(built),
        stale=tuple(name for name in built if _is_stale(root.template_tree(name))),
        virtgridd_was_here=Path(Endpoint.parse(VIRTGRIDD).path).exists(),
        tried_root=os.geteuid() == 0,
        no_root=_no_root() if os.geteuid() == 0 else None,
        no_programs=tuple(
            package
            for program, package in (("sshd", "openssh-server"), ("unshare", "util-linux"))
            if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None
        ),
        subordinate=subordinate((Path("/etc/subuid"), Path("/etc/subgid"))),
        descriptors=_libvirtds_descriptors(),
    )


async def findings() -> list[Check]:
    return judge(await gather())


def _is_stale(tree: str) -> bool:
    """The linker's cache changes with every library that comes, goes or moves."""
    here = Path("/etc/ld.so.cache")
    there = Path(tree, "etc/ld.so.cache")
    try:
        return there.exists() and here.exists() and here.read_bytes() != there.read_bytes()
    except OSError:
        return False


async def _no_virtgridd(where: Endpoint) -> str | None:
    async def heard(_line: Line, method: str, _params: Mapping[str, Any]) -> Any:
        raise message.no_such_method(method)

    try:
        line = await dial(where, heard, name="virtgridd", deadline_s=_ANSWER_S)
        try:
            await line.call("PING", deadline_s=_ANSWER_S)
        finally:
            await line.close()
    except VirtgridError as error:
        return f"{error.what}, so pilots get no sandboxes here"
    return None


async def _no_driver() -> str | None:
    try:
        hypervisor = await Hypervisor.open(DEFAULT_URI, name=DEFAULT_URI)
    except VirtgridError as error:
        return f"{error.what}: {error.cause}" if error.cause else error.what
    await hypervisor.close()
    return None


def _no_root() -> str | None:
    """Make a sandbox's root and write into it, where nobody sees it: the thread's mounts end with it."""
    place = Path(tempfile.mkdtemp(prefix="virtgrid-doctor-"))
    try:
        with ThreadPoolExecutor(1) as alone:
            alone.submit(_try_root, place).result()
    except OSError as error:
        return f"a sandbox's root cannot be made here: {error}"
    finally:
        place.rmdir()
    return None


def _try_root(place: Path) -> None:
    syscalls.unshare(syscalls.CLONE_FS | syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", flags=syscalls.MS_REC | syscalls.MS_PRIVATE)
    mounts.mount("virtgrid", f"{place}", "tmpfs", "size=1048576")
    for name in ("tree", "lower", "upper", "work", "root"):
        (place / name).mkdir()
    mounts.mount_shifted(f"{place}/tree", f"{place}/lower", FIRST_BASE)
    options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
    mounts.mount("virtgrid", f"{place}/root", "overlay", options)
    (place / "root/written").mkdir()


def subordinate(files: tuple[Path, ...]) -> tuple[str, ...]:
    """Lines ``account:first:count`` that overlap with the ids of sandboxes, each with its file."""
    found = []
    for file in files:
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            _, _, numbers = line.partition(":")
            first, _, count = numbers.partition(":")
            if not (first.strip().isdecimal() and count.strip().isdecimal()):
                continue
            begin = int(first)
            if begin < _IDS.stop and begin + int(count) > _IDS.start:
                found.append(f"{line.strip()[:80]} in {file}")
    return tuple(found)


def _libvirtds_descriptors() -> int | None:
    """What the daemon that runs containers may open; None when none runs, or it is not ours to know."""
    pid = hooks.daemon_pid()
    if pid is None:
        return None
    try:
        return resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]
    except OSError:
        return None
