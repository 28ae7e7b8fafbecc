"""``virtgrid migration``: what is recorded about migrations: list, show, report."""

from __future__ import annotations

import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from virtgrid.cli.complete import migrations
from virtgrid.cli.output import print_error, print_json, print_table, run
from virtgrid.core import journal
from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.core.units import format_duration, format_size, parse_duration
from virtgrid.report.files import briefs, load, writer_alive
from virtgrid.report.html import render_html
from virtgrid.report.model import Status, clean
from virtgrid.report.objects import as_object, for_s
from virtgrid.report.timeline import Timeline
from virtgrid.report.words import busy_text, checks_text, verdict

app = typer.Typer(
    help="Look at migrations, running and past, and steer those that run.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Reference = Annotated[
    str,
    typer.Argument(
        metavar="REF", autocompletion=migrations, help="A migration's id, or a domain: its newest."
    ),
]

_COLUMNS = ("ID", "DOMAIN", "FROM → TO", "PHASE", "FOR", "WAITING FOR", "DOWNTIME")


def _since(text: str | None, now: datetime) -> datetime | None:
    if text is None:
        return None
    try:
        return now - timedelta(seconds=parse_duration(text))
    except OverflowError:
        raise UsageError(f"'{text}' is longer than calendars go back") from None


def _downtime(status: Status) -> str:
    if status.downtime_s is not None:
        return format_duration(status.downtime_s)
    return f"- (on {status.on})" if status.end is not None and status.on else "-"


@app.command("list")
@run
def list_migrations(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only those begun in this time: 7d, 12h, 30m.")
    ] = None,
) -> None:
    """List migrations, newest first, the failed ones too."""
    now = datetime.now(UTC)
    oldest = _since(since, now)
    found: list[tuple[Path, Status]] = []
    for path, fold in briefs():
        if isinstance(fold, RefusedError):
            print_error(fold)
            continue
        status = fold.status(writer_alive)
        if oldest is None or (status.started_at is not None and status.started_at >= oldest):
            found.append((path, status))
    if as_json:
        print_json([as_object(status, path, now) for path, status in found])
        return
    if not found:
        print(f"no migrations recorded in {journal.migrations_dir()}", file=sys.stderr)
        return
    rows = []
    for path, status in found:
        lasted_s = for_s(status, now)
        rows.append(
            (
                status.id or path.stem,
                status.domain,
                f"{status.source} → {status.destination}",
                status.state,
                None if lasted_s is None else format_duration(lasted_s),
                status.waiting_for,
                _downtime(status),
            )
        )
    print_table(_COLUMNS, rows, shrink="WAITING FOR")


def _facts(timeline: Timeline, path: Path, now: datetime) -> list[tuple[str, str]]:
    """What ``show`` prints, label and text."""
    started = timeline.started_at.strftime("%Y-%m-%d %H:%M:%S UTC") if timeline.started_at else "-"
    lasted_s = for_s(timeline, now)
    facts = [
        ("migration", f"{timeline.id}  {timeline.domain}: {timeline.source} → {timeline.destination}"),
        (
            "state",
            f"{timeline.state}" + (f" for {format_duration(lasted_s)}" if lasted_s is not None else ""),
        ),
        ("verdict", verdict(timeline)),
        ("started", started),
        ("policy", timeline.policy),
    ]
    if timeline.waiting_for:
        facts.append(("waiting for", timeline.waiting_for))
    facts += [("unsuitable", busy_text(busy)) for busy in timeline.unsuitable[:5] if timeline.waiting_for]
    if checks := checks_text(timeline):
        facts.append(("checks", checks))
    if timeline.total_s is not None:
        facts.append(("total", format_duration(timeline.total_s)))
    if timeline.held_s is not None and timeline.hold is not None:
        kind = f" ({timeline.hold_kind})" if timeline.hold_kind else ""
        facts.append(("held", f"{format_duration(timeline.held_s)}{kind}"))
    if timeline.downtime_s is not None:
        facts.append(("guest stopped", format_duration(timeline.downtime_s)))
    if timeline.answering is not None:
        how = f" ({timeline.verified.how})" if timeline.verified else ""
        facts.append(("answering", f"{timeline.answering}{how}"))
    if timeline.name is not None:
        facts.append(("name", timeline.name.text or timeline.name.name))
    if timeline.sent_bytes is not None:
        facts.append(("sent", format_size(timeline.sent_bytes)))
    if timeline.end is not None:
        facts += [("cause", timeline.end.cause)] if timeline.end.cause else []
        facts += [("hint", timeline.end.hint)] if timeline.end.hint else []
    return [*facts, ("journal", str(path))]


@app.command("show")
@run
def show(
    reference: Reference,
    as_json: Json = False,
    events: Annotated[
        bool, typer.Option("--events", help="Every event of the journal, a line each.")
    ] = False,
) -> None:
    """Show one migration: where it stands or how it ended, and why."""
    path = journal.find(reference)
    if events:
        for record in journal.read(path):
            if as_json:
                print_json(record.as_dict(), line=True)
            else:
                fields = "  ".join(f"{name}={value}" for name, value in record.fields.items())
                _print_line(f"{record.at:%H:%M:%S.%f}"[:12], record.event, fields)
        return
    now = datetime.now(UTC)
    timeline = load(path)
    if as_json:
        phases = [
            {"phase": span.name, "start_s": span.start_s, "end_s": span.end_s} for span in timeline.phases
        ]
        print_json({**as_object(timeline, path, now), "phases": phases})
        return
    for label, text in _facts(timeline, path, now):
        _print_line(f"{label:<13}", text)


def _print_line(*parts: str) -> None:
    """Parts of a line, cleaned of what could steer a terminal."""
    print("  ".join(clean(part, 2000) for part in parts))


@app.command("report")
@run
def report(
    reference: Reference,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write HTML here; beside the journal by default.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figure as PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report's data instead.")] = False,
) -> None:
    """Write a report of one migration: why it waited, and what happened at the pause."""
    path = journal.find(reference)
    timeline = load(path)
    if as_json:
        print_json(timeline)
    if png is not None:
        from virtgrid.report.png import render_png  # matplotlib takes a second to load

        _write(png, render_png(timeline), quiet=as_json)
    if html is None and (png is not None or as_json):
        return
    _write(html or path.with_suffix(".html"), render_html(timeline).encode(), quiet=as_json)


def _write(path: Path, content: bytes, *, quiet: bool = False) -> None:
    """Write a file and tell its path; a report cut short must not look like one."""
    target = path.resolve()  # a symbolic link stays a link, /dev/stdout stays what it is
    if target.exists() and not target.is_file():
        raise RefusedError(f"{path} is not a file a report could be written to")
    partial: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".report-", delete=False) as file:
            partial = Path(file.name)
            file.write(content)
        partial.chmod(0o644)
        partial.replace(target)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise RefusedError(f"the report cannot be written to {path}", cause=error.strerror) from error
    print(path, file=sys.stderr if quiet else sys.stdout)
