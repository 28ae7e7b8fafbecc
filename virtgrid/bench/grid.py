"""``virtgrid bench grid``: what a reservation over several sites costs, and whether anything is promised
twice.

``commit_ms``: one user, one coordinator, two CRMs and an NRM, all processes of their own;
``commit_ms_slurm``: the same with both CRMs over a Slurm of four nodes, two for each.
``hold_p99_ms_…``: the stores of a site and of a network with so many reservations in them, and a HOLD on
the disk. Then coordinators race for the same few nodes, and what everybody was granted is compared with
what everybody else was. ``rate_error_share``: what a guarantee of bandwidth is worth (``rates``).
``first_rank_s``: jobs over four sandboxes at two sites of a lab, by their journals. ``hub_…``: many
NodeManagers on one CRM (``hub``).
"""

from __future__ import annotations

import asyncio
import random
import secrets
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from virtgrid.bench import hub, rates
from virtgrid.bench.grid_parts import PROVIDERS, SITES, database, endpoint, running
from virtgrid.bench.rates import Rate
from virtgrid.bench.result import Figure, Result, at_most, figure
from virtgrid.bench.where import environment
from virtgrid.core.errors import VirtgridError
from virtgrid.grid.coalloc.provider import Record
from virtgrid.grid.crm.stock import SiteStock
from virtgrid.grid.messages.coalloc import (
    CANCEL,
    RESERVE,
    Grant,
    Hold,
    HoldState,
    Nodes,
    Paths,
    ReservationState,
    Reserve,
    SiteWish,
    View,
    Wanted,
    Window,
)
from virtgrid.grid.messages.coalloc import Path as Way
from virtgrid.grid.messages.common import parse
from virtgrid.grid.messages.job import JobState, JobTold, Wrote
from virtgrid.grid.nrm.stock import NetworkStock
from virtgrid.grid.store import units
from virtgrid.grid.store.audit import audit
from virtgrid.grid.store.bulk import fill
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.promises import Promises
from virtgrid.lab.gridlab import GridLab, JournalLine
from virtgrid.lab.lab import obstacle
from virtgrid.lab.layout import LabConfig, LinkSpec
from virtgrid.lab.slurm import cluster
from virtgrid.lab.slurm.cluster import Cluster
from virtgrid.lab.stage import Tell, lab_name, staged
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.line import Line, deaf

_NODES: Final = tuple(f"n{number}" for number in range(256))
_RANGE: Final = "10.64.0.0/16"
_LINK: Final = ("alpha", "beta")
_CAPACITY_BYTES_S: Final = 1_250_000_000_000
_RATE_BYTES_S: Final = 12_500_000


@dataclass(frozen=True, slots=True, kw_only=True)
class GridPlan:
    """commits: reservations, one after the other. stored: reservations in a full store; holds: tried there.
    racers: coordinators that race; race_s: for how long. rate_rounds, rate_seconds: of guarantees. jobs: run
    in a lab, where one can be. managers: NodeManagers on one CRM, manager_rounds times for manager_s.
    """

    commits: int = 100
    stored: int = 100_000
    holds: int = 1000
    racers: int = 8
    race_s: float = 60.0
    rate_rounds: int = 5
    rate_seconds: int = 5
    jobs: int = 5
    managers: int = 1000
    manager_rounds: int = 5
    manager_s: float = 5.0
    seed: int = 1


@dataclass(slots=True)
class Samples:
    """Milliseconds, a list for each thing; and how the race went."""

    commit: list[float] = field(default_factory=list)
    commit_slurm: list[float] = field(default_factory=list)
    hold: dict[str, list[float]] = field(default_factory=dict)
    hold_empty: dict[str, list[float]] = field(default_factory=dict)
    hold_cpu: dict[str, list[float]] = field(default_factory=dict)
    refused: dict[str, list[float]] = field(default_factory=dict)
    won: int = 0
    lost: int = 0
    unknown: int = 0
    race_s: float = 0.0
    twice: tuple[str, ...] = ()
    rates: list[Rate] = field(default_factory=list)
    first_rank: list[float] = field(default_factory=list)
    crews_up: list[float] = field(default_factory=list)
    job: list[float] = field(default_factory=list)
    hub: hub.HubSamples = field(default_factory=hub.HubSamples)


