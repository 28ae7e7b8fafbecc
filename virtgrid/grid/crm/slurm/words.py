"""What Slurm's programs are asked, and what they answer: argument lists and readers. Pure.

Sources: scontrol(1), sbatch(1), squeue(1), sinfo(1) of Slurm 22.05. scontrol has no structured output there,
so reservations are read from its one-line form; of nodes and jobs only the fields that are needed are asked
for, with what a user could have chosen left out or put last. Times are UTC: ``tools`` sees to that.

Names are all that ties Slurm's things to ours: a reservation is ``vg_SITE_KEY``, a pilot's job
``vg_SITE_KEY_SANDBOX``. A site's name has no underscore, nor has a sandbox's, so both can be taken apart.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from virtgrid.core.errors import RefusedError
from virtgrid.grid.messages.coalloc import Window

HOSTS_LIMIT: Final = 1 << 16
#: What sinfo calls a node that can be given out (now or later); else it is a problem. A suffix says more.
_FIT: Final = frozenset(
    {
        "idle", "allocated", "mixed", "completing", "reserved", "planned", "maint", "power_down",
        "powered_down", "powering_down", "powering_up", "reboot_issued", "reboot_requested",
    }
)  # fmt: skip
_SILENT: Final = "*"
_SUFFIXES: Final = "*~#!%$@^-+"
#: slurmctld has been restarted and not heard of the node yet.
_NOT_KNOWN: Final = "unknown"
#: squeue's states of jobs that wait or run.
ACTIVE: Final = frozenset(
    {
        "PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "SIGNALING", "STAGE_OUT",
        "REQUEUED", "REQUEUE_HOLD", "RESIZING", "RESV_DEL_HOLD", "SPECIAL_EXIT",
    }
)  # fmt: skip
_KEY: Final = r"[A-Za-z0-9_-]{8,64}"


# -- names ---------------------------------------------------------------------------------------


def reservation_name(site: str, hold: str) -> str:
    """How the reservation of a hold is called: the same whoever asks, so it is found again."""
    return f"vg_{site}_{hold}"


def hold_of(site: str, reservation: str) -> str | None:
    """The key of the hold that a reservation is for; None when it is none of this site's."""
    found = re.fullmatch(rf"vg_{re.escape(site)}_({_KEY})", reservation)
    return None if found is None else found[1]


def job_name(site: str, hold: str, sandbox: str) -> str:
    return f"{reservation_name(site, hold)}_{sandbox}"


# -- what is asked -------------------------------------------------------------------------------


def create(
    name: str, nodes: Iterable[str], *, begins_at_s: int, ends_at_s: int, users: Iterable[str]
) -> list[str]:
    """An advance reservation of whole nodes. Slurm knows its length in minutes and its ends in seconds."""
    return [
        "scontrol", "create", "reservation", f"ReservationName={name}",
        f"StartTime={stamp(begins_at_s)}", f"EndTime={stamp(ends_at_s)}",
        f"Nodes={','.join(nodes)}", f"Users={','.join(users)}",
    ]  # fmt: skip


def let_in(name: str, users: Iterable[str]) -> list[str]:
    """Who may submit jobs into a reservation, from now on."""
    return ["scontrol", "update", f"ReservationName={name}", f"Users={','.join(users)}"]


def delete(name: str) -> list[str]:
    return ["scontrol", "delete", f"ReservationName={name}"]


def ask_reservations() -> list[str]:
    return ["scontrol", "--oneliner", "show", "reservation"]


def ask_nodes(nodes: Iterable[str]) -> list[str]:
    return ["sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%T|%E"]


def ask_allocations(nodes: Iterable[str]) -> list[str]:
    """Whose jobs have nodes, and until when at most. Nothing of it is a user's own choice of words."""
    return [
        "squeue", "--noheader", f"--nodelist={','.join(nodes)}",
        "--states=CONFIGURING,RUNNING,SUSPENDED,COMPLETING", "--format=%i|%e|%v|%N",
    ]  # fmt: skip


def ask_jobs(names: Iterable[str], *, ended: bool = False) -> list[str]:
    """The jobs of these names. ended: also those that are over and that Slurm still remembers."""
    states = ["--states=all"] if ended else []
    return ["squeue", "--noheader", f"--name={','.join(names)}", *states, "--format=%i|%T|%S|%e|%U|%v|%j"]


def submit(
    *, name: str, reservation: str, node: str, user: str, group: int, minutes: int, log: str, comment: str,
    partition: str | None,
) -> list[str]:  # fmt: skip
    """A batch job on one whole node, as this user. The script comes on standard input."""
    return [
        "sbatch", "--parsable", "--quiet", f"--uid={user}", f"--gid={group}",
        f"--reservation={reservation}", f"--job-name={name}", f"--comment={comment}",
        "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--exclusive", "--mem=0", f"--time={minutes}",
        "--no-requeue", "--propagate=NONE", "--export=ALL", "--chdir=/",
        "--input=/dev/null", f"--output={log}", "--open-mode=append",
        *([f"--partition={partition}"] if partition else []),
    ]  # fmt: skip


def cancel(jobs: Iterable[int]) -> list[str]:
    """SIGTERM, and after Slurm's KillWait SIGKILL."""
    return ["scancel", *map(str, jobs)]


def script(program: Sequence[str]) -> bytes:
    """A batch script that becomes the program; Python, so that no word of it is read by a shell."""
    return f"#!/usr/bin/python3 -I\nimport os\nos.execv({program[0]!r}, {list(program)!r})\n".encode()


