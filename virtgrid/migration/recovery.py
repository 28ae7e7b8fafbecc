"""``migration recover``: a driver died or lost sight; look on both hosts and put things right.

Nothing is taken from memory but what the journal says we made. Both hosts are asked where the
domain is, ``outcome.judge`` says what that means, and only then is anything done.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from virtgrid.core import journal as journals
from virtgrid.core.clock import SystemClock
from virtgrid.core.errors import DeadlineError, NotFoundError, PositionUnknownError, RefusedError
from virtgrid.core.events import Record
from virtgrid.core.journal import Journal
from virtgrid.migration.flip import restore, way_of
from virtgrid.migration.guestname import end_name
from virtgrid.migration.naming import NameMove, NameState
from virtgrid.migration.outcome import Place, Repair, Situation, judge
from virtgrid.migration.prepare import remove_image, restore_limits
from virtgrid.migration.running import exclusive, running_migration, socket_path
from virtgrid.migration.share import unshare
from virtgrid.net.flip import Way
from virtgrid.virt.connection import Hypervisor
from virtgrid.virt.domain import Domain, Position, look

#: A dead driver's job is ended by libvirt, when it notices that its connection is gone.
_QUIET_DEADLINE_S: Final = 25.0
#: For a copy that is just being started; one that never will be does not answer at all.
_BEGINNING_DEADLINE_S: Final = 8.0


#: States of a ``flip`` after which something may still be turned.
_STILL: Final = ("draining", "flipped", "given back", "lost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What a journal says a migration was, and what it left. Pure; see ``remains``.

    let_go: the guest may have been stopped in order to run over there; arrived: it was seen there.
    name: the name whose records may not be in their last state. shared: the interface its classes are on.
    """

    migration_id: str
    domain: str
    uuid: str
    source: str
    destination: str
    source_uri: str
    dest_uri: str
    images: tuple[str, ...]
    downtime_s: float | None
    ended: bool
    let_go: bool = False
    arrived: bool = False
    name: NameMove | None = None
    way: Way | None = None
    shared: str | None = None


