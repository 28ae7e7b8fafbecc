"""What a guarantee of bandwidth is worth while a neighbour fills the link: a part of ``bench grid``.

Two lab sites with a WAN of 100 Mbit/s, real virtgridd at both and a real NRM; two reservations, one with a
guarantee and one without, each with a node at either site. In every round and each way a neighbour sends
half as much again as the link carries, in datagrams that do not care, and TCP is measured from node to node:
with the guarantee, and, as its peer, without.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from virtgrid.bench.netstage import Wire
from virtgrid.bench.network import arrived
from virtgrid.bench.result import Figure, at_most, figure
from virtgrid.core.errors import DeadlineError, LabError
from virtgrid.grid.messages.coalloc import Command, Hold, HoldAnswer, Paths, Window
from virtgrid.grid.messages.coalloc import Path as Way
from virtgrid.grid.messages.common import parse
from virtgrid.grid.messages.network import bridge_of
from virtgrid.lab.lab import Lab, take_down
from virtgrid.lab.layout import LabConfig, LinkSpec
from virtgrid.lab.network import VIRTGRID
from virtgrid.lab.site import Site
from virtgrid.lab.stage import Tell, lab_name
from virtgrid.net import netns
from virtgrid.net.link import Links
from virtgrid.wire import seal
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.line import deaf

LINK_BITS_S: Final = 100_000_000
RATE_BITS_S: Final = 40_000_000
WAYS: Final = ("forth", "back")
_FLOOD: Final = "150M"
_FLOOD_PORT: Final = 5202
_START_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """One run. bits_s: payload that arrived from node to node; neighbour_bits_s: of the neighbour's."""

    guaranteed: bool
    way: str
    bits_s: float
    neighbour_bits_s: float

    @property
    def share(self) -> float:
        """Of what was promised, or would have been."""
        return self.bits_s / RATE_BITS_S

    def as_dict(self) -> dict[str, Any]:
        return {
            "guaranteed": self.guaranteed, "way": self.way, "mbit_s": round(self.bits_s / 1e6, 2),
            "neighbour_mbit_s": round(self.neighbour_bits_s / 1e6, 2),
        }  # fmt: skip


def figures(rates: Sequence[Rate]) -> tuple[Figure, ...]:
    """Pure. Errors are the distance from the promise, whichever side of it; the worst run counts."""
    found = []
    goal = at_most(0.05)
    with_, without = ([one for one in rates if one.guaranteed is so] for so in (True, False))
    for way in ("", *WAYS):
        errors = [abs(one.share - 1) for one in with_ if way in ("", one.way)]
        peers = [abs(one.share - 1) for one in without if way in ("", one.way)]
        name = f"rate_error_share_{way}" if way else "rate_error_share"
        found.append(figure(name, errors, of=max, peer=max(peers, default=None), goal=goal))
    neighbours = [one.neighbour_bits_s / 1e6 for one in with_]
    found.append(figure("rate_neighbour_mbit_s", neighbours, "Mbit/s"))
    return tuple(found)


def measure(rounds: int, seconds: int, tell: Tell) -> list[Rate]:
    """In a lab of its own, which is taken down. Needs root."""
    name = lab_name("rate")
    found = []
    try:
        tell("two sites for guarantees of bandwidth")
        lab = Lab.up(LabConfig(name=name, wan=LinkSpec(rate_bytes_s=LINK_BITS_S / 8)), lambda _: None)
        with tempfile.TemporaryDirectory(prefix="vg") as directory, ExitStack() as undo:
            undo.enter_context(_programs(lab, Path(directory)))
            wires = {so: undo.enter_context(_nodes(lab, Path(directory), so)) for so in (True, False)}
            for number in range(1, rounds + 1):
                for place, way in enumerate(WAYS):
                    for so in (True, False) if number % 2 else (False, True):
                        one = _run(lab, wires[so][place], so, way, seconds)
                        found.append(one)
                        tell(
                            f"round {number}, {way}, {'with' if so else 'without'} a guarantee of"
                            f" {RATE_BITS_S / 1e6:.0f} Mbit/s: {one.bits_s / 1e6:.1f} Mbit/s"
                        )
    finally:
        take_down(name)
    return found


@contextmanager
def _programs(lab: Lab, directory: Path) -> Iterator[None]:
    """A virtgridd at each site, and the network manager."""
    key = directory / "crm.pub"
    key.write_text(seal.public_text(seal.new_key().public_key()))
    hosts = [w for s in lab.sites for w in ("--host", f"{s.name}={s.wan_address}@unix:{directory}/{s.name}")]
    words = {
        site.name: site.argv([*VIRTGRID, "serve", "host", "--crm-key", str(key),
                              "--socket", f"unix:{directory}/{site.name}"])
        for site in lab.sites
    }  # fmt: skip
    words["nrm"] = [
        *VIRTGRID, "serve", "nrm", "--link", f"alice:bob={LINK_BITS_S}bit", *hosts,
        "--database", f"{directory}/nrm.db", "--socket", f"unix:{directory}/nrm",
    ]  # fmt: skip
    running: list[subprocess.Popen[bytes]] = []
    try:
        for name, argv in words.items():
            with (directory / f"{name}.log").open("wb") as log:
                running.append(subprocess.Popen(argv, stderr=log))
            _wait_ready(running[-1], directory / f"{name}.log")
        yield
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> None:
    end_s = time.monotonic() + _START_S
    while b"ready at" not in log.read_bytes():
        if process.poll() is not None:
            raise LabError(f"{log.stem} ended at once", cause=log.read_text()[-500:])
        if time.monotonic() > end_s:
            raise DeadlineError(f"{log.stem} did not listen within {_START_S:g} s")
        time.sleep(0.05)