def measure(plan: GridPlan, tell: Tell) -> Result:
    """All of it, in a directory that is removed afterwards."""
    samples = Samples()
    where = environment()
    with tempfile.TemporaryDirectory(prefix="virtgrid-bench-") as directory:
        _commits(plan, samples, Path(directory) / "commit", tell)
        _slurm_commits(plan, samples, Path(directory) / "slurm", tell)
        _stores(plan, samples, Path(directory), tell)
        _race(plan, samples, Path(directory) / "race", tell)
        samples.hub = hub.measure(
            plan.managers, plan.manager_rounds, plan.manager_s, Path(directory) / "hub", tell
        )
    if reason := obstacle():
        tell(f"guarantees of bandwidth are not measured: {reason}")
    else:
        samples.rates = rates.measure(plan.rate_rounds, plan.rate_seconds, tell)
    _jobs(plan, samples, tell)
    return Result(bench="grid", environment=where, figures=figures(plan, samples), raw=_raw(samples))


def figures(plan: GridPlan, samples: Samples) -> tuple[Figure, ...]:
    """Pure."""
    thousands = f"{plan.stored // 1000}k"
    found = [figure("commit_ms", samples.commit, "ms", of=statistics.median, goal=at_most(100, "ms"))]
    embedded = statistics.median(samples.commit) if samples.commit else None
    slurm = samples.commit_slurm
    found.append(figure("commit_ms_slurm", slurm, "ms", of=statistics.median, peer=embedded))
    holds = [took for times in samples.hold.values() for took in times]
    empty = [took for times in samples.hold_empty.values() for took in times]
    peer = _p99(empty) if empty else None
    goal = at_most(20, "ms")
    found.append(figure(f"hold_p99_ms_{thousands}", holds, "ms", of=_p99, peer=peer, goal=goal))
    cpu = [took for times in samples.hold_cpu.values() for took in times]
    found.append(figure(f"hold_cpu_p99_ms_{thousands}", cpu, "ms", of=_p99))
    for name, times in samples.hold.items():
        found.append(figure(f"hold_median_ms_{thousands}_{name}", times, "ms", of=statistics.median))
    for name, times in samples.refused.items():
        found.append(figure(f"refused_p99_ms_{thousands}_{name}", times, "ms", of=_p99))
    twice = [float(len(samples.twice))] if samples.won else []
    found.append(figure("double_allocations", twice, goal=at_most(0)))
    rate = [samples.won / samples.race_s] if samples.race_s else []
    found.append(figure("race_won_per_s", rate, "1/s"))
    for name, values in (
        ("first_rank_s", samples.first_rank),
        ("crews_up_s", samples.crews_up),
        ("job_s", samples.job),
    ):
        found.append(figure(name, values, "s", of=statistics.median))
    return (*found, *hub.figures(samples.hub), *rates.figures(samples.rates))


# -- one user ------------------------------------------------------------------------------------


def _commits(plan: GridPlan, samples: Samples, directory: Path, tell: Tell) -> None:
    tell(f"{plan.commits} reservations over two sites and a network, one after the other")
    with running(directory, coordinators=["grc"]):
        asyncio.run(_one_user(plan.commits, endpoint(directory, "grc"), samples.commit))


def _slurm_commits(plan: GridPlan, samples: Samples, directory: Path, tell: Tell) -> None:
    """Nothing where there can be no Slurm: then the figure has no value."""
    if reason := cluster.obstacle():
        tell(f"no figure of Slurm: {reason}")
        return
    tell(f"{plan.commits} reservations over two sites on Slurm and a network, one after the other")
    with Cluster() as slurm, running(directory, coordinators=["grc"], slurm=slurm):
        asyncio.run(_one_user(plan.commits, endpoint(directory, "grc"), samples.commit_slurm))


