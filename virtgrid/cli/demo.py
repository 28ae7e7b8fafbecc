"""``virtgrid lab demo``: see the difference in a few minutes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from virtgrid.cli.output import console, interactive, print_table, run
from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.core.units import format_duration
from virtgrid.lab import demo as demos
from virtgrid.lab.lab import require_possible
from virtgrid.report.lines import PlainLines
from virtgrid.report.view import LiveView

_DEFAULTS = demos.DemoPlan()

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    invoke_without_command=True,
    help="Two sites, a web guest under load, one plain and one gated migration, side by side.",
)


def _tell(text: str) -> None:
    console().print(text, style="bold" if text[:1].isdigit() else None, soft_wrap=not interactive())


@contextlib.contextmanager
def _watching() -> Iterator[demos.Watcher]:
    """The live view for a person, plain lines for a pipe."""
    if interactive():
        with LiveView(console(), keys=False) as view:
            yield view
    else:
        yield PlainLines(lambda line: print(f"  {line}", flush=True))


@app.callback()
@run
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the report goes.")] = Path("report"),
    sessions: Annotated[int, typer.Option(help="Web sessions on the guest.")] = _DEFAULTS.sessions,
    seed: Annotated[int, typer.Option(help="Of the sessions.")] = _DEFAULTS.seed,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the lab up, to look around in.")] = False,
) -> None:
    """Migrate a web guest once with plain libvirt and once gated, and show both side by side."""
    if not 1 <= sessions <= 500:
        raise UsageError(f"--sessions must be between 1 and 500, not {sessions}")
    if out.exists() and not out.is_dir():
        raise RefusedError(f"--out: {out} is not a directory")
    require_possible()
    plan = demos.DemoPlan(sessions=sessions, seed=seed)
    _tell(
        f"Two sites on this machine, a WAN of {plan.rate_bytes_s * 8 / 1e6:g} Mbit/s"
        f" and {format_duration(plan.rtt_s)} between them, a web guest with {sessions} sessions."
    )
    _tell("It is migrated twice, disk and all; this takes two to four minutes.\n")
    plain, gated, lab = demos.play(plan, _tell, _watching, keep=keep)
    print_table(("", "PLAIN", "GATED"), demos.rows(plain, gated))
    _tell(f"\n{demos.sentence(plain, gated)}")
    try:
        written = demos.write_report(out, plain, gated)
    except OSError as error:
        raise RefusedError(f"the report could not be written to {out}", cause=error.strerror) from error
    _tell(f"\nThe whole story of both: {written[0]}")
    if keep:
        _tell(f"\nThe lab stays up as '{lab}': virtgrid lab status --lab {lab}")
        _tell(f"When you have seen enough:  virtgrid lab down --lab {lab}")
