"""Migrations in a lab, broken on purpose: start one, wait for its phases, look what is left.

A ``Stage`` is one guest in one lab that wanders between two sites: after a migration that arrived
the next one goes the other way, so a clean second migration costs a few seconds, not a boot.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtgrid.core import journal as journals
from virtgrid.core.errors import DeadlineError, LabError, NotFoundError
from virtgrid.core.events import TERMINAL, Record
from virtgrid.lab import faults, guest
from virtgrid.lab.guest import GuestSpec
from virtgrid.lab.lab import Lab
from virtgrid.lab.site import Site
from virtgrid.migration import control, running
from virtgrid.net import netns

VIRTGRID = Path(sys.executable).with_name("virtgrid")
#: Not QEMU's own 300 ms, so that "as before" cannot be mistaken for "as new".
DOWNTIME_MS = 250
PATIENCE_S = 90.0
_POLL_S = 0.02

# A client with a request that is never finished; a byte now and then keeps it from being idle.
_HALF_A_REQUEST = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], 80), timeout=20)
peer.sendall(b"GET / HTTP/1.1\\r\\nHost: guest\\r\\nX-Slow: ")
print("asking", flush=True)
while True:
    time.sleep(0.3)
    try:
        peer.sendall(b"a")
    except OSError:
        time.sleep(0.3)
"""


def until(found: Any, what: str, *, deadline_s: float = PATIENCE_S) -> Any:
    """Ask ``found()`` until it is true, and return that; AssertionError after the deadline."""
    end_s = time.monotonic() + deadline_s
    while not (value := found()):
        assert time.monotonic() < end_s, f"not within {deadline_s:g} s: {what}"
        time.sleep(_POLL_S)
    return value


@dataclass
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines() if line.startswith("{")]

    @property
    def last(self) -> dict[str, Any]:
        """The last JSON line."""
        assert self.lines, f"status {self.status}, said: {self.out!r} {self.err!r}"
        return self.lines[-1]


@dataclass
class Migration:
    """A running ``virtgrid migrate --json`` and the journal its worker writes."""

    stage: Stage
    process: subprocess.Popen[str]
    journal: Path
    _follower: journals.Follower
    records: list[Record] = field(default_factory=list)
    _buried: bool = False

    @property
    def id(self) -> str:
        return self.journal.stem

    @property
    def worker_pid(self) -> int:
        return int(self.all()[0]["pid"])

    def all(self) -> list[Record]:
        if not self._buried:
            self.records += self._follower.poll()
        return self.records

    def phases(self) -> list[str]:
        return [str(record["phase"]) for record in self.all() if record.event == "phase"]

    def wait_for(self, event: str, **fields: Any) -> Record:
        """The first record of this event with these fields; fails when the migration ends without it."""

        def found() -> Record | None:
            for record in self.all():
                if record.event == event and all(record.get(key) == value for key, value in fields.items()):
                    return record
            ended = [record for record in self.records if record.event in TERMINAL]
            assert not ended, f"ended without {event} {fields}: {ended[-1].as_dict()}"
            return None

        return until(found, f"{event} {fields} in the journal")

    def wait_for_phase(self, phase: str) -> Record:
        return self.wait_for("phase", phase=phase)

    def last(self, event: str) -> Record:
        """The last record of this event, of a migration that has ended."""
        return [record for record in self.all() if record.event == event][-1]

    def end(self, *, deadline_s: float = PATIENCE_S) -> Ended:
        """Wait for the command's end."""
        out, err = self.process.communicate(timeout=deadline_s)
        return Ended(self.process.returncode, out, err)

    def bury(self) -> None:
        """Nothing of it runs any more, whatever became of the test."""
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=1)
        if self.process.poll() is None:
            if not any(record.event in TERMINAL for record in self.all()):
                with contextlib.suppress(OSError):
                    self.kill_worker()
            self.process.kill()
            self.process.wait()
        self.all()
        self._buried = True
        self._follower.close()

    def let_go(self) -> None:
        """Release it now: by the time a command has begun the switchover may be over."""
        uuid = str(self.all()[0]["uuid"])
        control.ask(self.stage.home / "run" / running.socket_path(uuid).name, "release", by="a test")

    def kill_worker(self) -> None:
        """kill -9 what drives the migration (not what shows it), unless it was through before."""
        pid = self.worker_pid
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            assert select.select([handle], [], [], 20)[0], "the worker does not die"
        finally:
            os.close(handle)