@contextmanager
def _nodes(lab: Lab, directory: Path, guaranteed: bool) -> Iterator[tuple[Wire, Wire]]:
    """A reservation and a node of it at each site: the wires there and back."""
    segment = asyncio.run(_reserve(Endpoint(directory / "nrm"), guaranteed))
    addresses = [f"10.45.{int(guaranteed)}.{number}" for number in (1, 2)]
    names = [f"vgrate{os.getpid()}{site.name[0]}{int(guaranteed)}" for site in lab.sites]
    with ExitStack() as undo:
        for site, name, address in zip(lab.sites, names, addresses, strict=True):
            _wait_segment(site, segment)
            netns.create(name)
            undo.callback(netns.delete, name)
            _plug(site, segment, name, address)
        enter = [("nsenter", f"--net={netns.path(name)}", "--") for name in names]
        yield (
            Wire(name="forth", address=addresses[1], sender=enter[0], server=enter[1]),
            Wire(name="back", address=addresses[0], sender=enter[1], server=enter[0]),
        )


async def _reserve(where: Endpoint, guaranteed: bool) -> int:
    line = await dial(where, deaf, name="the network manager")
    now_s, way = int(time.time()), ("alice", "bob")
    key = f"measured-{int(guaranteed)}"
    paths = (Way(between=way, rate_bytes_s=RATE_BITS_S // 8),) if guaranteed else ()
    hold = Hold(
        key=key,
        reservation=key,
        window=Window(begins_at_s=now_s, ends_at_s=now_s + 86400),
        ttl_s=60,
        asked_at_s=now_s,
        wanted=Paths(sites=way, paths=paths),
    )
    try:
        answer = parse(HoldAnswer, Command.HOLD, await line.call(Command.HOLD, hold.model_dump(mode="json")))
        if answer.standing is None or answer.standing.grant.segment is None:
            raise LabError("the network manager refused", cause=str(answer.refusal))
        await line.call(Command.COMMIT, {"key": key})
        return answer.standing.grant.segment
    finally:
        await line.close()


def _wait_segment(site: Site, segment: int) -> None:
    end_s = time.monotonic() + _START_S
    with Links(site.netns) as links:
        while links.index(bridge_of(segment)) is None:
            if time.monotonic() > end_s:
                raise DeadlineError(f"{site.name} has no segment {segment} after {_START_S:g} s")
            time.sleep(0.05)


def _plug(site: Site, segment: int, name: str, address: str) -> None:
    port = f"rate{segment}"
    with Links(site.netns) as links:
        links.veth(port, peer="eth0", peer_namespace=name)
        mtu = next(link.mtu for link in links.all() if link.name == bridge_of(segment))
        links.up(port, mtu=mtu)
        links.enslave(port, bridge_of(segment))
    with Links(name) as links:
        links.up("lo")
        links.up("eth0", mtu=mtu)
        links.address("eth0", address, 24)


def _run(lab: Lab, wire: Wire, guaranteed: bool, way: str, seconds: int) -> Rate:
    here, there = lab.sites if way == "forth" else lab.sites[::-1]
    with _flood(here, there, seconds + 3) as flood, wire.serving():
        time.sleep(1)  # the link is full by then
        # Without the first second, in which TCP is still looking for its window.
        bits_s, _ = arrived(wire.client(["-t", str(seconds), "-O", "1", "-J"], timeout_s=seconds + 60), "tcp")
        told, _ = flood.communicate(timeout=60)
    neighbour = 0.0
    try:
        said: Mapping[str, Any] = json.loads(told)
        neighbour, _ = arrived(said, "udp")
    except (ValueError, KeyError, LabError):
        pass  # its last word is lost in its own flood, now and then
    return Rate(guaranteed=guaranteed, way=way, bits_s=bits_s, neighbour_bits_s=neighbour)


@contextmanager
def _flood(here: Site, there: Site, seconds: int) -> Iterator[subprocess.Popen[str]]:
    """A neighbour: past all segments, from site to site."""
    flood = Wire(name="a neighbour", address=there.wan_address, sender=(), server=tuple(there.argv([])))
    with flood.serving(_FLOOD_PORT):
        words = [
            "-c",
            there.wan_address,
            "-p",
            str(_FLOOD_PORT),
            "-u",
            "-b",
            _FLOOD,
            "-t",
            str(seconds),
            "-J",
        ]
        process = subprocess.Popen(
            here.argv(["iperf3", *words]), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()