async def _one_user(count: int, where: Endpoint, into: list[float]) -> None:
    line = await dial(where, deaf, name="the coordinator")
    for number in range(count):
        began_s = time.perf_counter()
        # Every other hour: with Slurm there is a guard time between two windows.
        view = await _reserve(line, _wish(f"c{number}", hour=2 * number, nodes=2))
        if view.state is ReservationState.COMMITTED:
            into.append((time.perf_counter() - began_s) * 1000)
    await line.close()


async def _reserve(line: Line, wish: Reserve) -> View:
    raw = await line.call(RESERVE, wish.model_dump(mode="json"), deadline_s=60)
    return parse(View, RESERVE, raw)


def _wish(id_: str, *, hour: int, nodes: int) -> Reserve:
    at_s = int(time.time()) + 3600 + hour * 3600
    return Reserve(
        id=id_,
        window=Window(begins_at_s=at_s, ends_at_s=at_s + 3600),
        sites=tuple(SiteWish(site=site, nodes=nodes) for site in SITES),
        bandwidth_bytes_s=_RATE_BYTES_S,
    )


# -- full stores ---------------------------------------------------------------------------------


def _stores(plan: GridPlan, samples: Samples, directory: Path, tell: Tell) -> None:
    site = SiteStock(nodes=_NODES, ranges=[_RANGE])
    network = NetworkStock(links={_LINK: _CAPACITY_BYTES_S}, segments=(1, 1 << 20))
    now_s = int(time.time())
    records = packed(plan.stored, _random(f"{plan.seed}stored"), now_s)
    last_s = max(record.window.ends_at_s for record in records)
    for name, stock in (("site", site), ("network", network)):
        tell(f"a {name} with {plan.stored:,} reservations")
        for count, into in ((0, samples.hold_empty), (plan.stored, samples.hold)):
            rng = _random(f"{plan.seed}asked")
            path = directory / f"{name}-{count}.db"
            with Database(path) as opened:
                with opened.write() as connection:
                    stock.prepare(connection)
                some = [_only(record, name) for record in records[:count]]
                fill(opened, some, flows={"-".join(_LINK): _RATE_BYTES_S} if name == "network" else {})
            # Opened anew: what filling left in the log is not of the first HOLD to clear away.
            with Database(path) as opened:
                promises = Promises(opened, name, stock)
                asked = [_asked(name, rng, now_s, last_s) for _ in range(plan.holds)]
                took = _holds(promises, asked, now_s)
                into[name] = took.granted
                if count:
                    samples.refused[name], samples.hold_cpu[name] = took.refused, took.granted_cpu
                samples.twice += tuple(audit(opened))


def packed(count: int, rng: random.Random, now_s: int) -> list[Record]:
    """So many reservations of 1 to 8 nodes for 10 minutes to a day, half of the time of each node taken."""
    free_s = dict.fromkeys(_NODES, now_s + 3600)
    ranges_s = [now_s + 3600] * 4096
    found = []
    for number in range(count):
        nodes = sorted(rng.sample(_NODES, 8), key=free_s.__getitem__)[: rng.choice((1, 2, 2, 4))]
        lasts_s = rng.choice((600, 1800, 3600, 3600, 14400, 86400))
        place = min(rng.sample(range(4096), 4), key=ranges_s.__getitem__)
        begins_s = max(ranges_s[place], *(free_s[node] for node in nodes)) + rng.randrange(2 * lasts_s)
        for node in nodes:
            free_s[node] = begins_s + lasts_s
        ranges_s[place] = begins_s + lasts_s
        found.append(
            Record(
                key=f"full-{number:08d}",
                print="",
                owner="uid:0",
                reservation=f"full-{number}",
                window=Window(begins_at_s=begins_s, ends_at_s=begins_s + lasts_s),
                expires_at_s=now_s + 30,
                state=HoldState.COMMITTED,
                grant=Grant(nodes=tuple(nodes), addresses=_block(place), segment=place + 1),
            )
        )
    return found