def remains(records: Sequence[Record]) -> Remains:
    """Read out of a journal what may need putting right. Errors: RefusedError when it never began."""
    if not records or records[0].event != "started":
        raise RefusedError("this journal does not begin with a migration's start")
    began = records[0]
    images: dict[str, None] = {}
    downtime_s: float | None = None
    name: NameMove | None = None
    way: Way | None = None
    shared: str | None = None
    phases = {record["phase"] for record in records if record.event == "phase"}
    told = {record.event for record in records}
    # Without a hold nothing says beforehand that QEMU is about to switch.
    let_go = bool(
        told & {"released", "hold_lost", "resumed"}
        or "switchover" in phases
        or (began["policy"] == "immediate" and "precopy" in phases)
    )
    for record in records:
        match record.event:
            case "created" if record["kind"] == "image":
                images[str(record["path"])] = None
            case "removed":
                images.pop(str(record.get("path")), None)
            case "limits":
                downtime_s = float(record["downtime_s"])
            case "name":
                name = NameMove.from_fields(record.fields)
            case "name_changed" if record["state"] in (NameState.ORIGINAL, NameState.SETTLED):
                name = None
            case "flip":
                way = way_of(dict(record.fields)) or (way if record["state"] in _STILL else None)
            case "share" if record["state"] in ("set", "removed"):
                shared = str(record["interface"]) if record["state"] == "set" else None
            case "recovered" if record["on"] == began["source"]:
                downtime_s = None
    return Remains(
        migration_id=str(began["id"]),
        domain=str(began["domain"]),
        uuid=str(began["uuid"]),
        source=str(began["source"]),
        destination=str(began["destination"]),
        source_uri=str(began.get("source_uri", "qemu:///system")),
        dest_uri=str(began["dest_uri"]),
        images=() if "finished" in told else tuple(images),
        downtime_s=downtime_s,
        ended=records[-1].event in ("finished", "failed", "recovered"),
        let_go=let_go,
        arrived=bool(told & {"resumed", "finished"}),
        name=name,
        way=way,
        shared=shared,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What was found and what was (or would be) done, a sentence each."""

    situation: Situation
    actions: tuple[str, ...]
    done: bool


async def recover(path: Path, *, act: bool, writer_gone: bool) -> Recovery:
    """Look on both hosts; with ``act`` also put things right and write it into the journal.

    writer_gone: the driver that wrote the journal is not alive any more.
    Errors: RefusedError while the migration still runs; PositionUnknownError when it cannot be told
    (exit 7), naming what both hosts said.
    """
    left = remains(journals.read(path))
    if not writer_gone or running_migration(left.uuid) == left.migration_id:
        raise RefusedError(
            f"{left.migration_id} is still running",
            hint=f"virtgrid migration abort {left.migration_id}, or wait for it",
        )
    here, there = await _quiet(left)
    situation = judge(left.domain, left.source, left.destination, here, there)
    planned = _plan(left, situation, destination_answers=there is not None)
    if not act:
        return Recovery(situation=situation, actions=planned, done=False)
    if not situation.certain:
        raise PositionUnknownError(
            f"{left.domain} was not recovered",
            where=situation.text,
            hint="bring the silent host back, or decide by hand which copy is the right one",
        )
    if left.arrived and Repair.RESUME_SOURCE in situation.repairs:
        raise PositionUnknownError(
            f"{left.domain} was not recovered: it has run on {left.destination} already",
            where=situation.text,
            hint=f"what it did there is in its images on {left.destination}; decide by hand which to keep",
        )
    # The lock keeps a new migration of the domain, and a second recover, from coming in between.
    with exclusive(left.uuid, left.migration_id):
        socket_path(left.uuid).unlink(missing_ok=True)
        _mend_torn_end(path)
        with Journal(path, SystemClock(), append=True) as journal:
            done = await _act(left, situation, journal, destination_answers=there is not None)
            on = {Place.SOURCE: left.source, Place.DESTINATION: left.destination}.get(situation.place)
            journal.write(
                "recovered",
                sync=True,
                domain=left.domain,
                on=on,
                action="; ".join(done) or "nothing needed doing",
                text=situation.text,
            )
    return Recovery(situation=situation, actions=tuple(done), done=True)


async def _quiet(left: Remains) -> tuple[Position | None, Position | None]:
    """What both hosts say once libvirt has ended what it ends by itself when a driver dies.

    Errors: RefusedError when another job goes on: then what is there may be somebody's.
    """
    clock = SystemClock()
    deadline_s = clock.monotonic_s() + _QUIET_DEADLINE_S
    while True:
        here, there = await asyncio.gather(look(left.source_uri, left.uuid), look(left.dest_uri, left.uuid))
        if not (here and here.job):
            return here, there
        if clock.monotonic_s() > deadline_s:
            raise RefusedError(
                f"a job runs on {left.domain} on {left.source}",
                hint=f"virsh domjobinfo {left.domain} shows it, virsh domjobabort {left.domain} ends it",
            )
        await clock.sleep(0.5)


def _plan(left: Remains, situation: Situation, *, destination_answers: bool) -> tuple[str, ...]:
    """What recover would do, in the order it would do it. Pure."""
    steps = [repair.value for repair in situation.repairs]
    if situation.place is Place.SOURCE and left.downtime_s is not None:
        steps.append(f"put the downtime limit back to {left.downtime_s * 1000:.0f} ms")
    if left.way is not None and situation.place in _FORWARDED:
        steps.append(f"make {left.way.bridge} send its frames to where it runs")
    if left.shared is not None:
        steps.append(f"take the migration's classes off {left.shared}")
    if _worthless(left, situation) and left.images:
        later = "" if destination_answers else " (not now: it does not answer)"
        steps += [f"remove {image} on {left.destination}{later}" for image in left.images]
    if left.name is not None and (last := _last_state(left, situation)):
        steps.append(f"bring its name where it is: {left.name.text(last)}")
    return tuple(steps)


def _worthless(left: Remains, situation: Situation) -> bool:
    """Whether the images we made hold nothing the guest has ever run on. Pure."""
    if situation.place is Place.NOWHERE:
        return not left.let_go  # it may have left, and been shut off over there
    return situation.place is Place.SOURCE


def _last_state(left: Remains, situation: Situation) -> NameState | None:
    """Where the guest's name belongs; None: the guest is nowhere, and its name stays. Pure."""
    if situation.place is Place.DESTINATION:
        return NameState.SETTLED
    return NameState.ORIGINAL if _worthless(left, situation) else None


#: Where a guest must be so that this host's bridge can be told what is right.
_FORWARDED: Final = (Place.SOURCE, Place.DESTINATION)


async def _act(
    left: Remains, situation: Situation, journal: Journal, *, destination_answers: bool
) -> list[str]:
    done: list[str] = []
    if Repair.REMOVE_DESTINATION in situation.repairs:
        await _remove_copy(left.dest_uri, left, journal, done, left.destination)
    if Repair.REMOVE_SOURCE in situation.repairs:
        await _remove_copy(left.source_uri, left, journal, done, left.source)
    if situation.place is Place.SOURCE:
        async with await Hypervisor.open(left.source_uri, name=left.source) as source:
            domain = Domain(source, uuid=left.uuid, name=left.domain)
            if Repair.RESUME_SOURCE in situation.repairs:
                await domain.resume()
                done.append(f"resumed on {left.source}")
            if left.downtime_s is not None:
                await restore_limits(source, domain, left.downtime_s)
                done.append("migration limits put back")
    if left.way is not None and situation.place in _FORWARDED:
        with contextlib.suppress(NotFoundError):  # the bridge is gone
            if text := await asyncio.to_thread(restore, left.way, situation.place):
                done.append(f"{left.way.bridge}: {text}")
    if left.shared is not None and await unshare(left.shared, journal):
        done.append(f"took the migration's classes off {left.shared}")
    if _worthless(left, situation) and destination_answers:
        for image in left.images:
            token = left.migration_id.partition("-")[0]
            if await remove_image(journal, left.dest_uri, image, token=token):
                done.append(f"removed {image} on {left.destination}")
    if left.name is not None and (last := _last_state(left, situation)):
        done.append(await end_name(left.name, journal, last))
    return done


async def _remove_copy(uri: str, left: Remains, journal: Journal, done: list[str], host: str) -> None:
    """End a stopped left-over copy. Looked at once more first: it must not have begun to run.

    A libvirtd killed between writing a domain down and starting its QEMU remembers, when it is back, a
    domain without a process and a job without an owner (libvirt 11.3, ``qemuProcessReconnectHelper``). It
    cannot end that, nor can we; nothing of it runs, so all else is put right and the rest is told.
    """
    now = await look(uri, left.uuid)
    if now is None or str(now.state) == "running":
        raise PositionUnknownError(
            f"the left-over copy of {left.domain} on {host} is not stopped any more",
            where=f"{host} says: {now or 'no answer'}",
            hint="nothing was done; look again with virtgrid migration recover",
        )
    try:
        async with await Hypervisor.open(uri, name=host) as hypervisor:
            copy = Domain(hypervisor, uuid=left.uuid, name=left.domain)
            await (copy.destroy(deadline_s=_BEGINNING_DEADLINE_S) if now.beginning else copy.destroy())
    except NotFoundError:  # libvirt was faster
        pass
    except DeadlineError:
        later = await look(uri, left.uuid)
        if later is None or not later.beginning:
            raise
        journal.write("left", kind="domain", name=left.domain, reason=f"{host}'s libvirt never began it")
        done.append(
            f"{host} remembers a copy that never began, and its libvirt cannot end it: stop libvirtd there,"
            f" remove /run/libvirt/qemu/{left.domain}.xml, start libvirtd"
        )
        return
    done.append(f"removed the stopped copy on {host}")


def _mend_torn_end(path: Path) -> None:
    """Cut off the half line a killed writer may have left, so that ours begins on its own."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole != len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
