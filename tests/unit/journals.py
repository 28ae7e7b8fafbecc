"""Sample journals for tests: what a driver would write, from a seed, every line checked by the vocabulary."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from virtgrid.core.events import Record, check_fields

KINDS = ("success", "plain", "failed", "aborted", "timeout", "crashed")
MIB = 1 << 20
START = datetime(2026, 11, 22, 1, 44, 12, tzinfo=UTC)
MONO_S = 5000.0


@dataclass
class Client:
    """A client of the guest: requests in bursts that all clients share, thinking in between."""

    name: str
    verdict: str = "closed"
    since_s: float = 0.0
    download: bool = False


class Writer:
    """Collects records at a time set by hand."""

    def __init__(self, domain: str, start: datetime) -> None:
        self.id = f"{start:%Y%m%dT%H%M%S}-{domain}"
        self.domain = domain
        self.start = start
        self.events: list[tuple[float, int, str, dict[str, Any]]] = []

    def at(self, t: float, event: str, **fields: Any) -> None:
        check_fields(event, fields)
        self.events.append((t, len(self.events), event, fields))

    def records(self, until_s: float | None = None) -> list[Record]:
        rows = sorted(self.events, key=lambda row: (row[0], row[1]))
        return [
            Record(at=self.start + timedelta(seconds=t), mono_s=MONO_S + t, event=event, fields=fields)
            for t, _, event, fields in rows
            if until_s is None or t <= until_s
        ]


def sample_journal(
    kind: str = "success",
    *,
    seed: int = 7,
    clients: int = 60,
    hold_s: float = 6.0,
    storage_s: float = 14.0,
    domain: str = "web1",
    start: datetime = START,
    pid: int = 4711,
) -> list[Record]:
    """One migration's records. kind: one of KINDS; the hold of ``timeout`` lasts hold_s and ends in vain."""
    rng = random.Random(seed)
    w = Writer(domain, start)
    policy = "immediate" if kind == "plain" else "strict"
    w.at(
        0.0,
        "started",
        id=w.id,
        domain=domain,
        uuid="7b1d5a30-96f2-4d0c-a7d1-55d2a2a6f001",
        source="hostA",
        destination="hostB",
        dest_uri="qemu+tls://hostB/system",
        source_uri="qemu:///system",
        policy=policy,
        options={"copy_storage_all": True, "max_wait_s": 30.0, "on_timeout": "abort", "bandwidth": "100mbit"},
        pid=pid,
        pid_started=815,
    )
    w.at(0.01, "phase", phase="preflight")
    for name, verdict, text in (
        ("reachable", "PASS", "hostB answers, libvirt 11.3.0, QEMU 10.0.2"),
        ("same domain", "PASS", "no web1 on hostB"),
        ("disk vda", "PASS", "qcow2, 1.0 GiB; hostB has 41 GiB free"),
        ("cpu", "WARN", "host-passthrough: the hosts' processors must be of the same model"),
    ):
        hint = {"hint": "use host-model"} if verdict == "WARN" else {}
        w.at(0.1, "check", name=name, verdict=verdict, text=text, **hint)
    w.at(0.3, "estimate", storage_s=storage_s, memory_s=6.0, storage_bytes=256 * MIB, memory_bytes=256 * MIB)
    w.at(0.35, "phase", phase="prepare")
    w.at(0.6, "created", kind="volume", name="web1.qcow2", pool="default")
    if kind == "failed":
        return _failed(w, rng, storage_s)
    t0 = 0.8
    w.at(t0, "phase", phase="storage")
    _storage(w, t0, storage_s, 256 * MIB)
    precopy = t0 + storage_s
    w.at(precopy, "phase", phase="precopy")
    first = 6.0
    sent = _first_pass(w, rng, precopy, first)
    hold = precopy + first + 0.8
    if kind == "plain":
        stop = hold + 0.3
        end = stop + 0.47
        at_stop = _load(w, rng, 0.5, end + 1.5, clients, stop, end, quiet_at=None)
        return _switch(w, stop, 0.47, at_stop, None, sent)
    w.at(hold, "phase", phase="hold")
    w.at(
        hold + 0.02,
        "hold",
        kind="tickled",
        text="1.3 MB/s in 500 ms after clamping",
        drip_bytes_s=1.31e6,
        max_s=30.0 if kind != "timeout" else hold_s,
        then="abort",
    )
    w.at(hold, "clamp", limit_bytes_s=10, mode="hold", remaining_bytes=380_000)
    t = hold + 0.1
    while t < hold + hold_s:
        sent += 130_000
        w.at(
            t,
            "ram",
            iteration=4 + int(t - hold),
            remaining_bytes=int(0.4e6 + 1.6e6 * (0.5 + 0.5 * rng.random())),
            sent_bytes=sent,
            total_bytes=256 * MIB,
            dirty_bytes_s=1.1e6 + 2e5 * rng.random(),
            speed_bytes_s=1.3e6,
            limit_bytes_s=10,
        )
        t += 0.25
    if kind == "crashed":
        crash = hold + hold_s * 0.6
        _load(w, rng, 0.5, crash, clients, None, crash, quiet_at=None)
        return w.records(until_s=crash)
    stop = hold + hold_s + 0.097
    if kind in {"timeout", "aborted"}:
        _load(w, rng, 0.5, stop + 0.5, clients, None, stop + 0.5, quiet_at=None)
        return _gave_up(w, kind, stop, hold_s)
    at_stop = _load(w, rng, 0.5, stop + 2.1, clients, stop, stop + 0.158, quiet_at=hold + hold_s - 0.15)
    return _switch(w, stop, 0.158, at_stop, hold_s, sent)


