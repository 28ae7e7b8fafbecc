"""``virtgrid bench``: the papers' tables, measured on this machine."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from virtgrid.bench import grid as gridding
from virtgrid.bench import hold as holding
from virtgrid.bench import migrate as migrating
from virtgrid.bench import network as networking
from virtgrid.bench import protocols as protocols_
from virtgrid.bench import result
from virtgrid.bench import sandbox as sandboxing
from virtgrid.bench import switchover as switching
from virtgrid.bench import tracker as tracking
from virtgrid.bench.tracker_live import LivePlan
from virtgrid.cli.output import print_json, print_table, run
from virtgrid.core.errors import UsageError
from virtgrid.core.units import parse_duration, parse_rate
from virtgrid.lab.lab import require_possible
from virtgrid.lab.layout import LinkSpec
from virtgrid.lab.load.profile import SHAPES
from virtgrid.lab.servers.host import require_possible as require_servers
from virtgrid.lab.stage import Tell

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Measure: plain libvirt and gated, side by side, in a lab of its own.",
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quick = Annotated[bool, typer.Option("--quick", help="A smaller sample of the same thing.")]
Rate = Annotated[str, typer.Option(help="Of the WAN, each way.")]
Rtt = Annotated[str, typer.Option(help="Of the WAN, there and back.")]
Journals = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Keep the journals of all migrations there.")
]
Seed = Annotated[int, typer.Option(help="Of the load; the same seed gives the same sessions.")]


def _telling() -> Tell:
    """Progress on standard error, each line with the time since the beginning."""
    began_s = time.monotonic()

    def tell(text: str) -> None:
        minutes, seconds = divmod(time.monotonic() - began_s, 60)
        print(f"{int(minutes):02d}:{seconds:04.1f} {text}", file=sys.stderr, flush=True)

    return tell


def _print(found: result.Result, as_json: bool) -> None:
    if as_json:
        print_json(found.as_dict())
        return
    where = found.environment
    guests = f" guests by {where['accelerator']}," if "accelerator" in where else ""
    print(
        f"bench {found.bench}   {where['processors']} × {where['processor']},{guests}"
        f" load {where['load_before']} before"
    )
    if guests:
        print(f"{where['libvirt'] or 'libvirt unknown'} · {where['qemu'] or 'QEMU unknown'}")
    print()
    print_table(result.COLUMNS, result.rows(found))
    if found.missed:
        print(f"\ngoals missed: {', '.join(one.name for one in found.missed)}")


def _count(option: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise UsageError(f"{option} must be between {low} and {high}, not {value}")
    return value


@app.command()
@run
def hold(
    rate: Rate = "100mbit",
    rtt: Rtt = "100ms",
    seconds: Annotated[
        str | None, typer.Option("--hold", metavar="TIME", help="Hold each guest this long.")
    ] = None,
    migrations: Annotated[int | None, typer.Option(help="How many in a row under load.")] = None,
    sessions: Annotated[int, typer.Option(help="Sessions of the load.")] = 40,
    seed: Seed = 1,
    journals: Journals = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Hold an idle and a busy guest, and let go: how long, at what price, how fast."""
    plan = holding.HoldPlan(
        rate_bytes_s=parse_rate(rate),
        rtt_s=parse_duration(rtt),
        sessions=_count("--sessions", sessions, 1, 2000),
        seed=seed,
    )
    if quick:
        plan = replace(plan, hold_s=8.0, migrations=2)
    if seconds is not None:
        plan = replace(plan, hold_s=parse_duration(seconds))
    if migrations is not None:
        plan = replace(plan, migrations=_count("--migrations", migrations, 1, 1000))
    if not 1 <= plan.hold_s <= 3600:
        raise UsageError(f"--hold must be between 1 s and an hour, not {seconds}")
    require_possible()
    _print(holding.measure(plan, _telling(), journals=journals), as_json)