@dataclass
class Stage:
    """One guest, in one lab, on one of two sites."""

    lab: Lab
    spec: GuestSpec
    home: Path
    here: str = "alice"
    there: str = "bob"
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def program(self) -> Path:
        return VIRTGRID

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def source(self) -> Site:
        return self.lab.site(self.here)

    @property
    def target(self) -> Site:
        return self.lab.site(self.there)

    @property
    def target_image(self) -> Path:
        return self.target.images / self.spec.disk_name

    @property
    def environment(self) -> dict[str, str]:
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("VIRTGRID_", "LIBVIRT_")) and key not in ("PYTEST_CURRENT_TEST",)
        }
        return inherited | {
            "VIRTGRID_STATE_DIR": str(self.home / "state"),
            "VIRTGRID_RUN_DIR": str(self.home / "run"),
            "VIRTGRID_DEBUG": "1",
            **self.variables,
        }

    # --- commands -----------------------------------------------------------------------

    def virtgrid(self, *words: str, deadline_s: float = PATIENCE_S) -> Ended:
        """A virtgrid command at the source, to its end."""
        done = subprocess.run(
            self.source.argv([str(VIRTGRID), *words]),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def words(self, *options: str, uri: str | None = None) -> list[str]:
        chosen = ["--copy-storage-all", "--persistent", "--undefinesource", "--json"]
        return ["migrate", self.name, uri or f"qemu+tcp://{self.there}/system", *chosen, *options]

    def migrate(self, *options: str, uri: str | None = None, keep_target: bool = False) -> Ended:
        """A whole migration."""
        if not keep_target:
            self.target_image.unlink(missing_ok=True)
        return self.virtgrid(*self.words(*options, uri=uri), deadline_s=180)

    def command(self, *options: str) -> list[str]:
        """A migration as a person at a terminal starts it.

        A test run in the background of a shell inherits an ignored SIGINT, which Python keeps: Ctrl-C
        would then do nothing.
        """
        return self.source.argv(["env", "--default-signal=INT", str(VIRTGRID), *self.words(*options)])

    def start(self, *options: str, keep_target: bool = False) -> Migration:
        """Start a migration and return as soon as it has a journal."""
        if not keep_target:
            self.target_image.unlink(missing_ok=True)
        directory = self.home / "state" / "migrations"
        before = set(directory.glob("*.jsonl"))
        process = subprocess.Popen(
            self.command(*options),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

        def appeared() -> Path | None:
            new = [path for path in directory.glob("*.jsonl") if path not in before and path.stat().st_size]
            if not new and process.poll() is not None:
                raise AssertionError(f"no migration began: {process.communicate()}")
            return new[0] if new else None

        journal = until(appeared, "a journal")
        return Migration(self, process, journal, journals.Follower(journal))

    @contextlib.contextmanager
    def occupied(self) -> Iterator[None]:
        """A client whose request is outstanding for as long as this lasts."""
        client = subprocess.Popen(
            self.lab.client.argv([sys.executable, "-I", "-c", _HALF_A_REQUEST, self.spec.address]),
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert client.stdout is not None
            assert client.stdout.readline().strip() == "asking"
            yield
        finally:
            client.kill()
            client.communicate()

    @contextlib.contextmanager
    def caught_in(self, phase: str, *options: str, keep_target: bool = False) -> Iterator[Migration]:
        """A migration in this phase (storage, precopy or hold); it cannot complete while this lasts.

        In storage the disk is being copied: both QEMUs run.
        """
        slow = ["--bandwidth", "8"] if phase == "storage" else []
        migration = self.start(
            "--policy", "strict", "--max-wait", "forever", *slow, *options, keep_target=keep_target
        )
        try:
            migration.wait_for_phase("storage")
            if phase == "storage":
                migration.wait_for("storage")
                yield migration
                return
            with self.occupied():  # the capture has begun: it sees this client from the first frame on
                migration.wait_for_phase(phase)
                if phase == "hold":
                    migration.wait_for("hold")
                yield migration
        finally:
            migration.bury()

    # --- looking ------------------------------------------------------------------------

    def virsh(self, site: str, *words: str, stdin: str = "") -> str:
        return guest.virsh(self.lab.site(site), *words, stdin=stdin)

    def state(self, site: str) -> str:
        """What a site's libvirtd says of the domain: running, paused, shut off, or nothing."""
        try:
            return guest.virsh(self.lab.site(site), "domstate", self.name).strip()
        except LabError as error:
            if "failed to get domain" in (error.cause or ""):
                return ""
            raise

    @property
    def uuid(self) -> str:
        return guest.virsh(self.source, "domuuid", self.name).strip()

    def downtime_ms(self) -> int:
        return round(float(guest.virsh(self.source, "migrate-getmaxdowntime", self.name).split()[0]))

    def pools(self, site: str) -> list[str]:
        names = guest.virsh(self.lab.site(site), "pool-list", "--all", "--name").split()
        return [name for name in names if name.startswith("virtgrid-")]

    def locked(self) -> list[str]:
        """Locks in the run directory somebody still holds."""
        held = []
        for path in (self.home / "run").glob("*.lock"):
            with path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    held.append(path.name)
        return held

    def ticklers(self) -> list[str]:
        """Processes that tickle this guest."""
        found = self._running("virtgrid.net.tickle").values()
        return [" ".join(words) for words in found if self.spec.mac in words]

    def flippers(self) -> list[int]:
        """Processes that flip guests of this lab."""
        return list(self._running("virtgrid.migration.flipper"))

    def _running(self, module: str) -> dict[int, list[str]]:
        """The command lines of a module's processes in this lab (another has guests of the same name)."""
        here = {netns.identity(netns.path(site.netns)) for site in self.lab.sites}
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().decode(errors="replace").split("\0")
                if module in words and netns.identity(path.with_name("ns") / "net") in here:
                    found[int(path.parent.name)] = words
        return found

    def answers(self) -> None:
        guest.wait_answering(self.lab, self.spec, deadline_s=30)

    def check_safe_at_source(self) -> None:
        """The guest runs here and only here, whole and answering, and nothing else is left."""
        self._check_place(self.here, self.there)
        assert not self.target_image.exists(), f"{self.target_image} was left behind"
        assert self.downtime_ms() == DOWNTIME_MS
        asked = '{"execute": "query-migrate-parameters"}'
        parameters = json.loads(self.virsh(self.here, "qemu-monitor-command", self.name, asked))["return"]
        assert parameters["max-bandwidth"] > 1 << 20, "the clamp was left behind"
        assert parameters["avail-switchover-bandwidth"] == 0, "what QEMU is to believe was left behind"

    def check_moved(self) -> None:
        """The guest runs there and only there; from now on there is here."""
        self._check_place(self.there, self.here)
        self.here, self.there = self.there, self.here
        self.remember_downtime()

    def _check_place(self, on: str, off: str) -> None:
        assert self.state(on) == "running"
        assert self.state(off) in ("", "shut off")
        assert faults.qemu_pid(self.lab.site(on), self.name) is not None
        assert faults.qemu_pid(self.lab.site(off), self.name) is None
        self.answers()
        until(lambda: not self.ticklers(), "no tickler any more", deadline_s=5)
        assert self.locked() == []
        assert not list((self.home / "run").glob("*.sock"))
        for site in (on, off):
            assert self.pools(site) == []
        job = guest.virsh(self.lab.site(on), "domjobinfo", self.name)
        assert "None" in job, job

    def remember_downtime(self) -> None:
        guest.virsh(self.source, "migrate-setmaxdowntime", self.name, str(DOWNTIME_MS))

    def mend(self, *, guest_too: bool = True) -> None:
        """The lab whole again; the guest too, booted anew when it is not in exactly one place."""
        Lab.up(self.lab.config)
        self.lab.restore_wan()
        for site in (self.source, self.target):
            faults.unlimit_disk(site)
        if not guest_too:
            return
        found = {site: self.state(site) for site in (self.here, self.there)}
        if found[self.here] == "running" and found[self.there] in ("", "shut off"):
            self.remember_downtime()
            return
        self.forget()
        self.boot()

    def forget(self) -> None:
        """No such guest at either site."""
        for where in (self.here, self.there):
            self._end(where)
            with contextlib.suppress(LabError):
                self.virsh(where, "undefine", self.name)
            (self.lab.site(where).images / self.spec.disk_name).unlink(missing_ok=True)

    def _end(self, where: str) -> None:
        """It runs there no more; a libvirtd that cannot end it is started anew, beside a dead QEMU.

        So that one test's broken libvirtd is not the failure of all that follow.
        """
        with contextlib.suppress(LabError, DeadlineError):
            self.virsh(where, "destroy", self.name)
        if self.state(where) in ("", "shut off"):
            return
        site = self.lab.site(where)
        with contextlib.suppress(NotFoundError):
            faults.kill_qemu(site, self.name)
        with contextlib.suppress(NotFoundError):
            faults.kill_libvirtd(site)
        faults.restore_libvirtd(site)
        until(lambda: self.state(where) in ("", "shut off"), f"{where} without {self.name}")

    def boot(self) -> None:
        """Start the guest here and wait until it serves."""
        guest.boot(self.lab, self.here, self.spec)
        guest.wait_answering(self.lab, self.spec, deadline_s=PATIENCE_S)
        self.remember_downtime()

    def check_clean_migration(self) -> None:
        """What was broken left nothing in the way: the same domain migrates now."""
        ended = self.migrate("--policy", "immediate", "--verify-timeout", "5")
        assert ended.status == 0, ended.last
        assert ended.last["event"] == "finished"
        self.check_moved()


@contextlib.contextmanager
def staged(lab: Lab, home: Path, spec: GuestSpec) -> Iterator[Stage]:
    """Boot the guest at alice; it is gone from both sites afterwards."""
    stage = Stage(lab, spec, home)
    try:
        stage.boot()
        yield stage
    finally:
        stage.forget()
