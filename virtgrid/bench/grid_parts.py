"""A small grid for ``bench grid``: two sites, a network, and as many coordinators as are wanted, real
processes.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from virtgrid.core.errors import DeadlineError
from virtgrid.lab.slurm.cluster import Cluster
from virtgrid.wire import seal
from virtgrid.wire.endpoint import Endpoint

SITES: Final = ("alpha", "beta")
NETWORK: Final = "net"
PROVIDERS: Final = (*SITES, NETWORK)
NODES: Final = 16
_START_S: Final = 90.0
_END_S: Final = 20.0


def endpoint(directory: Path, name: str) -> Endpoint:
    return Endpoint(directory / f"{name}.sock")


def database(directory: Path, name: str) -> Path:
    return directory / f"{name}.db"


@contextlib.contextmanager
def running(directory: Path, *, coordinators: Sequence[str], slurm: Cluster | None = None) -> Iterator[None]:
    """Everybody listens, each in a process of its own; at the end all are told to end.

    slurm: whose nodes the sites share out between them; without it each has so many of its own.
    """
    directory.mkdir()
    words: dict[str, list[str]] = {}
    for number, site in enumerate(SITES):
        names = [f"{site[0]}{node}" for node in range(NODES)]
        more: list[str] = []
        if slurm is not None:
            share = len(slurm.nodes) // len(SITES)
            names = list(slurm.nodes[number * share : (number + 1) * share])
            more = _on_slurm(directory, site, slurm)
        nodes = [word for name in names for word in ("--node", name)]
        words[site] = ["crm", "--site", site, *nodes, "--addresses", f"10.{77 + number}.0.0/20", *more]
    words[NETWORK] = ["nrm", "--name", NETWORK, "--link", "alpha:beta=10gbit", "--segments", "1000-1999"]
    for name in coordinators:
        crms = [word for site in SITES for word in ("--crm", f"{site}={endpoint(directory, site)}")]
        words[name] = ["grc", *crms, "--nrm", f"{NETWORK}={endpoint(directory, NETWORK)}"]
    programs: list[subprocess.Popen[bytes]] = []
    try:
        for name, said in words.items():
            kept = ["--socket", str(endpoint(directory, name)), "--database", str(database(directory, name))]
            with (directory / f"{name}.log").open("ab") as log:
                program = [sys.executable, "-m", "virtgrid.cli.main", "serve", *said, *kept]
                programs.append(subprocess.Popen(program, stderr=log))
        for name in words:
            _until_listening(endpoint(directory, name))
        yield
    finally:
        for one in programs:
            one.terminate()
        for one in programs:
            try:
                one.wait(_END_S)
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()


def _on_slurm(directory: Path, site: str, slurm: Cluster) -> list[str]:
    key = directory / f"{site}.key"
    seal.write_private(key, seal.private_text(seal.new_key()))
    return [
        "--backend", "slurm", "--slurm-conf", str(slurm.configuration), "--key", str(key),
        "--spool", str(slurm.directory / f"pilots-{site}"),
        "--pilots", f"unix:{directory}/{site}-pilots.sock",
    ]  # fmt: skip


def _until_listening(where: Endpoint) -> None:
    until_s = time.monotonic() + _START_S
    while time.monotonic() < until_s:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(where.path))
            return
        time.sleep(0.05)
    raise DeadlineError(f"nobody listens at {where} after {_START_S:g} s")
