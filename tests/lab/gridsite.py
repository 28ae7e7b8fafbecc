"""A lab site as a host of the grid: its virtgridd, its segment, its pilots, and what must not be left
behind.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from virtgrid.grid.messages import ticket as tickets
from virtgrid.grid.messages.node import Init
from virtgrid.grid.node import template
from virtgrid.lab.site import Site
from virtgrid.wire import seal
from virtgrid.wire.endpoint import Endpoint

TAG = 42
UID = 5001
ACCOUNT = "kenji"


@dataclass
class GridSite:
    """home: a directory everybody may enter, short enough for sockets."""

    site: Site
    home: Path
    key: Any
    orphan_s: float = 60.0
    virtgridd: subprocess.Popen[bytes] | None = None
    pilots: list[subprocess.Popen[bytes]] = field(default_factory=list)

    # -- before ----------------------------------------------------------------------------------

    def furnish(self, other: Site) -> None:
        """A segment over a VXLAN to the other site, and an account with a home."""
        here, there = self.site.wan_address, other.wan_address
        for words in (
            f"link add br{TAG} type bridge",
            f"link add vx{TAG} type vxlan id {TAG} local {here} remote {there} dstport 4789",
            f"link set vx{TAG} mtu 1500 master br{TAG} up",
            f"link set br{TAG} up",
        ):
            self.site.run(["ip", *words.split()])
        user_home = self.home / ACCOUNT
        user_home.mkdir(exist_ok=True)
        os.chown(user_home, UID, UID)
        line = f"{ACCOUNT}:x:{UID}:{UID}::{user_home}:/bin/bash"
        self.site.run(["sh", "-c", f"sed -i /^{ACCOUNT}:/d /etc/passwd; echo {line} >> /etc/passwd"])

    def unfurnish(self) -> None:
        for name in (f"vx{TAG}", f"br{TAG}"):
            self.site.run(["ip", "link", "del", name], check=False)

    # -- virtgridd -------------------------------------------------------------------------------

    @property
    def host_socket(self) -> Endpoint:
        return Endpoint(self.home / f"{self.site.name}.sock")

    def start_virtgridd(self) -> None:
        """And wait until it listens."""
        public = self.home / "crm.pub"
        public.write_text(seal.public_text(self.key.public_key()))
        words = [
            "serve", "host", "--crm-key", str(public), "--socket", str(self.host_socket),
            "--orphan-after", f"{self.orphan_s:g}s",
        ]  # fmt: skip
        log = (self.home / f"{self.site.name}-virtgridd.log").open("ab")
        before = log.tell()
        with log:
            self.virtgridd = subprocess.Popen(
                self.site.argv([sys.executable, "-m", "virtgrid.cli.main", *words]), stdout=log, stderr=log
            )
        deadline_s = time.monotonic() + 30
        while b"ready at" not in Path(log.name).read_bytes()[before:]:
            assert self.virtgridd.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline_s
            time.sleep(0.02)

    def kill_virtgridd(self, number: int = signal.SIGKILL) -> None:
        assert self.virtgridd is not None
        self.virtgridd.send_signal(number)
        self.virtgridd.wait(30)

    # -- pilots ----------------------------------------------------------------------------------

    def ticket(
        self, sandbox: str, *, lasts_s: float = 600, memory_mib: int = 256, site: str | None = None
    ) -> Path:
        """site: whose pilot, with a certificate to dial over TLS."""
        now_s = time.time()
        ticket = tickets.Ticket(
            id=tickets.new_id(), reservation="r-42", sandbox=sandbox, uid=UID, begins_at_s=now_s - 1,
            ends_at_s=now_s + lasts_s, memory_bytes=memory_mib << 20, processes=512,
        )  # fmt: skip
        path = self.home / f"{sandbox}.ticket"
        path.unlink(missing_ok=True)
        if site is None:
            text = tickets.issue(ticket, self.key)
        else:
            text = tickets.issue_file(ticket, self.key, site=site, now=datetime.now(UTC))
        seal.write_private(path, text)
        os.chown(path, UID, UID)
        return path

    def start_pilot(self, sandbox: str, crm: Endpoint) -> subprocess.Popen[bytes]:
        """As the queueing system would: an ordinary process of the user."""
        directory = self.home / ACCOUNT / f"pilot-{sandbox}"
        words = [
            "serve", "node", "--crm", str(crm), "--ticket", str(self.home / f"{sandbox}.ticket"),
            "--directory", str(directory), "--host", str(self.host_socket),
        ]  # fmt: skip
        with (self.home / f"{sandbox}.log").open("ab") as log:
            pilot = subprocess.Popen(
                self.site.argv(
                    ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups",
                     sys.executable, "-m", "virtgrid.cli.main", *words]
                ),
                stdout=log, stderr=log, cwd="/",
            )  # fmt: skip
        self.pilots.append(pilot)
        return pilot

    # -- after -----------------------------------------------------------------------------------

    def end(self) -> None:
        """End everything; sandboxes too, for the next test's sake when one has failed."""
        for process in [*self.pilots, *([self.virtgridd] if self.virtgridd else [])]:
            if process.poll() is None:
                process.kill()
                process.wait(30)
        for name in self.left()["directories"]:
            words = ["-m", "virtgrid.cli.main", "sandbox", "destroy", name]
            self.site.run([sys.executable, *words], check=False)
        shutil.rmtree(self.site.plan.root / "sandboxes/.tenancies", ignore_errors=True)

    def left(self) -> dict[str, Any]:
        """What is there of sandboxes: everything empty when nothing is left."""
        links = self.site.run(["ip", "-o", "link"]).stdout
        mounts = self.site.run(["cat", "/proc/mounts"]).stdout
        directory = self.site.plan.root / "sandboxes"
        return {
            "domains": {n: p for n, p in self.site.domains().items() if n.startswith("r42")},
            "veths": [line for line in links.splitlines() if " vg" in line],
            "mounts": [line for line in mounts.splitlines() if "/sandboxes/" in line],
            "directories": sorted(e.name for e in directory.iterdir() if not e.name.startswith(".")),
            "tenancies": sorted(e.name for e in (directory / ".tenancies").glob("*")),
            "processes": self._runners(),
        }

    def _runners(self) -> list[str]:
        found = []
        run = self.site.plan.run.stat()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    here = os.path.samestat((entry / "root/run").stat(), run)
                except OSError:
                    continue
                if here and any(word.endswith((b"runner.py", b"enter.py")) for word in words):
                    found.append(b" ".join(words).decode())
        return found

    async def until_nothing_left(self, *, timeout_s: float = 30) -> None:
        deadline_s = time.monotonic() + timeout_s
        left = self.left()
        while any(left.values()):
            assert time.monotonic() < deadline_s, left
            await asyncio.sleep(0.05)
            left = self.left()

    def init(self, number: int) -> Init:
        return Init(address=f"10.42.0.{number}", prefix=24, tag=TAG, user="gridu")


@contextmanager
def grid_hosts(pairs: Sequence[tuple[Site, Site]]) -> Iterator[list[GridSite]]:
    """Each pair's first site as a host of the grid, with a segment to the second; all of one CRM's key."""
    home = Path(tempfile.mkdtemp(prefix=f"vg{os.getpid()}-"))
    home.chmod(0o755)
    template.build()
    key = seal.new_key()
    hosts = [GridSite(here, home, key) for here, _ in pairs]
    try:
        for host, (_, there) in zip(hosts, pairs, strict=True):
            host.furnish(there)
            host.start_virtgridd()
        yield hosts
    finally:
        for host in hosts:
            host.end()
            host.unfurnish()
        shutil.rmtree(home)


def last_lines(paths: Sequence[Path]) -> str:
    return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-2000:]}" for path in paths)
