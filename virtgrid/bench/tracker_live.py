"""What following a guest's connections costs those who are served: per packet, and per request.

In namespaces of its own: a host with a bridge, a guest behind a tap on one side, clients on the other.

``in_path_*``: whole frames from the guest, with and without a capture on the tap, taken in turns; the
processor time of the sender grows by what the filter and the ring cost, because the kernel runs
both in the sender's context.
``live_*``: a web server in the guest, requests at a steady rate and a large download beside them, with
and without a tracker, taken in turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

from virtgrid.bench.result import Figure, at_most, figure
from virtgrid.core.errors import DeadlineError, LabError, NotFoundError, RefusedError
from virtgrid.core.process import process_started
from virtgrid.lab.stage import Tell
from virtgrid.net import netns
from virtgrid.net.link import Links
from virtgrid.net.ring import PacketRing
from virtgrid.tracker.decode import ACK

TAP: Final = "vtap0"
MAC: Final = "52:54:00:7a:b0:01"
GUEST: Final = "198.18.7.2"  # RFC 2544: for benchmarks
CLIENT: Final = "198.18.7.1"
_PREFIX: Final = "vgb"
_READY_S: Final = 20.0
_PAYLOAD_BYTES: Final = 1448
_BULK_BYTES: Final = 1 << 40
_NGINX: Final = Path("/usr/sbin/nginx")

_CONFIGURATION: Final = """
daemon off; worker_processes 1; user root; pid {home}/pid; error_log {home}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off; client_body_temp_path {home}/b; proxy_temp_path {home}/p; fastcgi_temp_path {home}/f;
  uwsgi_temp_path {home}/u; scgi_temp_path {home}/s; keepalive_requests 100000000; sendfile on;
  tcp_nopush on;
  server {{ listen {guest}:80; root {home}/www; }}
}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePlan:
    """How much is measured. Rates: requests per second, bytes per second."""

    bursts: int = 40
    packets: int = 8000
    rounds: int = 20
    seconds: float = 3.0
    rate_hz: float = 3000.0
    bulk_bytes_s: float = 100e6
    connections: int = 40
    within_s: float = 0.010


@dataclass(slots=True, kw_only=True)
class _Site:
    host: str
    guest: str
    clients: str
    home: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)


def measure(tell: Tell, plan: LivePlan) -> tuple[tuple[Figure, ...], dict[str, Any]]:
    """The figures and the raw samples. Needs root. Errors: NotFoundError, RefusedError, LabError."""
    with _site() as site:
        tell(f"in path: {plan.bursts} bursts of {plan.packets} packets, skipped, delivered and neither")
        in_path = _in_path(site, plan)
        _serve(site)
        rounds = []
        for number in range(plan.rounds):
            pair = {}
            for tracked in (True, False) if number % 2 else (False, True):
                pair["with" if tracked else "without"] = _round(site, plan, tracked=tracked)
            rounds.append(pair)
            tell(f"live round {number + 1} of {plan.rounds}: {_line(pair)}")
    return _figures(plan, in_path, rounds), {"in_path_ns": in_path, "rounds": rounds}


def _figures(
    plan: LivePlan, in_path: Mapping[str, Sequence[float]], rounds: Sequence[Mapping[str, Any]]
) -> tuple[Figure, ...]:
    def share(load: Mapping[str, Any]) -> float:
        return 100.0 * float(load["within"]) / float(load["asked"])

    without = [share(pair["without"]["ask"]) for pair in rounds]
    with_it = [share(pair["with"]["ask"]) for pair in rounds]
    watched = [pair["with"]["watch"] for pair in rounds]
    median = statistics.median
    quiet = in_path["without"]
    return (
        figure(
            "in_path_skipped_us",
            _above(in_path["skipped"], quiet[:-1:2], quiet[1::2]),
            "µs",
            of=median,
            goal=at_most(0.35),
        ),
        figure(
            "in_path_delivered_us",
            _above(in_path["delivered"], quiet[1::2], quiet[2::2]),
            "µs",
            of=median,
            goal=at_most(1.0),
        ),
        figure("live_in_time_without", without, "%", of=median),
        figure("live_in_time_with", with_it, "%", of=median),
        figure(
            "live_loss_points",
            [a - b for a, b in zip(without, with_it, strict=True)],
            "points",
            of=median,
            goal=at_most(0.3),
        ),
        figure("live_cpu_share", [w["cpu_s"] / plan.seconds for w in watched], of=median, goal=at_most(0.10)),
        figure("ring_drops", [float(w["dropped"]) for w in watched], "frames", of=sum, goal=at_most(0)),
    )


