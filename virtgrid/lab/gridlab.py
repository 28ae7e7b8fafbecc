"""A lab as a grid: both sites with a virtgridd and a CRM, a network manager and a coordinator, and a user.

The user's jobs are run as a user runs them, by ``virtgrid job run --json`` at the first site.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from virtgrid.core.errors import DeadlineError, LabError
from virtgrid.grid.messages.job import (
    JOURNAL_LINE,
    Finished,
    JobState,
    JobTold,
    NodeTold,
    SiteTold,
    Wrote,
)
from virtgrid.grid.node import template
from virtgrid.lab.lab import Lab
from virtgrid.lab.layout import MARKER
from virtgrid.lab.network import VIRTGRID
from virtgrid.lab.site import Site
from virtgrid.lab.slurm.cluster import Cluster
from virtgrid.net.link import Links, Tunnel
from virtgrid.wire import seal

JournalLine = JobTold | NodeTold | SiteTold | Wrote | Finished
Tell = Callable[[str], None]

ACCOUNT: Final = "kenji"
UID: Final = 5001
TAGS: Final = (700, 701)
"""The segments there are; each isolates one reservation."""
NETWORK: Final = "net"
_READY_S: Final = 60.0
_END_S: Final = 20.0
_JOB_S: Final = 300.0


@dataclass(slots=True)
class GridLab:
    """home: of sockets, files and logs, which everybody may enter. nodes: of each site.

    parts: the running programs by name: ``grc``, ``net``, ``crm-SITE``, ``host-SITE``. on_slurm: each site
    has a Slurm of its own, in ``slurms``, instead of the embedded backend.
    """

    lab: Lab
    nodes: int = 2
    rate: str = "100mbit"
    memory: str = "256MiB"
    on_slurm: bool = False
    slurms: dict[str, Cluster] = field(default_factory=dict)
    parts: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.lab.layout.root / "grid"

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.lab.sites[:2]

    def socket(self, name: str) -> str:
        return f"unix:{self.home / name}.sock"

    # -- up and down ---------------------------------------------------------------------------

    def up(self) -> None:
        """Everything, until all of it listens. Errors: LabError, DeadlineError."""
        self.home.mkdir(mode=0o755, exist_ok=True)
        user_home = self.home / ACCOUNT
        user_home.mkdir(exist_ok=True)
        os.chown(user_home, UID, UID)
        key = seal.new_key()
        (self.home / "crm.key").unlink(missing_ok=True)
        seal.write_private(self.home / "crm.key", seal.private_text(key))
        (self.home / "crm.pub").write_text(seal.public_text(key.public_key()))
        template.build()
        for here, there in (self.sites, self.sites[::-1]):
            self._furnish(here, there)
            if self.on_slurm:
                self.slurms[here.name] = Cluster(self.node_names(here.name), there=here.argv)
        for name in self.names:
            self.start(name)
        for name in self.names:
            self.wait(name)

    @property
    def names(self) -> tuple[str, ...]:
        hosts = [f"host-{site.name}" for site in self.sites]
        return (*hosts, *(f"crm-{site.name}" for site in self.sites), NETWORK, "grc")

    def _furnish(self, here: Site, there: Site) -> None:
        """Segments over VXLANs to the other site, and an account with a home."""
        with Links(here.netns) as links:
            for tag in TAGS:
                links.bridge(f"br{tag}")
                way = Tunnel(vni=tag, local=here.wan_address, remote=there.wan_address)
                links.vxlan(f"vx{tag}", way, mtu=1500, alias="virtgrid lab")
                links.up(f"vx{tag}", mtu=1500)
                links.enslave(f"vx{tag}", f"br{tag}")
        etc = Path(f"/proc/{here.inhabitant()}/root/etc")
        for name, line in (
            ("passwd", f"{ACCOUNT}:x:{UID}:{UID}::{self.home / ACCOUNT}:/bin/bash\n"),
            ("group", f"{ACCOUNT}:x:{UID}:\n"),
        ):
            lines = (etc / name).read_text().splitlines(keepends=True)
            others = [text for text in lines if not text.startswith(f"{ACCOUNT}:")]
            (etc / name).write_text("".join([*others, line]))

    def node_names(self, site: str) -> list[str]:
        return [f"{site}{number + 1}" for number in range(self.nodes)]

    def down(self) -> None:
        """End the programs, the sandboxes' last; also those whose CRM is dead."""
        for name in reversed(self.names):
            self.end(name)
        while self.slurms:
            self.slurms.popitem()[1].close()
        for site in self.sites:
            for name in site.domains():
                site.run([*VIRTGRID, "sandbox", "destroy", name], check=False)
            with Links(site.netns) as links:
                for tag in TAGS:
                    links.delete(f"vx{tag}")
                    links.delete(f"br{tag}")

    def __enter__(self) -> GridLab:
        with ExitStack() as stack:
            stack.callback(self.down)
            self.up()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # -- one program ---------------------------------------------------------------------------

    def words(self, name: str) -> tuple[Site, list[str]]:
        """Where a program runs, and its words after ``virtgrid serve``."""
        first = self.sites[0]
        kept = ["--socket", self.socket(name), "--database", str(self.home / f"{name}.db")]
        kind, _, where = name.partition("-")
        if kind == "host":
            return self.lab.site(where), [
                "host", "--crm-key", str(self.home / "crm.pub"), "--socket", self.socket(name),
            ]  # fmt: skip
        if kind == "crm":
            number = [site.name for site in self.sites].index(where)
            nodes = [word for node in self.node_names(where) for word in ("--node", node)]
            if self.on_slurm:
                nodes += ["--backend", "slurm", "--slurm-conf", str(self.slurms[where].configuration)]
                nodes += ["--spool", str(self.spool(where))]
            return self.lab.site(where), [
                "crm", "--site", where, *nodes, "--addresses", f"10.70.{number}.0/24", *kept,
                "--key", str(self.home / "crm.key"), "--pilots", self.socket(f"pilots-{where}"),
                "--host", self.socket(f"host-{where}"), "--memory", self.memory,
            ]  # fmt: skip
        if kind == NETWORK:
            link = f"{self.sites[0].name}:{self.sites[1].name}={self.rate}"
            segments = f"{TAGS[0]}-{TAGS[-1]}"
            return first, ["nrm", "--name", NETWORK, "--link", link, "--segments", segments, *kept]
        crms = [
            word for site in self.sites
            for word in ("--crm", f"{site.name}={self.socket(f'crm-{site.name}')}")
        ]  # fmt: skip
        return first, ["grc", *crms, "--nrm", f"{NETWORK}={self.socket(NETWORK)}", *kept]

    def spool(self, site: str) -> Path:
        """Where the pilots of a site on Slurm have their tickets, as everybody sees it."""
        return self.home / f"spool-{site}"

    def start(self, name: str) -> None:
        """Without waiting for it."""
        site, words = self.words(name)
        with self._log(name).open("wb") as log:
            self.parts[name] = subprocess.Popen(
                site.argv([*VIRTGRID, "serve", *words]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                env={**os.environ, MARKER: os.fspath(self.lab.layout.root)},
            )

    def wait(self, name: str) -> None:
        """Until it listens. Errors: LabError when it ended, DeadlineError."""
        until_s = time.monotonic() + _READY_S
        while b"ready at" not in self._log(name).read_bytes():
            if self.parts[name].poll() is not None:
                raise LabError(f"{name} did not start", cause=self.said(name)[-500:])
            if time.monotonic() > until_s:
                raise DeadlineError(f"{name} does not listen after {_READY_S:g} s")
            time.sleep(0.02)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End a program, and wait until it has."""
        process = self.parts.pop(name)
        process.send_signal(number)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def end(self, name: str) -> None:
        """The same, in peace; when it runs."""
        if name in self.parts:
            self.kill(name, signal.SIGTERM)

    def said(self, name: str) -> str:
        return self._log(name).read_text(errors="replace")

    def _log(self, name: str) -> Path:
        return self.home / f"{name}.log"

    # -- a user --------------------------------------------------------------------------------

    def argv(self, *words: str) -> list[str]:
        """A command of virtgrid as the user gives it, at the first site."""
        me = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
        return self.sites[0].argv([*me, *VIRTGRID, *words])

    @property
    def environment(self) -> Mapping[str, str]:
        home = os.fspath(self.home / ACCOUNT)
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": home,
            "LANG": "C.UTF-8",
            "VIRTGRID_GRC": self.socket("grc"),
            MARKER: os.fspath(self.lab.layout.root),
        }

    def say(self, *words: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
        """A command of the user's, to its end."""
        return subprocess.run(
            self.argv(*words), env=dict(self.environment), cwd="/", stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip

    def job(self, options: Sequence[str], command: Sequence[str]) -> Iterator[JournalLine]:
        """``virtgrid job run``: the job's journal as it grows. Errors: LabError when there is no job."""
        words = ["job", "run", "--json", *options, "--", *command]
        process = subprocess.Popen(
            self.argv(*words), env=dict(self.environment), cwd="/", stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=sys.stderr, text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        told = False
        try:
            for text in process.stdout:
                try:
                    line = JOURNAL_LINE.validate_json(text)
                except ValidationError:
                    if not told:
                        raise LabError("there was no job", cause=text.strip()[:500]) from None
                    continue  # its last line, which sums up
                told = True
                yield line
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # it ends its job
            with process.stdout:
                try:
                    process.wait(_JOB_S if told else _END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def left(self) -> dict[str, Any]:
        """What is there of sandboxes and pilots at the sites: everything empty when nothing is left."""
        found: dict[str, Any] = {}
        for site in self.sites:
            links = site.run(["ip", "-o", "link"]).stdout
            directory = site.plan.root / "sandboxes"
            pilots = self.spool(site.name) if self.on_slurm else site.plan.run / "virtgrid/pilots"
            found |= {
                f"domains at {site.name}": sorted(site.domains()),
                f"cables at {site.name}": [line for line in links.splitlines() if " vg" in line],
                f"trees at {site.name}": sorted(
                    one.name for one in directory.iterdir() if not one.name.startswith(".")
                ),
                f"tenancies at {site.name}": sorted(one.name for one in (directory / ".tenancies").glob("*")),
                f"pilots at {site.name}": sorted(one.name for one in pilots.glob("*")),
            }
        for name, slurm in self.slurms.items():
            told = slurm.say("scontrol", "--oneliner", "show", "reservation", check=True).stdout
            found[f"reservations at {name}"] = [line for line in told.splitlines() if "=vg_" in line]
        return {what: there for what, there in found.items() if there}


# -- what is left to read: pure ------------------------------------------------------------------


def timeline(lines: Sequence[JournalLine]) -> list[tuple[float, str]]:
    """The moments of a job, in seconds from its first line."""
    if not lines:
        return []
    began_s = lines[0].at_s
    nodes = {line.sandbox for line in lines if isinstance(line, NodeTold)}
    moments: list[tuple[float, str]] = []

    def when_all(state: str) -> float | None:
        reached: dict[str, float] = {}
        for line in lines:
            if isinstance(line, NodeTold) and line.state == state:
                reached.setdefault(line.sandbox, line.at_s)
        return max(reached.values()) if nodes and reached.keys() == nodes else None

    def add(at_s: float | None, what: str) -> None:
        if at_s is not None:
            moments.append((at_s - began_s, what))

    def first(true: Callable[[JournalLine], bool]) -> float | None:
        return next((line.at_s for line in lines if true(line)), None)

    def job(state: JobState) -> float | None:
        return first(lambda line: isinstance(line, JobTold) and line.state is state)

    add(job(JobState.RESERVING), "asked for")
    add(job(JobState.WAITING), "reserved: nodes, addresses, segment, bandwidth")
    add(job(JobState.MUSTERING), "the window begins: pilots are started")
    add(when_all("INITIAL"), f"all {len(nodes)} pilots have dialled in")
    add(when_all("HOST_READY"), "all sandboxes prepared, keys made")
    add(job(JobState.EQUIPPING), "addresses and keys of all gathered")
    add(job(JobState.LAUNCHING), "keys spread, all sandboxes run")
    add(job(JobState.RUNNING), "the program is started at the first node")
    add(first(lambda line: isinstance(line, Wrote)), "first output")
    add(first(lambda line: isinstance(line, Finished)), "the program has ended")
    add(job(JobState.OVER), "everything is removed and given back")
    return sorted(moments, key=lambda one: one[0])
