"""``virtgrid bench sandbox``: how fast a sandbox is there, and gone, and what it costs; beside others.

Everything happens at the sites of a lab of its own. Each round measures in turn: a sandbox made from
nothing, the same made with lxc-start, a staged sandbox, bubblewrap, and a bare libvirt container. Then
many sandboxes at once, and bare containers with the hook and without.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from virtgrid.bench.result import Figure, Result, at_most, figure, ratio
from virtgrid.bench.where import environment
from virtgrid.core.errors import DeadlineError, RefusedError
from virtgrid.core.process import process_started
from virtgrid.core.shipped import shipped
from virtgrid.grid.node import cables, domain, layer, root, template
from virtgrid.grid.node.sandbox import Sandbox, Sandboxes
from virtgrid.grid.node.spec import FIRST_BASE, MIB, SandboxLimits, SandboxSpec, id_map
from virtgrid.host import hooks
from virtgrid.lab import faults
from virtgrid.lab.inside import Inside
from virtgrid.lab.lab import Lab, take_down
from virtgrid.lab.layout import BRIDGE, LabConfig
from virtgrid.lab.site import Site
from virtgrid.lab.stage import Tell, lab_name
from virtgrid.virt import container
from virtgrid.virt.connection import Hypervisor

_ACCOUNT: Final = "bencher"
_UID: Final = 4199
_ANSWER_S: Final = 20.0
#: An early SYN is lost and repeated after a second: ask anew, often.
_PROBE_S: Final = 0.02
_PEERS: Final = {"lxc-start": "lxc", "bwrap": "bubblewrap"}
#: So many more for the hook: it costs an eighth of a create, and creates differ by more than that.
_HOOK_ROUNDS: Final = 3
#: About one end in a thousand libvirt never notices: its controller waits on for a process that has gone.
_UNNOTICED_S: Final = 2.0
#: Calls that libvirt works on at once while many are made.
_CONNECTIONS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxPlan:
    """rounds: of each single thing. many: how many sandboxes at once."""

    rounds: int = 30
    many: int = 64


@dataclass(slots=True)
class Samples:
    """Milliseconds, a list for each thing."""

    up: list[float] = field(default_factory=list)
    prepare: list[float] = field(default_factory=list)
    staged: list[float] = field(default_factory=list)
    lxc: list[float] = field(default_factory=list)
    lxc_alone: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    with_hook: list[float] = field(default_factory=list)
    without_hook: list[float] = field(default_factory=list)
    bubblewrap: list[float] = field(default_factory=list)
    dead: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    unnoticed: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Many at once. leaks: what was left afterwards, by name."""

    up_s: float
    down_s: float
    memory_mib: tuple[float, ...]
    leaks: tuple[str, ...]


# --- figures: pure --------------------------------------------------------------------------


def figures(plan: SandboxPlan, samples: Samples, crowd: Crowd) -> tuple[Figure, ...]:
    """All figures; medians, because one stumble of a busy machine is not the machine."""
    of = statistics.median
    up = figure("up_ms", samples.up, "ms", of=of, goal=at_most(150, "ms"))
    lxc = figure("lxc_start_ms", samples.lxc, "ms", of=of)
    bare = figure("libvirt_bare_ms", samples.bare, "ms", of=of)
    with_hook = figure("create_with_hook_ms", samples.with_hook, "ms", of=of)
    without = figure("create_without_hook_ms", samples.without_hook, "ms", of=of)
    overhead = None
    if with_hook.value is not None and without.value:
        overhead = with_hook.value / without.value - 1
    many = f"{plan.many}"
    # The goals were set for 64; a smaller crowd has no goal of its own.
    whole = plan.many >= 64
    return (
        up,
        ratio("up_vs_lxc_start", up, lxc, goal=at_most(1.5)),
        figure("up_staged_ms", samples.staged, "ms", of=of, goal=at_most(25, "ms")),
        figure("dead_ms", samples.dead, "ms", of=of, goal=at_most(10, "ms")),
        figure("done_ms", samples.done, "ms", of=of, goal=at_most(300, "ms")),
        figure(f"up{many}_s", [crowd.up_s], "s", goal=at_most(12, "s") if whole else None),
        figure(f"down{many}_s", [crowd.down_s], "s", goal=at_most(5, "s") if whole else None),
        figure("leaks", [float(len(crowd.leaks))], goal=at_most(0)),
        figure("memory_mib", crowd.memory_mib, "MiB", goal=at_most(12, "MiB")),
        figure(
            "hook_overhead_share",
            [overhead] * min(with_hook.n, without.n) if overhead is not None else [],
            goal=at_most(0.15),
        ),
        figure("prepare_ms", samples.prepare, "ms", of=of),
        lxc,
        figure("lxc_start_alone_ms", samples.lxc_alone, "ms", of=of),
        bare,
        ratio("up_vs_libvirt_bare", up, bare),
        with_hook,
        without,
        figure("bubblewrap_ms", samples.bubblewrap, "ms", of=of),
    )


