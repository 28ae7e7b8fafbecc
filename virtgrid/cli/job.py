"""``virtgrid job``: run a program over the nodes of several sites, as in one cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

import typer
from pydantic import ValidationError

from virtgrid.cli.asking import Grc, ask, unknown, when
from virtgrid.cli.job_follow import Grc as Following
from virtgrid.cli.job_follow import Teller, end, follow, write
from virtgrid.cli.output import print_json, print_table, run
from virtgrid.cli.reserve import refused, wish_of
from virtgrid.core.errors import DeadlineError, RefusedError, UsageError, VirtgridError
from virtgrid.core.units import format_duration, format_time
from virtgrid.grid.coalloc.job import TABLE
from virtgrid.grid.messages.coalloc import SHOW, View, Which
from virtgrid.grid.messages.common import Name as NameType
from virtgrid.grid.messages.common import first_fault, require
from virtgrid.grid.messages.job import (
    JOB,
    JOBS,
    STOP,
    SUBMIT,
    AskJobs,
    JobList,
    JobState,
    JobView,
    NodeTold,
    Submit,
    Verdict,
    Wrote,
)
from virtgrid.grid.messages.node import Exec
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.line import LineLostError
from virtgrid.wire.wellknown import GRC

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Jobs: a reservation at several sites, and a program that runs in it.",
)

_PASSED = {"ignore_unknown_options": True, "allow_interspersed_args": False}
Nodes = Annotated[str, typer.Option(metavar="SITE:N,...", help="How many nodes of which sites.")]
Walltime = Annotated[str, typer.Option(metavar="TIME", help="For how long at most: 5m, 2h.")]
Begin = Annotated[
    str | None, typer.Option(metavar="TIME", help="With its zone: 2026-11-27T10:00Z. Default: now.")
]
Bandwidth = Annotated[
    str | None, typer.Option(metavar="RATE", help="Between each two sites, each way: 100mbit.")
]
Env = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="For the program; may be said again.")
]
Id = Annotated[
    str | None, typer.Option("--id", metavar="NAME", help="Its name; said again it is the same job.")
]
Command = Annotated[list[str], typer.Argument(metavar="COMMAND...")]
Name = Annotated[str, typer.Argument(metavar="NAME")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


@app.command("run", context_settings=_PASSED)
@run
def run_(
    command: Command,
    nodes: Nodes,
    walltime: Walltime,
    begin: Begin = None,
    bandwidth: Bandwidth = None,
    env: Env = None,
    id_: Id = None,
    grc: Grc = GRC,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but the program's output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The journal, as JSON lines.")] = False,
) -> None:
    """Reserve, run a program across all nodes, and give everything back.

    The program starts in the first node's sandbox. What happens is told on standard error, its output goes
    where it belongs, and the exit status is the program's. Ctrl-C ends the job.
    """
    asked = _submit(command, nodes, walltime, begin, bandwidth, env or [], id_)
    teller = Teller(quiet=quiet, as_json=as_json)
    view = asyncio.run(follow(Endpoint.parse(grc), asked, teller))
    if as_json:
        print_json({"kind": "over", **view.model_dump(mode="json")}, line=True)
    if view.verdict is Verdict.REFUSED:
        raise _refused(grc, view)
    raise SystemExit(end(view))


@app.command("submit", context_settings=_PASSED)
@run
def submit(
    command: Command,
    nodes: Nodes,
    walltime: Walltime,
    begin: Begin = None,
    bandwidth: Bandwidth = None,
    env: Env = None,
    id_: Id = None,
    grc: Grc = GRC,
    as_json: Json = False,
) -> None:
    """The same without waiting: ends when everything is reserved."""
    asked = _submit(command, nodes, walltime, begin, bandwidth, env or [], id_)
    view = _say(grc, asked)
    if view.state is JobState.RESERVING:
        raise unknown(f"job {view.id}", f"virtgrid job show {view.id}", view.reason)
    if as_json:
        print_json(_json(view))
    if view.verdict is Verdict.REFUSED:
        if as_json:
            raise SystemExit(RefusedError.exit_status)
        raise _refused(grc, view)
    if not as_json:
        print(f"job {view.id}: {when(view.window)}; virtgrid job logs --follow {view.id}")


@app.command("list")
@run
def list_(grc: Grc = GRC, as_json: Json = False) -> None:
    """Show your jobs; root sees everybody's."""
    found: list[JobView] = []
    listed = ask(grc, JOBS, AskJobs(), JobList)
    found += listed.jobs
    while listed.more:
        listed = ask(grc, JOBS, AskJobs(after=found[-1].id), JobList)
        found += listed.jobs
    if as_json:
        print_json([_json(one) for one in found])
        return
    rows = [
        (
            one.id,
            one.state,
            one.verdict,
            "" if one.status is None else str(one.status),
            format_time(one.window.begins_at_s),
            one.nodes,
            ",".join(one.sites),
            " ".join(one.argv),
        )
        for one in found
    ]
    columns = ("NAME", "STATE", "VERDICT", "STATUS", "BEGINS", "NODES", "SITES", "COMMAND")
    print_table(columns, rows, shrink="COMMAND")