def _above(samples: Sequence[float], before: Sequence[float], after: Sequence[float]) -> list[float]:
    """Microseconds of each burst above the quiet ones around it."""
    return [(value - (a + b) / 2) / 1e3 for value, a, b in zip(samples, before, after, strict=True)]


def _line(pair: Mapping[str, Any]) -> str:
    parts = [
        f"{name} {100 * one['ask']['within'] / one['ask']['asked']:.2f} % in time"
        for name, one in sorted(pair.items())
    ]
    return f"{', '.join(parts)}, tracker {pair['with']['watch']['cpu_s']:.2f} s of a core"


# -- in the path of a packet ---------------------------------------------------------------


def _in_path(site: _Site, plan: LivePlan) -> dict[str, list[float]]:
    """Nanoseconds of the sender per packet: quiet bursts, and between them one of each kind in turns."""
    # To a hardware address nobody has: the bridge floods it, and no stack answers.
    frame = _frame(_PAYLOAD_BYTES)
    key = frame[26:38]
    out: dict[str, list[float]] = {"without": [], "skipped": [], "delivered": []}
    with netns.run_in(site.guest, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)) as wire:
        wire.bind(("eth0", 0))

        def burst() -> float:
            send, count = wire.send, plan.packets
            began_ns = time.thread_time_ns()
            for _ in range(count):
                send(frame)
            return (time.thread_time_ns() - began_ns) / count

        burst()
        for _ in range(plan.bursts):
            for kind in ("skipped", "delivered"):
                out["without"].append(burst())
                with netns.run_in(site.host, lambda: PacketRing(TAP)) as ring:
                    if ring.capture != "ebpf":
                        raise RefusedError("this kernel does not let us measure", cause=ring.capture)
                    if kind == "skipped":
                        ring.skip(key, 0, 1 << 20)
                    out[kind].append(burst())
                    _check_burst(ring, kind, plan.packets, len(frame))
        out["without"].append(burst())
    return out


def _check_burst(ring: PacketRing, kind: str, packets: int, frame_bytes: int) -> None:
    """What was measured is what was meant."""
    kept = 0
    while (block := ring.read_block()) is not None:
        kept += int((block.wire_lens == frame_bytes).sum())  # the interface has a few frames of its own
    if ring.drops() or kept != (0 if kind == "skipped" else packets):
        raise LabError(f"of {packets} packets that were to be {kind}, {kept} came through")


def _frame(payload_bytes: int) -> bytes:
    """A TCP segment from the guest's web server."""
    total = 40 + payload_bytes
    addresses = IPv4Address(GUEST).packed + IPv4Address(CLIENT).packed
    ip = struct.pack("!BBHHHBBH", 0x45, 0, total, 1, 0x4000, 64, 6, 0) + addresses
    tcp = struct.pack("!HHIIHHHH", 80, 5555, 1000, 1, 0x5000 | ACK, 500, 0, 0)
    return b"\x02vgnob" + bytes.fromhex(MAC.replace(":", "")) + b"\x08\x00" + ip + tcp + b"x" * payload_bytes


# -- under load ----------------------------------------------------------------------------


