"""Many NodeManagers on one CRM: how fast its hub takes what they tell, and what their lines cost.

The hub is what a CRM meets its pilots with (``grid.pilots``, with claims on the disk), in a process of its
own. The NodeManagers are simulated, the conversation is not: tickets, HELLO, numbered notifications, and each
waits for acknowledgements as a real one does. They live in two more processes. What counts is what was
acknowledged.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from virtgrid.bench.result import Figure, figure
from virtgrid.core.errors import DeadlineError
from virtgrid.core.process import allow_files
from virtgrid.grid.claims import Claims
from virtgrid.grid.messages import ticket as tickets
from virtgrid.grid.messages.node import Hello, State, StateChanged, Status, Tell
from virtgrid.grid.messages.ticket import Ticket
from virtgrid.grid.pilots import PILOTS_LIMIT, Pilots
from virtgrid.lab.stage import Tell as Progress
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.line import Line
from virtgrid.wire.seal import new_key, private_text, read_private_key, write_private

_LOADERS: Final = 2
#: A NodeManager sends at most so many ahead of their acknowledgements, as the real one does in one go.
_AHEAD: Final = 64
_DEADLINE_S: Final = 120.0
_AT: Final = "2026-01-01T00:00:00Z"
_NOTE: Final = StateChanged(state=State.RUNNING, before=State.STARTING_UP, reason="", at=_AT).model_dump(
    mode="json"
)
#: Root has no tickets; nobody has this number.
_UID: Final = 4198


@dataclass(slots=True)
class HubSamples:
    """One value for each round. dialled_s: until all had been welcomed; cpu: of one processor, meanwhile."""

    count: int = 0
    dialled_s: list[float] = field(default_factory=list)
    notes_s: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    each_kib: list[float] = field(default_factory=list)


def figures(samples: HubSamples) -> tuple[Figure, ...]:
    """Pure."""
    of, count = statistics.median, samples.count
    return (
        figure(f"hub_notes_per_s_{count}", samples.notes_s, "1/s", of=of),
        figure("hub_cpu_share", samples.cpu, of=of),
        figure(f"hub_dialled_s_{count}", samples.dialled_s, "s", of=of),
        figure(f"hub_memory_mib_{count}", samples.memory_mib, "MiB", of=of),
        figure("hub_memory_each_kib", samples.each_kib, "KiB", of=of),
    )


def measure(count: int, rounds: int, seconds: float, directory: Path, tell: Progress) -> HubSamples:
    """So many NodeManagers, in each round with a hub of its own."""
    samples = HubSamples(count=count)
    directory.mkdir()
    for one in (directory, directory.parent):
        one.chmod(0o711)  # those who dial are not root
    key = directory / "crm.key"
    write_private(key, private_text(new_key()))
    for number in range(rounds):
        _round(count, seconds, directory / str(number), key, samples)
        told, memory = samples.notes_s[-1], samples.memory_mib[-1]
        tell(f"{count} NodeManagers, round {number + 1} of {rounds}: {told:,.0f} told/s, {memory:.0f} MiB")
    return samples


def _round(count: int, seconds: float, directory: Path, key: Path, samples: HubSamples) -> None:
    directory.mkdir(mode=0o711)
    with _program("hub", directory, key) as hub:
        _line_of(hub)
        empty = _rss_bytes(hub.pid)
        share = [count // _LOADERS + (number < count % _LOADERS) for number in range(_LOADERS)]
        began_s = time.monotonic()
        with _loaders(share, directory, key) as loaders:
            for one in loaders:
                _line_of(one)
            samples.dialled_s.append(time.monotonic() - began_s)
            cpu_s, told, from_s = _cpu_s(hub.pid), _told(loaders), time.monotonic()
            time.sleep(seconds)
            told, lasted_s = _told(loaders) - told, time.monotonic() - from_s
            samples.notes_s.append(told / lasted_s)
            samples.cpu.append((_cpu_s(hub.pid) - cpu_s) / lasted_s)
            full = _rss_bytes(hub.pid)
            samples.memory_mib.append(full / (1 << 20))
            samples.each_kib.append((full - empty) / count / 1024)


# -- the processes -------------------------------------------------------------------------------


@contextmanager
def _program(role: str, *words: object) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "virtgrid.bench.hub", role, *map(str, words)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _loaders(share: Sequence[int], directory: Path, key: Path) -> Iterator[list[subprocess.Popen[str]]]:
    first, *rest = share
    with _program("load", directory, key, sum(rest), first) as process:
        if not rest:
            yield [process]
            return
        with _loaders(rest, directory, key) as others:
            yield [process, *others]


def _line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise DeadlineError(f"a process of the bench ended: status {process.wait()}")
    return line


def _told(loaders: Sequence[subprocess.Popen[str]]) -> int:
    """How many notifications have been acknowledged by now."""
    for one in loaders:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    return sum(int(_line_of(one)) for one in loaders)


def _rss_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) * 1024


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _hub(directory: Path, key: Path) -> None:
    public: Ed25519PublicKey = read_private_key(key).public_key()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    where = Endpoint(directory / "hub.sock")
    async with Pilots(where, [public], claims=Claims(directory / "claims"), collects=False):
        print("ready", flush=True)
        await stop.wait()


class _NodeManager:
    """One that is simulated: says HELLO, then tells as fast as it is heard."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._sent = 0
        self.acknowledged = 0
        self._moved = asyncio.Event()

    async def hello(self, where: Endpoint, key: Ed25519PrivateKey, now_s: float) -> Line:
        name = f"nm{self._number}"
        ticket = Ticket(
            id=secrets.token_urlsafe(12), reservation="bench", sandbox=name, uid=os.getuid(),
            begins_at_s=now_s - 60, ends_at_s=now_s + 3600, memory_bytes=64 << 20,
        )  # fmt: skip
        status = Status(
            state=State.INITIAL, reason="", since=_AT, reservation="bench", sandbox=name, ends_at=_AT
        )
        hello = Hello(
            ticket=tickets.issue(ticket, key), session=secrets.token_urlsafe(12),
            incarnation=1, base=0, acknowledged=0, status=status,
        )  # fmt: skip
        line = await dial(where, self._heard, name="the hub")
        await line.call("HELLO", hello.model_dump(mode="json"), deadline_s=_DEADLINE_S)
        return line

    async def _heard(self, line: Line, method: str, params: Mapping[str, Any]) -> Any:
        self.acknowledged = int(params["number"])
        self._moved.set()
        return {}

    async def talk(self, line: Line) -> None:
        while True:
            while self._sent - self.acknowledged < _AHEAD:
                self._sent += 1
                said = Tell(number=self._sent, kind="state", body=_NOTE)
                await line.notify("TELL", said.model_dump(mode="json"))
            self._moved.clear()
            await self._moved.wait()


async def _load(directory: Path, key: Ed25519PrivateKey, first: int, count: int) -> None:
    where = Endpoint(directory / "hub.sock")
    managers = [_NodeManager(first + number) for number in range(count)]
    gate = asyncio.Semaphore(32)

    async def dialled(one: _NodeManager) -> Line:
        async with gate:
            return await one.hello(where, key, time.time())

    lines = await asyncio.gather(*map(dialled, managers))
    talking = [asyncio.create_task(one.talk(line)) for one, line in zip(managers, lines, strict=True)]
    print("ready", flush=True)
    questions = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(questions), sys.stdin
    )
    while await questions.readline():
        print(sum(one.acknowledged for one in managers), flush=True)
    for task in talking:
        task.cancel()


def _main(role: str, directory: str, key: str, *rest: str) -> None:
    allow_files(2 * PILOTS_LIMIT)
    if role == "hub":
        asyncio.run(_hub(Path(directory), Path(key)))
    else:
        first, count = map(int, rest)
        signing = read_private_key(Path(key))
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(_UID)
            os.setuid(_UID)
        asyncio.run(_load(Path(directory), signing, first, count))


if __name__ == "__main__":
    _main(*sys.argv[1:])
