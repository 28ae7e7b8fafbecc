"""Slurm from Debian's packages: munged, slurmctld and some slurmd, on loopback, in a directory of their own.

Several may run on one machine. Nothing is read from /etc; who lacks the key that is made for each is not
heard. What is made is known to the keeper process (keeper.py), which ends it all when its owner is gone. The
nodes are one host, so their jobs share it.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar

from virtgrid.core.errors import DeadlineError, LabError, RefusedError
from virtgrid.lab import processes

T = TypeVar("T")

NODES: Final = ("n1", "n2", "n3", "n4")
CONTROLLER: Final = "slurmctld"
#: Programs and the Debian packages they come from (packages.txt).
PROGRAMS: Final = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "scontrol": "slurm-client",
    "munged": "munge",
}
_PATH: Final = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
# The first process of the pid namespace does nothing; with SIGCHLD ignored the kernel reaps what it inherits.
_INIT: Final = (
    "setpriv", "--pdeathsig", "KILL", "--",
    "unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc",
    "env", "--ignore-signal=CHLD", "sleep", "infinity",
)  # fmt: skip
_START_S: Final = 60.0
_END_S: Final = 30.0
_PROBE_S: Final = 0.05

_CONFIGURATION: Final = """ClusterName=virtgrid
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={directory}/jobs.txt
MpiDefault=none
SelectType=select/cons_tres
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5
ReturnToService=2
InactiveLimit=0
KillWait=2
NodeName=DEFAULT CPUs=1 RealMemory=100 State=UNKNOWN
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def obstacle() -> str | None:
    """Why this user on this machine cannot have a Slurm of their own; None when nothing is in the way."""
    if os.geteuid() != 0:
        return "a private Slurm needs root: slurmd starts jobs as their users"
    missing = sorted({package for name, package in PROGRAMS.items() if not shutil.which(name, path=_PATH)})
    if missing:
        return f"Debian packages are missing: {', '.join(missing)} (tools/setup installs them)"
    return None