def _round(site: _Site, plan: LivePlan, *, tracked: bool) -> dict[str, Any]:
    """The load once -> what each part found."""
    # The clients share a processor, so that the other is the server's and the tracker's.
    load = {"processor": 0, "address": GUEST, "seconds": plan.seconds}
    parts = ["ask", "pull", *(["watch"] if tracked else [])]
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "watch": (site.host, {"tap": TAP, "mac": MAC}),
        "pull": (site.clients, {**load, "path": "/bulk", "rate_bytes_s": plan.bulk_bytes_s}),
        "ask": (
            site.clients,
            {
                **load,
                "path": "/small",
                "rate_hz": plan.rate_hz,
                "connections": plan.connections,
                "within_s": plan.within_s,
            },
        ),
    }
    with contextlib.ExitStack() as stack:
        running: dict[str, subprocess.Popen[str]] = {}
        # The watcher first: it is to see every connection from its beginning.
        for name in reversed(parts):
            namespace, words = options[name]
            running[name] = stack.enter_context(_part(name, namespace, words))
        found = {name: json.loads(_told(running[name], plan.seconds + _READY_S)) for name in ("ask", "pull")}
        if tracked:
            watcher = running["watch"]
            assert watcher.stdin is not None
            watcher.stdin.close()
            found["watch"] = json.loads(_told(watcher, _READY_S))
    return found


@contextlib.contextmanager
def _part(name: str, namespace: str, options: Mapping[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """A process of the load, once it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-m", "virtgrid.bench.live_parts", name, namespace, json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if (told := _told(process, _READY_S)) != "ready":
            raise LabError(f"the measurement's part '{name}' said '{told}'")
        yield process
    finally:
        _end(process)


def _told(process: subprocess.Popen[str], within_s: float) -> str:
    """The next line a part says. Errors: LabError when it ended, DeadlineError."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], within_s)[0]:
        raise DeadlineError("a part of the measurement did not answer")
    line = process.stdout.readline()
    if not line:
        raise LabError("a part of the measurement ended too soon")
    return line.rstrip("\n")


def _end(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# -- the site ------------------------------------------------------------------------------


@contextlib.contextmanager
def _site() -> Iterator[_Site]:
    """Host, guest and clients; what a run that was killed left behind is removed."""
    if os.geteuid() != 0:
        raise RefusedError("measuring the live tracker needs root", hint="--only offline needs none")
    for name in netns.names(_PREFIX):
        if (pid := name[len(_PREFIX) : -1]).isdigit() and process_started(int(pid)) is None:
            netns.delete(name)
    tag = f"{_PREFIX}{os.getpid()}"
    with contextlib.ExitStack() as undo:
        home = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="vg-bench-")))
        site = _Site(host=f"{tag}h", guest=f"{tag}g", clients=f"{tag}c", home=home)
        for name in (site.host, site.guest, site.clients):
            netns.create(name)
            undo.callback(netns.delete, name)
        with Links(site.host) as links:
            links.bridge("br0")
            for port, namespace in ((TAP, site.guest), ("vcli0", site.clients)):
                links.veth(port, peer="eth0", peer_namespace=namespace)
                links.enslave(port, "br0")
                links.up(port)
        for namespace, address, mac in ((site.guest, GUEST, MAC), (site.clients, CLIENT, None)):
            with Links(namespace) as links:
                links.up("eth0", mac=mac)
                links.address("eth0", address, 24)
        undo.callback(_stop_all, site)
        yield site


def _stop_all(site: _Site) -> None:
    for process in site.processes:
        process.terminate()
        _end(process)


def _serve(site: _Site) -> None:
    """A web server in the guest. Errors: NotFoundError, LabError."""
    if not _NGINX.exists():
        raise NotFoundError("nginx is not installed", hint="apt install nginx-light")
    www = site.home / "www"
    www.mkdir()
    site.home.chmod(0o755)
    (www / "small").write_bytes(b"x" * 1000)
    with (www / "bulk").open("wb") as file:
        file.truncate(_BULK_BYTES)
    configuration = site.home / "nginx.conf"
    configuration.write_text(_CONFIGURATION.format(home=site.home, guest=GUEST))
    # Ended by the kernel when this process is killed: setpriv asks for it.
    site.processes.append(
        subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "TERM", "ip", "netns", "exec", site.guest),
                *(str(_NGINX), "-p", str(site.home), "-c", str(configuration)),
            ],
            text=True,
        )
    )
    end_s = time.monotonic() + _READY_S
    while True:
        try:
            netns.run_in(site.clients, lambda: socket.create_connection((GUEST, 80), timeout=5)).close()
            return
        except OSError as error:
            if time.monotonic() > end_s or site.processes[-1].poll() is not None:
                raise LabError("the web server to measure with does not answer", cause=str(error)) from error
            time.sleep(0.02)