def _storage(w: Writer, t0: float, seconds: float, total: int, until: float = 1.0) -> None:
    steps = max(2, int(seconds * 2))
    for i in range(int(steps * until) + 1):
        share = i / steps
        w.at(
            t0 + share * seconds,
            "storage",
            disk="vda",
            copied_bytes=int(total * share),
            total_bytes=total,
            ready=i == steps,
            bytes_s=total / seconds,
        )


def _first_pass(w: Writer, rng: random.Random, t0: float, seconds: float) -> int:
    total, sent = 256 * MIB, 0
    steps = int(seconds * 4)
    for i in range(1, steps + 1):
        sent = int(60 * MIB * i / steps)
        w.at(
            t0 + seconds * i / steps,
            "ram",
            iteration=1,
            remaining_bytes=int(total * (1 - i / steps) ** 1.4) + 200_000,
            sent_bytes=sent,
            total_bytes=total,
            dirty_bytes_s=1.5e6 * rng.random(),
            speed_bytes_s=11.6e6,
            limit_bytes_s=12.5e6,
        )
    for i, left in enumerate((8 * MIB, 5 * MIB, 2 * MIB, 380_000)):
        w.at(
            t0 + seconds + 0.2 * i,
            "ram",
            iteration=2 + i // 2,
            remaining_bytes=left,
            sent_bytes=sent,
            total_bytes=total,
            dirty_bytes_s=1.4e6,
            speed_bytes_s=11.0e6 / (i + 1),
            limit_bytes_s=12.5e6 / (i + 1),
        )
    w.at(t0 + seconds + 0.4, "clamp", limit_bytes_s=2e6, mode="land", remaining_bytes=5 * MIB)
    return sent