# --- the rounds -----------------------------------------------------------------------------


def answering_ms(address: str, began_s: float) -> float:
    """Ask the address from here until its sshd says who it is; milliseconds since ``began_s``."""
    while True:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((address, 22), timeout=_PROBE_S) as line,
        ):
            line.settimeout(_ANSWER_S)
            if line.recv(16).startswith(b"SSH-"):
                return (time.monotonic() - began_s) * 1e3
        if time.monotonic() - began_s > _ANSWER_S:
            raise DeadlineError(f"no sshd answered at {address} within {_ANSWER_S:g} s")
        time.sleep(0.0005)


class _Bench:
    """The parts of a round; each leaves nothing behind."""

    def __init__(self, site: Site, template_name: str, samples: Samples) -> None:
        self.site = site
        self.template = template_name
        self.samples = samples
        self.home = site.plan.root / "bench-home"

    def spec(self, name: str, number: int) -> SandboxSpec:
        return SandboxSpec(
            name=name,
            user="grid",
            account=_ACCOUNT,
            address=f"10.77.0.{number}/24",
            bridge=BRIDGE,
            template=self.template,
            limits=SandboxLimits(memory_bytes=128 * MIB, layer_bytes=32 * MIB),
        )

    async def made(self, sandboxes: Sandboxes) -> None:
        """INIT to sshd answering, then SHUT_DOWN to dead and to done."""
        spec = self.spec("made", 50)
        began_s = time.monotonic()
        await sandboxes.prepare(spec)
        self.samples.prepare.append((time.monotonic() - began_s) * 1e3)
        box = await sandboxes.start(spec.name)
        self.samples.up.append(await asyncio.to_thread(answering_ms, spec.ip, began_s))
        await self._ended(sandboxes, box)

    async def staged(self, sandboxes: Sandboxes) -> None:
        spec = self.spec("staged", 51)
        await sandboxes.prepare(spec)
        await sandboxes.wait_ready(await sandboxes.stage(spec.name))
        began_s = time.monotonic()
        box = await sandboxes.start(spec.name)
        self.samples.staged.append(await asyncio.to_thread(answering_ms, spec.ip, began_s))
        await self._ended(sandboxes, box)

    async def _ended(self, sandboxes: Sandboxes, box: Sandbox) -> None:
        call = sandboxes.command(box, ["sh", "-c", "echo; exec sleep 60"])
        work = subprocess.Popen(  # noqa: ASYNC220 - at the site
            call.argv, env=dict(call.env), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        if work.stdout is not None:
            await asyncio.to_thread(work.stdout.readline)  # it runs
        began_s = time.monotonic()
        await asyncio.to_thread(sandboxes.kill, box)
        self.samples.dead.append((time.monotonic() - began_s) * 1e3)
        if box.init is None or process_started(box.init.pid) is not None or cables.is_up(box.spec.port):
            raise DeadlineError("a killed sandbox still has a process or a network")
        await sandboxes.destroy(box.name)
        self.samples.done.append((time.monotonic() - began_s) * 1e3)
        await asyncio.to_thread(work.wait)

    async def lxc(self) -> None:
        """The same sandbox, made with lxc-start: root, layer and keys by the same code, user namespace, first
        process, limits, address. From nothing to sshd answering, and lxc-start's own part of it.
        """
        spec = self.spec("lxcpeer", 52)
        request = root.RootRequest(
            name=spec.name, user=spec.user, account=_ACCOUNT, template=spec.template, address=spec.ip,
            bridge=spec.bridge, base=FIRST_BASE, layer_bytes=spec.limits.layer_bytes,
            parameters=domain.parameters(spec),
        )  # fmt: skip

        def fill(directory: str, account: root.Account) -> None:
            layer.write_keys(directory, spec.name, spec.user, account, request.base)

        with self._lxc_files(spec) as directory:
            name = ["-n", spec.name, "-P", str(directory)]
            try:
                began_s = time.monotonic()
                await asyncio.to_thread(root.prepare, request, fill=fill)
                prepared_s = time.monotonic()
                await _run(["lxc-start", *name])
                self.samples.lxc.append(await asyncio.to_thread(answering_ms, spec.ip, began_s))
                self.samples.lxc_alone.append(self.samples.lxc[-1] - (prepared_s - began_s) * 1e3)
            finally:
                await _run(["lxc-stop", "-k", *name], check=False)
                root.release(spec.name)

    @contextlib.contextmanager
    def _lxc_files(self, spec: SandboxSpec) -> Iterator[Path]:
        directory = self.site.plan.root / "bench-lxc"
        here = root.home_of(spec.name)
        lines = (
            f"lxc.rootfs.path = dir:{here}/root",
            f"lxc.uts.name = {spec.name}",
            "lxc.init.cmd = /etc/virtgrid/init",
            "lxc.net.0.type = veth",
            f"lxc.net.0.link = {BRIDGE}",
            "lxc.net.0.flags = up",
            "lxc.net.0.name = eth0",
            f"lxc.net.0.hwaddr = {spec.mac}",
            f"lxc.net.0.ipv4.address = {spec.address}",
            "lxc.mount.auto = proc:mixed sys:ro",
            "lxc.mount.entry = /usr usr none bind,ro 0 0",
            "lxc.mount.entry = /opt opt none bind,ro 0 0",
            f"lxc.mount.entry = {self.home} home/{spec.user} none bind 0 0",
            f"lxc.mount.entry = {here}/layer/ssh home/{spec.user}/.ssh none bind 0 0",
            "lxc.apparmor.profile = unconfined",
            # Of both kinds of control groups; the other one is left out.
            f"lxc.cgroup.memory.limit_in_bytes = {spec.limits.memory_bytes}",
            f"lxc.cgroup2.memory.max = {spec.limits.memory_bytes}",
            *(
                f"lxc.idmap = {kind} {first} {target} {count}"
                for kind in "ug"
                for first, target, count in id_map(FIRST_BASE, _UID)
            ),
        )
        (directory / spec.name).mkdir(parents=True, exist_ok=True)
        (directory / spec.name / "config").write_text("\n".join(lines) + "\n")
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    async def bare(self, hypervisor: Hypervisor, found: list[float]) -> None:
        """Create a container that has nothing to do with us."""
        text = shipped("xml-templates", "container-bare.xml").read_text()
        began_s = time.monotonic()
        made = await container.create(hypervisor, text, "bare")
        found.append((time.monotonic() - began_s) * 1e3)
        _end_first_process(made.controller)
        ended_s = time.monotonic()
        while await container.find(hypervisor, "bare") is not None:
            if time.monotonic() - ended_s > _UNNOTICED_S:
                self.samples.unnoticed.append((time.monotonic() - began_s) * 1e3)
                await container.destroy(hypervisor, "bare")
                return
            await asyncio.sleep(0.01)

    async def bubblewrap(self) -> None:
        words = "--unshare-all --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib"
        words += " --symlink usr/lib64 /lib64 --proc /proc --dev /dev /bin/true"
        began_s = time.monotonic()
        await _run(["bwrap", *words.split()])
        self.samples.bubblewrap.append((time.monotonic() - began_s) * 1e3)

    async def crowd(self, sandboxes: Sandboxes, count: int) -> Crowd:
        specs = [self.spec(f"crowd{number}", 60 + number) for number in range(count)]
        gate = asyncio.Semaphore(_CONNECTIONS * 2)

        async def up(spec: SandboxSpec) -> Sandbox:
            async with gate:
                return await sandboxes.make(spec)

        began_s = time.monotonic()
        boxes = await asyncio.gather(*(up(spec) for spec in specs))
        up_s = time.monotonic() - began_s
        memory = tuple(_pss_mib(box) for box in boxes)
        began_s = time.monotonic()
        await asyncio.gather(*(sandboxes.destroy(box.name) for box in boxes))
        down_s = time.monotonic() - began_s
        return Crowd(up_s=up_s, down_s=down_s, memory_mib=memory, leaks=_leaks())


def _end_first_process(controller: int) -> None:
    """libvirt's own way takes two seconds with a first process that ignores SIGTERM."""
    for child in Path(f"/proc/{controller}/task/{controller}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)


def _pss_mib(box: Sandbox) -> float:
    """What its processes take, libvirt's own included; shared pages by share."""
    if box.init is None:
        return 0.0
    parent = int(Path(f"/proc/{box.init.pid}/stat").read_text().rpartition(")")[2].split()[1])
    waiting, total_kib = [parent], 0
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError):
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total_kib += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total_kib / 1024


def _leaks() -> tuple[str, ...]:
    """What of sandboxes there still is at the site: the names of it."""
    found = [f"directory {name}" for name in root.names()]
    claims = Path(root.sandboxes(), ".claims")
    found += [f"claim {entry.name}" for entry in (claims.iterdir() if claims.is_dir() else ())]
    mounts = Path("/proc/thread-self/mountinfo").read_text().splitlines()
    found += [f"mount {line.split()[4]}" for line in mounts if "/sandboxes/crowd" in line]
    found += [f"cable {name}" for _, name in socket.if_nameindex() if name.startswith("vg")]
    for groups in Path("/sys/fs/cgroup").glob("**/lxc-*-crowd*"):
        found.append(f"control group {groups}")
    for run in Path("/run/libvirt/lxc").glob("crowd*"):
        found.append(f"file {run}")
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"libvirt_lxc\0--name\0crowd" in process.read_bytes():
                found.append(f"process {process.parent.name}")
    return tuple(found)


async def _run(argv: Sequence[str], *, check: bool = True) -> None:
    """A program to its end, at the site (the thread's children are where the thread is)."""
    done = await asyncio.to_thread(
        subprocess.run, argv, capture_output=True, text=True, timeout=_ANSWER_S, check=False
    )
    if check and done.returncode != 0:
        raise RefusedError(f"'{argv[0]}' failed with status {done.returncode}", cause=done.stderr.strip())


# --- the whole ------------------------------------------------------------------------------


def measure(plan: SandboxPlan, tell: Tell) -> Result:
    """Bring up a lab, measure, take it down. Errors: RefusedError when a peer is missing."""
    for program, package in _PEERS.items():
        if shutil.which(program) is None:
            raise RefusedError(f"{program} is not installed", hint=f"apt-get install {package}")
    name = lab_name("sandbox")
    samples = Samples()
    where = environment(rounds=plan.rounds, many=plan.many)
    try:
        lab = Lab.up(LabConfig(name=name), tell=tell)
        site = lab.sites[0]
        bench = _Bench(site, name, samples)
        bench.home.mkdir()
        os.chown(bench.home, _UID, _UID)
        account = f"{_ACCOUNT}:x:{_UID}:{_UID}::{bench.home}:/bin/bash"
        site.run(["sh", "-c", f"echo '{account}' >> /etc/passwd"])
        template.build(name)
        with Inside(site) as inside:
            crowd = _measured(bench, inside, plan, tell)
        tell("the hook's share of a container that is not ours")
        _hook_overhead(bench, lab.sites[:2], plan.rounds * _HOOK_ROUNDS)
    finally:
        take_down(name)
        template.remove(name)
    raw = {"samples_ms": {one: getattr(samples, one) for one in Samples.__slots__}, "leaks": crowd.leaks}
    return Result(bench="sandbox", environment=where, figures=figures(plan, samples, crowd), raw=raw)


def _measured(bench: _Bench, inside: Inside, plan: SandboxPlan, tell: Tell) -> Crowd:
    sandboxes = inside.call(lambda: Sandboxes.open(connections=_CONNECTIONS))
    here = inside.call(lambda: Hypervisor.open("lxc:///system", name="libvirt"))
    try:
        for number in range(plan.rounds):
            inside.call(lambda: bench.made(sandboxes))
            inside.call(bench.lxc)
            inside.call(lambda: bench.staged(sandboxes))
            inside.call(bench.bubblewrap)
            inside.call(lambda: bench.bare(here, bench.samples.bare))
            up, lxc = bench.samples.up[-1], bench.samples.lxc[-1]
            tell(f"round {number + 1} of {plan.rounds}: up {up:.0f} ms, lxc-start {lxc:.0f} ms")
        tell(f"{plan.many} sandboxes at once")
        return inside.call(lambda: bench.crowd(sandboxes, plan.many), timeout_s=300)
    finally:
        inside.call(sandboxes.close)
        inside.call(here.close)


def _hook_overhead(bench: _Bench, sites: Sequence[Site], rounds: int) -> None:
    """The same container at a site with the hook and at one without, turn about.

    Halfway the sites change parts, so that what else is different between them says nothing.
    """
    for hooked in sites:
        for site in sites:
            change = hooks.install if site is hooked else hooks.remove
            change(site.plan.root / "libvirt/hooks")
            faults.kill_libvirtd(site)  # it looks for hooks when it starts
            faults.restore_libvirtd(site)
        with contextlib.ExitStack() as stack:
            pair = [_connected(stack, site) for site in sites]
            for number in range(rounds):
                for one in range(2):
                    which = (number + one) % 2
                    found = bench.samples.with_hook if sites[which] is hooked else bench.samples.without_hook
                    inside, hypervisor = pair[which]
                    inside.call(functools.partial(bench.bare, hypervisor, found))


def _connected(stack: contextlib.ExitStack, site: Site) -> tuple[Inside, Hypervisor]:
    inside = stack.enter_context(Inside(site))
    hypervisor = inside.call(lambda: Hypervisor.open("lxc:///system", name=site.name))
    stack.callback(lambda: inside.call(hypervisor.close))
    return inside, hypervisor
