"""A lab with guests in it that wander between two sites: what demo and bench play on.

The migrations are made as an administrator makes them, by ``virtgrid migrate --json`` at the site
where the guest is, and followed line by line.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from virtgrid.core.errors import DeadlineError, LabError, MigrationFailedError
from virtgrid.core.events import Record
from virtgrid.core.journal import parse_line
from virtgrid.lab import guest
from virtgrid.lab.guest import GuestSpec
from virtgrid.lab.lab import Lab, take_down
from virtgrid.lab.layout import LabConfig
from virtgrid.lab.network import VIRTGRID
from virtgrid.report.timeline import Timeline

Tell = Callable[[str], None]
OnRecord = Callable[[Record], None]

BOOT_S: Final = 90.0
#: A migration of a small guest that takes longer is broken, or its link is far slower than asked for.
MIGRATION_S: Final = 600.0
_TICK_S: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Journey:
    """One migration that arrived: its journal, and what the WAN carried meanwhile.

    wan: bytes on the wire by moment: ``begin``, ``hold``, ``released``, ``end``; those that were seen.
    """

    source: str
    destination: str
    records: tuple[Record, ...]
    wan: Mapping[str, int]

    @property
    def timeline(self) -> Timeline:
        return Timeline.from_records(self.records)

    @property
    def end(self) -> Record:
        return self.records[-1]

    def first(self, event: str, **fields: Any) -> Record | None:
        """The first record of an event with these fields."""
        return next(
            (
                record
                for record in self.records
                if record.event == event and all(record.get(key) == value for key, value in fields.items())
            ),
            None,
        )

    @property
    def sent_bytes(self) -> int:
        """What the WAN carried from the first to the last line, in both directions."""
        return self.wan["end"] - self.wan["begin"]

    def wall_s(self, record: Record) -> float:
        """A record's moment on the hosts' wall clock, which QEMU's stamps are on.

        ``at`` has milliseconds only; the first record ties it to the monotonic clock, for all alike.
        """
        first = self.records[0]
        return first.at.timestamp() + record.mono_s - first.mono_s


@dataclass(slots=True)
class Traveller:
    """A guest and where it is."""

    spec: GuestSpec
    here: str
    there: str


@dataclass(slots=True)
class Stage:
    """A lab that is up, and its guests by name. journals: where to keep those of its migrations."""

    lab: Lab
    tell: Tell
    journals: Path | None = None
    guests: dict[str, Traveller] = field(default_factory=dict)

    def boot(self, *specs: GuestSpec) -> None:
        """Start guests at the first site, at once, and wait until all answer."""
        here, there = self.lab.config.sites[:2]
        for spec in specs:
            self.tell(f"booting {spec.name} at {here}")
            guest.boot(self.lab, here, spec, progress=self.tell)
            self.guests[spec.name] = Traveller(spec, here, there)
        for spec in specs:
            began_s = time.monotonic()
            guest.wait_answering(self.lab, spec, deadline_s=BOOT_S)
            self.tell(f"{spec.name} answers after {time.monotonic() - began_s:.1f} s more")

    def destroy(self, name: str) -> None:
        """A guest that is not needed any more, at both sites."""
        traveller = self.guests.pop(name)
        guest.destroy(self.lab, traveller.here, name)
        (self.lab.site(traveller.there).images / traveller.spec.disk_name).unlink(missing_ok=True)

    def migrate(
        self,
        name: str,
        *options: str,
        on_record: OnRecord | None = None,
        on_tick: Callable[[], None] | None = None,
    ) -> Journey:
        """One migration with the disk copied, to wherever the guest is not; followed to its end.

        ``on_tick`` is called several times a second, whether or not something happens.

        Errors: MigrationFailedError, the guest is where it was; DeadlineError when it does not end;
        LabError when it did not begin.
        """
        traveller = self.guests[name]
        here, there = traveller.here, traveller.there
        # The image left behind by the last journey: as if the guest had never been there.
        (self.lab.site(there).images / traveller.spec.disk_name).unlink(missing_ok=True)
        words = [
            "migrate", name, f"qemu+tls://{there}/system",
            "--copy-storage-all", "--persistent", "--undefinesource", "--json", *options,
        ]  # fmt: skip
        records: list[Record] = []
        complaints: list[str] = []
        argv = self.lab.site(here).argv([*VIRTGRID, *words])
        wan = {"begin": self.lab.wan_bytes()}
        for record in self._follow(argv, on_tick or _nothing, complaints):
            records.append(record)
            if record.event == "phase" and record["phase"] == "hold":
                wan.setdefault("hold", self.lab.wan_bytes())
            elif record.event == "released":
                wan.setdefault("released", self.lab.wan_bytes())
            if on_record is not None:
                on_record(record)
        wan["end"] = self.lab.wan_bytes()
        if self.journals is not None and records:
            _keep_journal(self.journals, records)
        if not records:
            cause = " | ".join(complaints)[-1000:] or None
            raise LabError(f"the migration of {name} from {here} to {there} did not begin", cause=cause)
        end = records[-1]
        if end.event != "finished":
            raise MigrationFailedError(
                f"the migration of {name} from {here} to {there} failed: {end.get('what') or 'it broke off'}",
                where=end.get("where"),
                cause=end.get("cause") or " | ".join(complaints)[-1000:] or None,
                hint=end.get("hint"),
            )
        traveller.here, traveller.there = there, here
        return Journey(source=here, destination=there, records=tuple(records), wan=wan)

    def _follow(
        self, argv: list[str], on_tick: Callable[[], None], complaints: list[str]
    ) -> Iterator[Record]:
        """The records of a migrate command as they come; the process is gone afterwards.

        What else it says is appended to ``complaints``.
        """
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Ctrl-C is ours to take: the lab goes down and everything in it with it.
            start_new_session=True,
            env=os.environ | {"VIRTGRID_STATE_DIR": str(self.lab.layout.root / "bench")},
        )
        lines: queue.Queue[str | None] = queue.Queue()
        readers = [
            threading.Thread(target=_read_lines, args=(process.stdout, lines.put), daemon=True),
            threading.Thread(target=_read_lines, args=(process.stderr, _keep_text(complaints)), daemon=True),
        ]
        for reader in readers:
            reader.start()
        end_s = time.monotonic() + MIGRATION_S
        try:
            while True:
                try:
                    line = lines.get(timeout=_TICK_S)
                except queue.Empty:
                    if time.monotonic() > end_s:
                        raise DeadlineError(f"a migration did not end within {MIGRATION_S:.0f} s") from None
                    on_tick()
                    continue
                if line is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=10)  # its output has ended, so it is about to
                    break
                try:
                    yield parse_line(line)
                except (KeyError, ValueError, TypeError):
                    # An error told as JSON (refused before there was a journal), or not JSON at all.
                    complaints.append(line.strip())
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            for reader in readers:
                reader.join(timeout=1)
            for pipe in (process.stdout, process.stderr):
                if pipe is not None and not any(reader.is_alive() for reader in readers):
                    pipe.close()


def _nothing() -> None:
    return


def _keep_journal(directory: Path, records: list[Record]) -> None:
    """Write a journal once more, outside of the lab that is going to go."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record.as_dict(), ensure_ascii=False, separators=(",", ":")) for record in records]
    name = str(records[0].get("id") or f"{records[0].at:%Y%m%dT%H%M%S}")
    (directory / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _read_lines(stream: Any, put: Callable[[str | None], object]) -> None:
    for line in stream:
        put(line)
    put(None)


def _keep_text(kept: list[str]) -> Callable[[str | None], object]:
    return lambda line: kept.append(line.strip()) if line and line.strip() else None


@contextlib.contextmanager
def staged(
    config: LabConfig, tell: Tell, *, journals: Path | None = None, keep: bool = False
) -> Iterator[Stage]:
    """A lab of our own; taken down whatever happens, SIGTERM included. keep: unless all went well."""
    owner = os.getpid()

    def as_interrupt(number: int, _: object) -> None:
        # Forks of this process (network libraries make them) inherit the handler; they just go.
        if os.getpid() != owner:
            os._exit(128 + number)
        raise KeyboardInterrupt(f"signal {number}")

    before, kept = signal.signal(signal.SIGTERM, as_interrupt), False
    try:
        yield Stage(Lab.up(config, tell=tell), tell, journals)
        kept = keep
    finally:
        # A second Ctrl-C while clearing up would leave processes and namespaces behind.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            if not kept:
                take_down(config.name, directory=config.directory, tell=tell)
        finally:
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGTERM, before)


def lab_name(use: str) -> str:
    """A name no other run has."""
    return f"{use}{os.getpid()}"


# --- a client that never ends -------------------------------------------------------------

# An upload that is announced and never finished: the request stays outstanding, and the guest has
# next to nothing to do for it. A byte now and then keeps the server from giving up on the body.
_HALF_A_REQUEST: Final = """
import socket, sys, time
peer = socket.create_connection((sys.argv[1], 80), timeout=30)
peer.sendall(b"POST /upload HTTP/1.1\\r\\nHost: guest\\r\\nContent-Length: 1000000\\r\\n\\r\\n")
print("asking", flush=True)
while True:
    time.sleep(10)
    try:
        peer.sendall(b"a")
    except OSError:
        pass
"""


@contextlib.contextmanager
def unfinished_request(lab: Lab, address: str) -> Iterator[None]:
    """A client whose request is outstanding, so that a strict gate never opens by itself."""
    process = subprocess.Popen(
        lab.client.argv([sys.executable, "-I", "-c", _HALF_A_REQUEST, address]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "asking":
            raise LabError(f"no client could connect to {address}")
        yield
    finally:
        process.kill()
        process.wait()