@app.command()
@run
def migrate(
    runs: Annotated[int | None, typer.Option(help="Plain and gated, so many times each.")] = None,
    rate: Rate = "100mbit",
    rtt: Rtt = "100ms",
    sessions: Annotated[int, typer.Option(help="Sessions of the load.")] = 60,
    load: Annotated[str, typer.Option(help="bursty or steady.")] = "bursty",
    policy: Annotated[
        str | None,
        typer.Option(
            help="Of the gated ones: backoff, adaptive or strict; both: adaptive beside back-off,"
            " with the time back-off took. Default: backoff, for a steady load both."
        ),
    ] = None,
    seed: Seed = 1,
    journals: Journals = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Plain libvirt and gated, interleaved under one load: who was hurt, and what it cost."""
    policy = policy or ("backoff" if load == "bursty" else "both")
    if load not in SHAPES:
        raise UsageError(f"--load must be one of {', '.join(SHAPES)}, not '{load}'")
    if policy not in migrating.POLICIES:
        raise UsageError(f"--policy must be one of {', '.join(migrating.POLICIES)}, not '{policy}'")
    plan = migrating.MigratePlan(
        runs=_count("--runs", (1 if quick else 3) if runs is None else runs, 1, 1000),
        rate_bytes_s=parse_rate(rate),
        rtt_s=parse_duration(rtt),
        sessions=_count("--sessions", sessions, 1, 2000),
        load=load,
        policy=policy,
        seed=seed,
        after_s=5.0 if quick else 8.0,
    )
    require_possible()
    _print(migrating.measure(plan, _telling(), journals=journals), as_json)


@app.command()
@run
def switchover(
    runs: Annotated[
        int | None, typer.Option(help="Plain, gated, flipped and drained migrations, so many times each.")
    ] = None,
    rate: Rate = "100mbit",
    rtt: Rtt = "100ms",
    client_rtt: Annotated[str, typer.Option(help="Between the clients and the first site.")] = "20ms",
    journals: Journals = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """What clients feel of the moment itself: pings lost, open and new connections standing still."""
    plan = switching.SwitchoverPlan(
        runs=_count("--runs", (1 if quick else 5) if runs is None else runs, 1, 1000),
        rate_bytes_s=parse_rate(rate),
        rtt_s=parse_duration(rtt),
        client_rtt_s=parse_duration(client_rtt),
    )
    require_possible()
    _print(switching.measure(plan, _telling(), journals=journals), as_json)


@app.command()
@run
def protocols(
    protocol: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(protocols_.PROTOCOLS)}; may be given again. Default: all."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Pauses of each kind, for each protocol.")] = None,
    pause: Annotated[str, typer.Option(metavar="TIME", help="How long the guest is stopped.")] = "300ms",
    sessions: Annotated[int, typer.Option(help="Sessions of the load.")] = 12,
    rate: Rate = "100mbit",
    rtt: Rtt = "20ms",
    seed: Seed = 1,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Does the gate help FTP and mail? Real servers, stopped plain and gated; needs no QEMU."""
    if unknown := set(protocol or ()) - set(protocols_.PROTOCOLS):
        raise UsageError(f"--protocol must be one of {', '.join(protocols_.PROTOCOLS)}, not '{min(unknown)}'")
    plan = protocols_.ProtocolsPlan(
        protocols=tuple(protocol or protocols_.PROTOCOLS),
        rounds=_count("--rounds", (2 if quick else 12) if rounds is None else rounds, 1, 1000),
        pause_s=parse_duration(pause),
        sessions=_count("--sessions", sessions, 1, 500),
        link=LinkSpec(rate_bytes_s=parse_rate(rate), rtt_s=parse_duration(rtt)),
        seed=seed,
    )
    if not 0.01 <= plan.pause_s <= 10:
        raise UsageError(f"--pause must be between 10 ms and 10 s, not {pause}")
    require_servers()
    _print(protocols_.measure(plan, _telling()), as_json)


@app.command()
@run
def tracker(
    scale: Annotated[
        float | None, typer.Option(help="Of the captures; 1 is about 850,000 packets and 1 GB.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="How often each file is read by each program.")] = None,
    seed: Annotated[int, typer.Option(help="Of the captures.")] = 1,
    live_rounds: Annotated[
        int | None, typer.Option(help="How often the live load runs, with a tracker and without (20).")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="PART", help="Only this: offline (captures) or live (needs root).")
    ] = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Follow connections in captures, beside dpkt and tshark, and on a tap under load: what it costs."""
    if only not in (None, "offline", "live"):
        raise UsageError(f"--only: '{only}' is neither offline nor live")
    plan, live = tracking.TrackerPlan(seed=seed), LivePlan()
    if quick:
        live = replace(live, bursts=8, rounds=3, seconds=1.0)
        plan = replace(plan, scale=0.1, rounds=3, idle=(0, 10_000))
    if scale is not None:
        if not 0.001 <= scale <= 10:
            raise UsageError(f"--scale must be between 0.001 and 10, not {scale:g}")
        plan = replace(plan, scale=scale)
    if rounds is not None:
        plan = replace(plan, rounds=_count("--rounds", rounds, 1, 1000))
    if live_rounds is not None:
        live = replace(live, rounds=_count("--live-rounds", live_rounds, 1, 1000))
    found = tracking.measure(
        plan, _telling(), offline=only != "live", live=None if only == "offline" else live
    )
    _print(found, as_json)


@app.command()
@run
def sandbox(
    rounds: Annotated[int | None, typer.Option(help="Of each single thing.")] = None,
    many: Annotated[int | None, typer.Option(help="Sandboxes at once.")] = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Sandboxes beside lxc-start, bare libvirt and bubblewrap: there, gone, and what is left."""
    plan = sandboxing.SandboxPlan(
        rounds=_count("--rounds", (5 if quick else 30) if rounds is None else rounds, 1, 1000),
        many=_count("--many", (8 if quick else 64) if many is None else many, 1, 150),
    )
    require_possible()
    _print(sandboxing.measure(plan, _telling()), as_json)


@app.command()
@run
def network(
    rounds: Annotated[int | None, typer.Option(help="How often each combination is measured.")] = None,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """TCP and UDP, bare, from sandbox to sandbox, over a VXLAN, to a guest: throughput and CPU."""
    plan = networking.NetworkPlan()
    if quick:
        plan = networking.NetworkPlan(rounds=1, seconds=3)
    if rounds is not None:
        plan = replace(plan, rounds=_count("--rounds", rounds, 1, 1000))
    require_possible()
    _print(networking.measure(plan, _telling()), as_json)


@app.command()
@run
def grid(
    stored: Annotated[int | None, typer.Option(help="Reservations in a full store.")] = None,
    racers: Annotated[int, typer.Option(help="Coordinators that race.")] = 8,
    race: Annotated[str | None, typer.Option(metavar="TIME", help="For how long they do.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is reserved.")] = 1,
    quick: Quick = False,
    as_json: Json = False,
) -> None:
    """Reservations over two sites and a network: full stores, a race, bandwidth; jobs in them."""
    plan = gridding.GridPlan(racers=_count("--racers", racers, 2, 64), seed=seed)
    if quick:
        plan = replace(
            plan, commits=20, stored=10_000, holds=200, race_s=8.0, rate_rounds=1, rate_seconds=3, jobs=2
        )
    if stored is not None:
        plan = replace(plan, stored=_count("--stored", stored, 1000, 1_000_000))
    if race is not None:
        plan = replace(plan, race_s=parse_duration(race))
    if not 1 <= plan.race_s <= 3600:
        raise UsageError(f"--race must be between 1 s and an hour, not {race}")
    _print(gridding.measure(plan, _telling()), as_json)