def _load(
    w: Writer,
    rng: random.Random,
    begin: float,
    end: float,
    clients: int,
    stop: float | None,
    run: float,
    quiet_at: float | None,
) -> int:
    """Requests in bursts; a quiet moment at ``quiet_at``. Gives the number unsuitable at ``stop``."""
    people = [Client(f"10.9.0.{2 + i % 4}:{40000 + 17 * i}") for i in range(clients)]
    bursts = [
        t
        for k in range(int((end - begin) / 2.1) + 1)
        if (t := begin + k * 2.1 + rng.uniform(-0.3, 0.3)) < end
    ]
    changes: list[tuple[float, Client, str, str]] = []
    for burst in bursts:
        for person in people:
            if rng.random() > 0.7:
                continue
            t = burst + rng.expovariate(1 / 0.25)
            took = 0.15 + rng.expovariate(1 / 0.3)
            if quiet_at is not None and t < quiet_at + 0.6 and t + took > quiet_at - 0.1:
                continue
            changes.append((t, person, "unsuitable", f"response, {rng.randint(4, 900)} KiB left"))
            changes.append((t + took, person, "suitable", "nothing outstanding"))
    for person in people[:: max(1, clients // 5)]:
        t = begin + rng.random() * 5
        changes.append((t, person, "unknown", "picked up mid-stream"))
        changes.append((t + 1.5, person, "suitable", "nothing outstanding"))
    counted = dict.fromkeys((p.name for p in people), "closed")
    at_stop = 0
    last_count = -1.0
    decided = ""
    for t, person, verdict, reason in sorted(changes, key=lambda change: change[0]):
        if stop is not None and stop <= t < run:  # nothing moves while the guest stands still
            t = run + 0.01
        if t >= end or counted[person.name] == verdict:
            continue
        counted[person.name] = verdict
        w.at(
            t,
            "connection",
            client=person.name,
            server="10.9.0.100:80",
            protocol="http",
            verdict=verdict,
            reason=reason,
            state="idle" if verdict == "suitable" else "body",
        )
        known = [v for v in counted.values() if v != "closed"]
        busy = sum(v != "suitable" for v in known)
        if stop is None or t < stop:
            at_stop = busy
        if t - last_count > 0.1:
            last_count = t
            w.at(
                t,
                "connections",
                total=len(known),
                suitable=len(known) - busy,
                unsuitable=busy,
                unknown=sum(v == "unknown" for v in known),
            )
            _decide(w, t, busy, person)
        decided = decided or verdict
    return at_stop


def _decide(w: Writer, t: float, busy: int, person: Client) -> None:
    hold = next((at for at, _, event, _ in w.events if event == "hold"), None)
    if hold is None or t < hold or any(event in {"released", "failed"} for _, _, event, _ in w.events):
        return
    if busy and len(w.events) % 3 == 0:
        w.at(
            t,
            "gate",
            decision="hold",
            reason=f"{busy} unsuitable, allowed 0",
            unsuitable=busy,
            allowed=0,
            waiting_for=[f"http {person.name} response, 9 KiB left"] * min(busy, 3),
            waited_s=round(t - hold, 3),
        )


def _switch(
    w: Writer, stop: float, pause: float, at_stop: int, held_s: float | None, sent: int
) -> list[Record]:
    if held_s is not None:
        release = stop - 0.097
        w.at(
            release,
            "gate",
            decision="release",
            reason=f"{at_stop} unsuitable, allowed 0",
            unsuitable=at_stop,
            allowed=0,
            waited_s=held_s,
        )
        w.at(
            release,
            "released",
            by="gate",
            reason=f"{at_stop} unsuitable, allowed 0",
            unsuitable=at_stop,
            remaining_bytes=900_000,
            held_s=held_s,
        )
        w.at(release, "phase", phase="release")
    w.at(stop, "phase", phase="switchover")
    w.at(stop, "stopped", clock_s=MONO_S + stop, unsuitable=at_stop, remaining_bytes=700_000)
    w.at(stop + pause, "resumed", clock_s=MONO_S + stop + pause, downtime_s=pause)
    w.at(stop + pause + 0.05, "phase", phase="verify")
    w.at(stop + pause + 0.12, "verified", answering="yes", how="ping 10.9.0.100", after_s=0.06)
    w.at(stop + pause + 0.2, "phase", phase="cleanup")
    w.at(
        stop + pause + 2.0,
        "finished",
        domain=w.domain,
        on="hostB",
        exit_status=0,
        hold="tickled" if held_s is not None else None,
        held_s=held_s or 0.0,
        unsuitable_at_pause=at_stop,
        downtime_s=pause,
        total_s=stop + pause + 2.0,
        sent_bytes=sent + 256 * MIB,
        answering="yes",
        policy="strict" if held_s is not None else "immediate",
        reason=f"{at_stop} unsuitable, allowed 0" if held_s is not None else "immediate",
    )
    return w.records()


def _gave_up(w: Writer, kind: str, at: float, hold_s: float) -> list[Record]:
    if kind == "aborted":
        w.at(at, "user", action="abort", by="root")
        status, error, what = 6, "VG-ABORTED", "aborted on request"
    else:
        w.at(
            at, "gate", decision="abort", reason=f"held {hold_s:.0f} s, the longest allowed", waited_s=hold_s
        )
        status, error, what = 5, "VG-HOLD-TIMEOUT", "gave up waiting; 7 of 60 connections stayed unsuitable"
    w.at(at + 0.2, "phase", phase="cleanup")
    w.at(at + 0.3, "removed", kind="volume", name="web1.qcow2")
    w.at(
        at + 0.5,
        "failed",
        domain=w.domain,
        on="hostA",
        exit_status=status,
        error=error,
        what=what,
        where="still running on hostA",
        hint="--max-wait 10m, or: virtgrid migration release web1",
        held_s=hold_s,
        hold="tickled",
        total_s=at + 0.5,
        policy="strict",
    )
    return w.records()


def _failed(w: Writer, rng: random.Random, storage_s: float) -> list[Record]:
    w.at(0.8, "phase", phase="storage")
    _storage(w, 0.8, storage_s, 256 * MIB, until=0.4)
    at = 0.9 + storage_s * 0.4
    w.at(at, "note", text="the WAN is silent for 5 s")
    w.at(at + 1, "phase", phase="cleanup")
    w.at(at + 2, "left", kind="volume", name="web1.qcow2", reason="hostB does not answer")
    w.at(
        at + 3,
        "failed",
        domain=w.domain,
        on="hostA",
        exit_status=1,
        error="VG-MIGRATION-FAILED",
        what="the destination stopped answering while vda was copied",
        where="web1 is still running on hostA",
        cause="internal error: client socket is closed",
        hint="look at hostB, then: virtgrid migration recover web1",
        total_s=at + 3,
        policy="strict",
    )
    return w.records()


def write_journal(directory: Path, records: list[Record]) -> Path:
    """The records as a journal file named by their id."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{records[0]['id']}.jsonl"
    path.write_text("".join(json.dumps(record.as_dict()) + "\n" for record in records))
    return path


SampleMaker = Callable[..., list[Record]]
