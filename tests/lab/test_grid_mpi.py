"""Four sandboxes on two sites, keys and hostfile exchanged, run an unmodified MPI program across all four."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest
from gridsite import GridSite, grid_hosts

from virtgrid.grid.messages.node import Exec, HostEntry, SetKeys, State
from virtgrid.grid.pilots import Pilot, Pilots
from virtgrid.lab.lab import Lab
from virtgrid.wire.endpoint import Endpoint

pytestmark = pytest.mark.lab

MPI = [
    "mpirun", "--hostfile", "/etc/virtgrid/hostfile", "--mca", "btl", "tcp,self",
    "--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0",
    "--mca", "mpi_yield_when_idle", "1", "--mca", "plm_rsh_args", "-o BatchMode=yes",
]  # fmt: skip


@pytest.fixture
def sites(mended_lab: Lab) -> Iterator[list[GridSite]]:
    here, there = mended_lab.sites
    with grid_hosts([(here, there), (there, here)]) as hosts:
        yield hosts


async def test_an_unmodified_mpi_program_runs_across_two_sites(sites: list[GridSite]) -> None:
    nodes = [(sites[n // 2], f"r42-{n + 1}", n + 1) for n in range(4)]
    crm = Endpoint(sites[0].home / "crm.sock")
    async with Pilots(crm, [sites[0].key.public_key()]) as pilots:
        for site, name, _ in nodes:
            site.ticket(name)
            site.start_pilot(name, crm)
        crew: list[Pilot] = [await pilots.pilot(name) for _, name, _ in nodes]
        for pilot, (site, _, number) in zip(crew, nodes, strict=True):
            await pilot.init(site.init(number))
        entries = []
        for pilot, (site, name, number) in zip(crew, nodes, strict=True):
            await pilot.until(State.HOST_READY)
            keys = await pilot.get_keys()
            address = site.init(number).address
            entries.append(HostEntry(hostname=name, address=address, **keys.model_dump()))
        for pilot in crew:
            await pilot.set_keys(SetKeys(hosts=tuple(entries)))
            await pilot.run()
        for pilot in crew:
            await pilot.until(State.RUNNING)

        hello = await crew[0].exec(Exec(argv=(*MPI, "hostname")))
        assert hello.finished.status == 0, hello.stderr.decode()
        assert sorted(hello.stdout.decode().split()) == [name for _, name, _ in nodes]

        program = ("/usr/bin/python3", "-m", "mpi4py.bench", "ringtest", "-n", "1000", "-l", "10")
        ring = await crew[0].exec(Exec(argv=(*MPI, *program)))
        assert ring.finished.status == 0, ring.stderr.decode()
        assert re.search(rb"\(4 processes, 1000 bytes\)", ring.stdout)
        assert ring.finished.usage is not None
        assert ring.finished.usage.elapsed_s > 0

        # Strict: a host that shows another key than the one that was exchanged is refused.
        alias = ("-o", "BatchMode=yes", "-o", "HostKeyAlias=r42-2")
        wrong = await crew[0].exec(Exec(argv=("ssh", *alias, "r42-3", "true")))
        assert wrong.finished.status == 255
        assert b"Host key verification failed" in wrong.stderr

        await asyncio.gather(*(pilot.shut_down() for pilot in crew))
        for pilot in crew:
            await pilot.until(State.DONE)
            assert list(pilot.history) == [
                State.INITIATING, State.HOST_READY, State.KEYS_READY, State.STARTING_UP, State.RUNNING,
                State.SHUTTING_DOWN, State.DONE,
            ]  # fmt: skip
        for site in sites:
            for process in site.pilots:
                assert await asyncio.to_thread(process.wait, 30) == 0
            await site.until_nothing_left()