def _only(record: Record, name: str) -> Record:
    """What a site has of it, or a network."""
    given = record.grant.model_dump()
    kept = {"nodes", "addresses"} if name == "site" else {"segment"}
    return replace(record, grant=Grant(**{key: value for key, value in given.items() if key in kept}))


def _block(place: int) -> str:
    return f"10.64.{place // 16}.{place % 16 * 16}/28"


def _asked(name: str, rng: random.Random, now_s: int, last_s: int) -> Hold:
    begins_s = rng.randrange(now_s + 3600, last_s)
    wanted: Wanted
    if name == "site":
        wanted = Nodes(nodes=rng.choice((1, 2, 4, 8)), addresses=_block(rng.randrange(4096)))
    else:
        wanted = Paths(sites=_LINK, paths=(Way(between=_LINK, rate_bytes_s=_RATE_BYTES_S),))
    return Hold(
        key=secrets.token_urlsafe(12),
        reservation="measured",
        window=Window(begins_at_s=begins_s, ends_at_s=begins_s + rng.choice((600, 3600, 14400, 86400))),
        ttl_s=600,
        asked_at_s=now_s,
        wanted=wanted,
    )


@dataclass(slots=True)
class _Took:
    granted: list[float] = field(default_factory=list)
    granted_cpu: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)


def _holds(promises: Promises, asked: Iterable[Hold], now_s: int) -> _Took:
    took = _Took()
    for number, hold in enumerate(asked):
        began_s, cpu_s = time.perf_counter(), time.process_time()
        # Each of another coordinator: the bound on open holds is not what is measured.
        answer = promises.hold(hold, owner=f"uid:{number}", now_s=now_s)
        elapsed_ms = (time.perf_counter() - began_s) * 1000
        if answer.standing is not None:
            took.granted.append(elapsed_ms)
            took.granted_cpu.append((time.process_time() - cpu_s) * 1000)
        else:
            took.refused.append(elapsed_ms)
    return took


# -- a race --------------------------------------------------------------------------------------


def _race(plan: GridPlan, samples: Samples, directory: Path, tell: Tell) -> None:
    names = [f"grc{number}" for number in range(plan.racers)]
    tell(f"{plan.racers} coordinators race for {plan.race_s:g} s")
    with running(directory, coordinators=names):
        asyncio.run(_racers(plan, names, directory, samples))
    for name in PROVIDERS:
        with Database(database(directory, name)) as opened:
            samples.twice += tuple(f"{name}: {problem}" for problem in audit(opened))


async def _racers(plan: GridPlan, names: Sequence[str], directory: Path, samples: Samples) -> None:
    began_s = time.perf_counter()
    until_s = began_s + plan.race_s
    standing: dict[str, View] = {}
    races = (
        _racer(endpoint(directory, name), name, _random(f"{plan.seed}{name}"), until_s, samples, standing)
        for name in names
    )
    await asyncio.gather(*races)
    samples.race_s = time.perf_counter() - began_s


async def _racer(
    where: Endpoint,
    name: str,
    rng: random.Random,
    until_s: float,
    samples: Samples,
    standing: dict[str, View],
) -> None:
    """Reserves a part of each site in one of a few windows, and gives back what it had when it gets more.

    standing: what certainly stands at this moment, of all racers: answered, and not yet cancelled.
    """
    line = await dial(where, deaf, name=name)
    number = 0
    while time.perf_counter() < until_s:
        wish = _wish(f"{name}-{number}", hour=rng.randrange(6), nodes=rng.choice((1, 4, 8)))
        number += 1
        try:
            view = await _reserve(line, wish)
        except VirtgridError:
            samples.unknown += 1
            continue
        if view.state is ReservationState.COMMITTED:
            samples.won += 1
            samples.twice += tuple(clashes(view, standing.values()))
            standing[view.id] = view
            for id_ in [one for one in standing if one.startswith(f"{name}-") and one != view.id]:
                del standing[id_]
                await line.call(CANCEL, {"id": id_}, deadline_s=60)
        elif view.state in (ReservationState.RELEASED, ReservationState.RELEASING):
            samples.lost += 1
        else:
            samples.unknown += 1
    await line.close()