def stamp(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")


# -- what is answered ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """An advance reservation, anybody's."""

    name: str
    begins_at_s: int
    ends_at_s: int
    nodes: frozenset[str]
    users: tuple[str, ...]

    def covers(self, nodes: Iterable[str], window: Window, now_s: int) -> bool:
        """Whether all that is left of a window is reserved on these nodes."""
        begins_s = max(window.begins_at_s, now_s)
        times = self.begins_at_s <= begins_s and window.ends_at_s <= self.ends_at_s
        return times and self.nodes >= set(nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Nodes that a job has, and until when at most. reservation: the one it runs in, or empty."""

    job: str
    ends_at_s: int | None
    reservation: str
    nodes: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job of one of our names. began_s, ended_s: None while it is not known."""

    id: int
    state: str
    began_s: int | None
    ended_s: int | None
    uid: int
    reservation: str
    name: str

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeState:
    """A node's state as sinfo calls it, and why somebody took it away."""

    state: str
    reason: str

    @property
    def known(self) -> bool:
        return self.state.rstrip(_SUFFIXES) != _NOT_KNOWN

    @property
    def problem(self) -> str | None:
        """Why nothing can run there; None: it can."""
        word = self.state.rstrip(_SUFFIXES)
        if word == _NOT_KNOWN:
            return "Slurm has not heard of it yet"
        if word in _FIT and _SILENT not in self.state:
            return None
        said = f": {self.reason}" if self.reason not in ("", "none") else ""
        what = "does not answer" if word in _FIT else f"is {word}"
        return f"{what}{said}"[:200]


def read_reservations(text: str) -> list[Reservation]:
    """Errors: RefusedError. What has no nodes, or licences only, is none of ours to mind."""
    found = []
    for line in text.splitlines():
        fields: dict[str, str] = {}
        for key, value in re.findall(r"(?:^|\s)(\w+)=(\S*)", line):
            fields.setdefault(key, value)
        if "ReservationName" not in fields or fields.get("Nodes") in (None, "", "(null)"):
            continue
        begins_s, ends_s = _time(fields.get("StartTime", "")), _time(fields.get("EndTime", ""))
        if begins_s is None or ends_s is None:
            raise _unreadable("scontrol", line)
        users = fields.get("Users", "(null)")
        found.append(
            Reservation(
                name=fields["ReservationName"],
                begins_at_s=begins_s,
                ends_at_s=ends_s,
                nodes=hosts(fields["Nodes"]),
                users=() if users == "(null)" else tuple(users.split(",")),
            )
        )
    return found


def read_nodes(text: str) -> dict[str, NodeState]:
    """By name. A node of several partitions is told several times."""
    found: dict[str, NodeState] = {}
    for line in text.splitlines():
        name, bar, rest = line.partition("|")
        state, _, reason = rest.partition("|")
        if bar and state:
            found.setdefault(name, NodeState(state=state.strip(), reason=reason.strip()))
    return found


def read_allocations(text: str) -> list[Allocation]:
    """Errors: RefusedError."""
    found = []
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) != 4:
            raise _unreadable("squeue", line)
        job, ends, reservation, nodes = fields
        found.append(
            Allocation(
                job=job, ends_at_s=_time(ends), reservation=_or_nothing(reservation), nodes=hosts(nodes)
            )
        )
    return found


def read_jobs(text: str) -> list[Job]:
    """In the order of their ids. Errors: RefusedError."""
    found = []
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) != 7 or not fields[0].isdigit() or not fields[4].isdigit():
            raise _unreadable("squeue", line)
        id_, state, began, ended, uid, reservation, name = fields
        found.append(
            Job(
                id=int(id_),
                state=state,
                began_s=_time(began),
                ended_s=_time(ended),
                uid=int(uid),
                reservation=_or_nothing(reservation),
                name=name,
            )
        )
    return sorted(found, key=lambda job: job.id)


def hosts(text: str) -> frozenset[str]:
    """``n[1-3,7],m1`` -> the names. Errors: RefusedError."""
    found: set[str] = set()
    for word in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        parts = [_numbers(part) for part in re.findall(r"\[[^\]]*\]|[^\[\]]+", word)]
        for combination in itertools.islice(itertools.product(*parts), HOSTS_LIMIT + 1):
            found.add("".join(combination))
        if len(found) > HOSTS_LIMIT:
            raise _unreadable("a list of nodes", text)
    return frozenset(found)


def _numbers(part: str) -> list[str]:
    """``[08-10,12]`` -> 08, 09, 10, 12; anything without brackets is itself."""
    if not part.startswith("["):
        return [part]
    found: list[str] = []
    for piece in part[1:-1].split(","):
        ends = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", piece)
        if ends is None:
            raise _unreadable("a list of nodes", part)
        first, last = ends[1], ends[2] or ends[1]
        if int(last) - int(first) >= HOSTS_LIMIT:
            raise _unreadable("a list of nodes", part)
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return found


def _time(text: str) -> int | None:
    """Seconds since the epoch; None for what has no time (yet)."""
    try:
        return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())
    except (ValueError, OverflowError):
        return None


def _or_nothing(text: str) -> str:
    return "" if text in ("(null)", "N/A") else text


def _unreadable(who: str, what: str) -> RefusedError:
    return RefusedError(
        f"{who} said what cannot be read", cause=what[:200], hint="is it Slurm 22.05 or later?"
    )