class Cluster:
    """A Slurm that exists until ``close``; use as a context manager. nodes: their names.

    there: makes of a command line the one that runs it where the Slurm is to be, at a site of a lab, say.

    Errors: RefusedError (``obstacle``), LabError when a daemon does not start.
    """

    def __init__(
        self, nodes: Sequence[str] = NODES, *, there: Callable[[Sequence[str]], list[str]] = list
    ) -> None:
        if reason := obstacle():
            raise RefusedError(reason, hint="make setup" if os.geteuid() == 0 else "run it with sudo")
        self.nodes, self._there = tuple(nodes), there
        self.directory = Path(tempfile.mkdtemp(prefix="vg-slurm-"))
        self.directory.chmod(0o755)  # jobs run as their users, and their scripts lie below
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = [_held_port() for _ in range(1 + len(self.nodes))]
        # A session of its own: Ctrl-C at a terminal is the owner's business.
        self._keeper = subprocess.Popen(
            [sys.executable, "-m", "virtgrid.lab.slurm.keeper", str(self.directory), *there(_INIT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            env={"PATH": _PATH, "PYTHONPATH": str(Path(__file__).parents[3])},
        )
        try:
            self._init = self._first_process()
            self._write_files()
            self._start_munged()
            for name in (CONTROLLER, *self.nodes):
                self.start(name)
            self.wait_idle()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def configuration(self) -> Path:
        """slurm.conf, what SLURM_CONF names."""
        return self.directory / "slurm.conf"

    def close(self) -> None:
        """End everything of it, jobs as well, and remove its directory."""
        if self._keeper.stdin is not None and not self._keeper.stdin.closed:
            self._keeper.stdin.close()
        self._keeper.wait(_END_S)
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait(_END_S)
        for held in self._ports:
            held.close()
        if self._keeper.stdout is not None:
            self._keeper.stdout.close()

    # -- its daemons ---------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """slurmctld, or the slurmd of a node; it answers some time later."""
        words = ["slurmctld", "-D"] if name == CONTROLLER else ["slurmd", "-D", "-N", name]
        self._spawn(name, [*words, "-f", str(self.configuration)])

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Signal a daemon and wait for its end."""
        processes.send(self._pid(name), signal.Signals(number))
        self._daemons.pop(name).wait(_END_S)

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """It takes calls and answers none for as long as this lasts."""
        pid = self._pid(name)
        processes.send(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            processes.send(pid, signal.SIGCONT)
            # nsenter stops itself with what it waits for.
            self._daemons[name].send_signal(signal.SIGCONT)

    def wait_answering(self) -> None:
        """Until slurmctld answers. Errors: DeadlineError."""
        self._until(lambda: self.say("scontrol", "ping").returncode == 0, "slurmctld does not answer")

    def wait_idle(self) -> None:
        """Until all nodes wait for work. Errors: DeadlineError."""
        self._until(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), "its nodes are not idle")

    def wait_job(self, job: str, state: str) -> None:
        """Until a job is in a state. Errors: DeadlineError."""
        words = ("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")
        self._until(lambda: self.say(*words).stdout.strip() == state, f"job {job} is not {state}")

    def _pid(self, name: str) -> int:
        """Of the daemon itself; what was started is nsenter, which waits for it."""
        parent = self._daemons[name].pid
        return self._until(
            lambda: next((pid for pid, of in processes.parents().items() if of == parent), None),
            f"{name} is not there",
        )

    # -- asking it, as an administrator would --------------------------------------------------

    def say(self, *words: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's programs. Errors: LabError with ``check``, when it failed."""
        done = subprocess.run(
            self._there(words), env=dict(self._environment()), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=_START_S, check=False,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise LabError(f"{' '.join(words)} failed", cause=done.stderr.strip()[-500:])
        return done

    def states(self) -> dict[str, str]:
        """Of each node what sinfo calls its state; empty while nobody answers."""
        lines = self.say("sinfo", "--noheader", "--Node", "--format=%N %T").stdout.splitlines()
        return dict(line.split(" ", 1) for line in lines)

    # ------------------------------------------------------------------------------------------

    def _environment(self) -> Mapping[str, str]:
        return {"PATH": _PATH, "LC_ALL": "C.UTF-8", "TZ": "UTC", "SLURM_CONF": str(self.configuration)}

    def _first_process(self) -> int:
        """The first process of the pid namespace, as it is called outside."""
        assert self._keeper.stdout is not None
        descriptor = self._keeper.stdout.fileno()
        told = os.read(descriptor, 100) if select.select([descriptor], [], [], _START_S)[0] else b""
        if not told.strip().isdigit():
            raise LabError("the keeper of the private Slurm did not start")
        unshare = int(told)

        def sleeps() -> int | None:
            children = [pid for pid, parent in processes.parents().items() if parent == unshare]
            names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in children}
            return next((pid for pid, name in names.items() if name == "sleep"), None)

        return self._until(sleeps, "no pid namespace was made")

    def _write_files(self) -> None:
        for name in ("state", "spool", *(f"spool/{node}" for node in self.nodes)):
            (self.directory / name).mkdir(mode=0o755)
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        port, *ports = (held.getsockname()[1] for held in self._ports)
        host = self.say("uname", "-n", check=True).stdout.strip().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={at}"
            for node, at in zip(self.nodes, ports, strict=True)
        )
        text = _CONFIGURATION.format(host=host, port=port, directory=self.directory, nodes=nodes)
        self.configuration.write_text(text)

    def _start_munged(self) -> None:
        where = self.directory
        self._spawn(
            "munged",
            [
                "munged", "--foreground", "--force", f"--socket={where}/munge.sock",
                f"--key-file={where}/munge.key", f"--pid-file={where}/munged.pid",
                f"--seed-file={where}/munged.seed", f"--log-file={where}/munged.log",
            ],
        )  # fmt: skip
        self._until(lambda: (where / "munge.sock").exists(), "munged does not start")

    def _spawn(self, name: str, words: Sequence[str]) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["nsenter", f"--target={self._init}", "--pid", "--mount", "--net", "--uts", "--", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={"PATH": _PATH, "LC_ALL": "C.UTF-8"},
            )

    def _until(self, told: Callable[[], T | None], problem: str) -> T:
        """What is told once it is something. Errors: LabError when a daemon ended, DeadlineError."""
        deadline_s = time.monotonic() + _START_S
        while not (found := told()):
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise LabError(f"{name} of the private Slurm ended", cause=self._tail(name))
            if time.monotonic() > deadline_s:
                raise DeadlineError(f"the private Slurm is not up: {problem}", cause=self._tail(CONTROLLER))
            time.sleep(_PROBE_S)
        return found

    def _tail(self, name: str) -> str:
        log = self.directory / f"{name}.log"
        return log.read_text(errors="replace").strip()[-800:] if log.exists() else "it said nothing"


def _held_port() -> socket.socket:
    """A port of loopback that stays ours: bound and never listened at.

    Slurm's daemons set SO_REUSEADDR, as this does once it has the port, so they can listen there; nobody
    else who looks for a free port gets it.
    """
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return held
