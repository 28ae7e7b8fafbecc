"""A site over a real Slurm, in this process, on whatever clock it is given."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from virtgrid.core.clock import FakeClock
from virtgrid.grid.crm.crew import Terms
from virtgrid.grid.crm.site import Site
from virtgrid.grid.crm.slurm.backend import SlurmBackend
from virtgrid.grid.crm.slurm.tools import Slurm
from virtgrid.grid.crm.stock import SiteStock
from virtgrid.grid.provide import Stored
from virtgrid.grid.store.database import Database
from virtgrid.lab.slurm.cluster import Cluster
from virtgrid.wire import seal
from virtgrid.wire.endpoint import Endpoint

_numbers = itertools.count()
NODES = ("n1", "n2")


@dataclass
class Made:
    """name: of the site, another one each time, so that no test sees what another left."""

    name: str
    site: Site
    backend: SlurmBackend
    clock: FakeClock
    cluster: Cluster

    def reservations(self) -> list[str]:
        """The names of the reservations Slurm has for this site."""
        told = self.cluster.say("scontrol", "--oneliner", "show", "reservation", check=True).stdout
        names = [line.partition(" ")[0].partition("=")[2] for line in told.splitlines()]
        return sorted(name for name in names if name.startswith(f"vg_{self.name}_"))


def backend(name: str, cluster: Cluster, *, clock: FakeClock | None = None) -> SlurmBackend:
    return SlurmBackend(
        site=name,
        nodes=NODES,
        host=Endpoint(Path("/nowhere")),
        # Longer than in earnest: nobody waits here, and the machine may be busy.
        slurm=Slurm(cluster.configuration, answer_s=30),
        directory=cluster.directory / f"pilots-{name}",
        program=(sys.executable, "-c", "import time; time.sleep(1000)"),
        clock=clock,
    )


def new_name() -> str:
    return f"s{os.getpid()}x{next(_numbers)}"


@asynccontextmanager
async def site(
    directory: Path, cluster: Cluster, *, clock: FakeClock, name: str | None = None, ends: bool = True
) -> AsyncIterator[Made]:
    """Two nodes and 10.1.0.0/29. ends: what it has reserved at Slurm is gone afterwards."""
    name = name or new_name()
    behind = backend(name, cluster, clock=clock)
    async with AsyncExitStack() as stack:
        database = stack.enter_context(Database(directory / f"{name}.db"))
        stock = SiteStock(nodes=behind.names, ranges=["10.1.0.0/29"], guard_s=behind.guard_s)
        stored = Stored(party=name, database=database, stock=stock, clock=clock)
        stack.callback(stored.close)
        made = Site(
            stored=stored,
            stock=stock,
            database=database,
            backend=behind,
            terms=Terms(
                site=name,
                key=seal.new_key(),
                crm=Endpoint(directory / "pilots.sock"),
                memory_bytes=256 << 20,
                processes=64,
            ),
            directory=directory / f"{name}.d",
            clock=clock,
        )
        yield Made(name, await stack.enter_async_context(made), behind, clock, cluster)
        if ends:
            for hold in await behind.holds():
                await behind.withdraw(hold)