@app.command()
@run
def show(name: Name, grc: Grc = GRC, as_json: Json = False) -> None:
    """Show one: how it stands, and how each of its nodes does."""
    require(NameType, "NAME", name)
    view = ask(grc, JOB, Which(id=name), JobView)
    nodes = asyncio.run(_nodes(Endpoint.parse(grc), name))
    if as_json:
        print_json({**_json(view), "node_list": [one.model_dump(mode="json") for one in nodes]})
        return
    print(f"job {view.id}   {view.state}   {TABLE[view.state].answer}")
    print(f"window   {when(view.window)}")
    print(f"why      {view.reason}")
    if view.verdict is not None:
        status = "not known" if view.status is None else str(view.status)
        print(f"verdict  {view.verdict}, exit status {status}")
    used = [f"{format_duration(view.used_s)} of nodes"] if view.used_s else []
    if view.usage is not None:
        used.insert(0, f"{view.usage.user_s + view.usage.system_s:.1f} s of processor at the first node")
    if used:
        print(f"used     {', '.join(used)}")
    print(f"command  {' '.join(view.argv)}")
    rows = [(one.site, one.node, one.state, one.address, one.sandbox, one.reason) for one in nodes]
    if rows:
        print_table(("SITE", "NODE", "STATE", "ADDRESS", "SANDBOX", "WHY"), rows, shrink="WHY")


@app.command()
@run
def logs(
    name: Name,
    follow_: Annotated[bool, typer.Option("--follow", "-f", help="And what is still to come.")] = False,
    grc: Grc = GRC,
) -> None:
    """What the program has written: its output to standard output, its errors to standard error."""
    require(NameType, "NAME", name)

    async def main() -> None:
        async with Following(Endpoint.parse(grc), name) as job:
            async for line in job.lines(wait=follow_):
                if isinstance(line, Wrote):
                    write(line)

    asyncio.run(main())


@app.command()
@run
def cancel(name: Name, grc: Grc = GRC, as_json: Json = False) -> None:
    """End a job, and give everything back."""
    require(NameType, "NAME", name)
    try:
        view = ask(grc, STOP, Which(id=name), JobView)
    except (LineLostError, DeadlineError) as error:
        raise unknown(f"job {name}", f"virtgrid job show {name}", error.what) from error
    if as_json:
        print_json(_json(view))
    elif view.state is JobState.OVER:
        print(f"job {name} is over: {view.reason}")
    else:
        print(f"job {name} is being ended: {view.reason}; virtgrid job show {name}")


def _submit(
    command: Sequence[str],
    nodes: str,
    walltime: str,
    begin: str | None,
    bandwidth: str | None,
    env: Sequence[str],
    id_: str | None,
) -> Submit:
    """What the options mean. Errors: UsageError."""
    if command and command[0] == "--":
        command = command[1:]
    if not command:
        raise UsageError("there is no program to run", hint="virtgrid job run … -- mpirun ./a.out")
    wish = wish_of(nodes, walltime, begin, bandwidth, [], None, id_)
    variables = dict(_variable(text) for text in env)
    try:
        return Submit(reserve=wish, program=Exec(argv=tuple(command), env=variables))
    except ValidationError as error:
        raise UsageError(f"such a program cannot be run: {first_fault(error)}") from None


def _variable(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise UsageError(f"--env: '{text[:80]}' is not NAME=VALUE", hint="OMP_NUM_THREADS=2, for instance")
    return name, value


def _say(grc: str, asked: Submit) -> JobView:
    """SUBMIT. Errors: the coordinator's; OutcomeUnknownError when it may be running, or not."""
    id_ = asked.reserve.id
    try:
        return ask(grc, SUBMIT, asked, JobView)
    except (LineLostError, DeadlineError) as error:  # not when it could not even be dialled
        raise unknown(f"job {id_}", f"virtgrid job show {id_}", error.what) from error


def _refused(grc: str, view: JobView) -> RefusedError:
    """With the reason of every party, and the nearest windows in which all could."""
    try:
        found = refused(ask(grc, SHOW, Which(id=view.id), View))
    except VirtgridError:
        found = RefusedError("", cause=view.reason)
    return RefusedError(f"job {view.id} was not run", cause=found.cause, hint=found.hint)


async def _nodes(where: Endpoint, name: str) -> list[NodeTold]:
    """The last that was told of each node."""
    found: dict[str, NodeTold] = {}
    async with Following(where, name) as job:
        async for line in job.lines(wait=False):
            if isinstance(line, NodeTold):
                found[line.sandbox] = line
    return list(found.values())


def _json(view: JobView) -> dict[str, object]:
    """A job for ``--json``: the message itself, and its times for people."""
    found = view.model_dump(mode="json")
    found["begins_at"] = format_time(view.window.begins_at_s)
    found["ends_at"] = format_time(view.window.ends_at_s)
    return found
