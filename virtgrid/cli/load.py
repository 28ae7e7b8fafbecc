"""``virtgrid lab load``: put load on a guest's services and say what its clients felt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from virtgrid.cli.output import console, print_json, run
from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.core.units import format_duration, parse_duration
from virtgrid.lab.load import records
from virtgrid.lab.load.profile import profile
from virtgrid.lab.load.run import LoadResult, run_load, summary

app = typer.Typer(
    no_args_is_help=True, help="Put load on a guest and say what its clients felt.", rich_markup_mode=None
)


@app.callback()
def _group() -> None:
    """Put load on a guest and say what its clients felt."""


@app.command()
@run
def web(
    url: Annotated[str, typer.Option(metavar="http://HOST", help="The guest's web server.")],
    sessions: Annotated[int, typer.Option(help="Closed-loop sessions.")] = 260,
    load: Annotated[str, typer.Option(metavar="SHAPE", help="bursty or steady.")] = "bursty",
    duration: Annotated[str, typer.Option(metavar="TIME", help="How long; Ctrl-C ends it sooner.")] = "60s",
    seed: Annotated[int, typer.Option(help="The same seed gives the same sessions.")] = 1,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="A JSON line per request.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Web sessions after SPECweb2005's Support workload; run it in the client: virtgrid lab exec client."""
    duration_s = parse_duration(duration)
    if not 1 <= duration_s <= 86400:
        raise UsageError("--duration is out of range", hint="1 second to a day")
    chosen = profile(load, sessions)
    result = run_load(
        url,
        chosen,
        seed=seed,
        duration_s=duration_s,
        on_ready=lambda: print("ready", file=sys.stderr, flush=True),
    )
    if out is not None:
        try:
            records.write(out, result.requests)
        except OSError as error:
            raise RefusedError(f"--out: cannot write {out}", cause=error.strerror) from error
    print_json(summary(result), line=True) if as_json else _tell(result)


def _tell(result: LoadResult) -> None:
    told, say = summary(result), console()
    quality, outstanding = told["quality"], told["outstanding"]
    say.print(f"{told['requests']} requests in {format_duration(result.end_s - result.begin_s)}")
    share = quality["good_tolerable"]
    say.print(
        f"good {quality['good']}, tolerable {quality['tolerable']}, failed {quality['failed']}"
        + (f" ({share:.1%} good or tolerable)" if share is not None else "")
    )
    say.print(f"delayed by more than 100 ms: {told['delayed']}")
    for kind, taken in told["times"].items():
        if taken["count"]:
            say.print(
                f"{kind:<9} {taken['count']:>6}   median {format_duration(taken['median_s'])}"
                f"   p99 {format_duration(taken['p99_s'])}"
            )
    say.print(
        f"connections with a small request outstanding: mean {outstanding['mean']:.1f},"
        f" variance {outstanding['variance']:.0f}, none {outstanding['zero_share']:.0%} of the time,"
        f" at most {outstanding['peak']}"
    )
    for error in told["errors"]:
        say.print(f"error: {error}")