def clashes(view: View, others: Iterable[View]) -> Iterator[str]:
    """What of a reservation others have at the same time. Pure."""
    mine = _granted(view)
    for other in others:
        apart = (
            other.window.ends_at_s <= view.window.begins_at_s
            or view.window.ends_at_s <= other.window.begins_at_s
        )
        for unit in () if apart else sorted(mine & _granted(other)):
            yield f"{unit} is promised to {other.id} and to {view.id}"


def _granted(view: View) -> set[str]:
    found: set[str] = set()
    for one in view.parties:
        if one.grant is not None:
            found.update(one.grant.nodes)
            found.update(units.granules(one.grant.addresses) if one.grant.addresses else ())
            found.update(() if one.grant.segment is None else (f"segment {one.grant.segment}",))
    return found


# -- jobs ----------------------------------------------------------------------------------------


def _jobs(plan: GridPlan, samples: Samples, tell: Tell) -> None:
    """One MPI program after the other; without a lab there is nothing to measure."""
    if (reason := obstacle()) is not None:
        tell(f"no jobs: {reason}")
        return
    config = LabConfig(name=lab_name("grid"), wan=LinkSpec(rate_bytes_s=125e6))
    with staged(config, tell) as stage, GridLab(stage.lab, rate="1gbit") as grid:
        sites = ",".join(f"{site.name}:{grid.nodes}" for site in grid.sites)
        options = ["--nodes", sites, "--bandwidth", "100mbit", "--walltime", "5m"]
        command = ["mpirun", "-np", str(grid.nodes * len(grid.sites)), "hostname"]
        tell(f"{plan.jobs} jobs of {' '.join(command)}, one after the other")
        for _ in range(plan.jobs):
            _one_job(list(grid.job(options, command)), samples)


def _one_job(lines: Sequence[JournalLine], samples: Samples) -> None:
    def first(state: JobState) -> float | None:
        told = (line.at_s for line in lines if isinstance(line, JobTold) and line.state is state)
        return next(told, None)

    began_s, up_s, over_s = first(JobState.MUSTERING), first(JobState.LAUNCHING), first(JobState.OVER)
    wrote_s = next((line.at_s for line in lines if isinstance(line, Wrote)), None)
    if began_s is not None and up_s is not None and over_s is not None and wrote_s is not None:
        samples.crews_up.append(up_s - began_s)
        samples.first_rank.append(wrote_s - began_s)
        samples.job.append(over_s - lines[0].at_s)


# -- numbers -------------------------------------------------------------------------------------


def _random(seed: str) -> random.Random:
    return random.Random(seed)  # noqa: S311 - a sample, not a secret


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def _raw(samples: Samples) -> dict[str, Any]:
    def rounded(values: Iterable[float]) -> list[float]:
        return [round(value, 3) for value in values]

    return {
        "commit_ms": rounded(samples.commit),
        "commit_ms_slurm": rounded(samples.commit_slurm),
        "hold_ms": {name: rounded(times) for name, times in samples.hold.items()},
        "hold_empty_ms": {name: rounded(times) for name, times in samples.hold_empty.items()},
        "refused_ms": {name: rounded(times) for name, times in samples.refused.items()},
        "race": {"won": samples.won, "lost": samples.lost, "unknown": samples.unknown},
        "promised_twice": list(samples.twice),
        "rates": [one.as_dict() for one in samples.rates],
        "first_rank_s": rounded(samples.first_rank),
        "crews_up_s": rounded(samples.crews_up),
        "job_s": rounded(samples.job),
        "hub_notes_per_s": rounded(samples.hub.notes_s),
    }
