"""``virtgrid lab job``: a real MPI program over four sandboxes at two sites, and where its time goes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from virtgrid.cli.job_follow import Teller
from virtgrid.cli.output import print_json, print_table, run
from virtgrid.cli.serve import Whose
from virtgrid.core.errors import LabError, RefusedError, UsageError
from virtgrid.core.units import parse_duration, parse_rate
from virtgrid.grid.messages.job import Finished, JobTold
from virtgrid.lab.gridlab import GridLab, JournalLine, timeline
from virtgrid.lab.lab import Lab, require_possible
from virtgrid.lab.layout import LabConfig, LinkSpec
from virtgrid.lab.slurm import cluster
from virtgrid.lab.stage import lab_name, staged

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    invoke_without_command=True,
    help="Two sites as a grid, and a user's MPI program across their sandboxes.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)

_PROGRAM = ("/usr/bin/python3", "-m", "mpi4py.bench", "helloworld")


@app.callback()
@run
def job(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[COMMAND...]", help="Instead of an MPI program.")
    ] = None,
    nodes: Annotated[int, typer.Option(metavar="N", help="Of each site.")] = 2,
    bandwidth: Annotated[str, typer.Option(metavar="RATE", help="To reserve, each way.")] = "50mbit",
    rate: Annotated[str, typer.Option(metavar="RATE", help="Of the WAN, each way.")] = "100mbit",
    rtt: Annotated[str, typer.Option(metavar="TIME", help="Of the WAN, there and back.")] = "10ms",
    backend: Annotated[
        Whose, typer.Option(help="Whose the nodes are: embedded, or of a real Slurm at each site.")
    ] = Whose.EMBEDDED,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the lab up, to look around in.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Run an MPI program over sandboxes of two sites, and print its time line."""
    if not 1 <= nodes <= 16:
        raise UsageError(f"--nodes must be between 1 and 16, not {nodes}")
    parse_rate(bandwidth)
    if command and command[0] == "--":
        command = command[1:]
    argv = command or ["mpirun", "-np", str(2 * nodes), *_PROGRAM]
    link = LinkSpec(rate_bytes_s=parse_rate(rate), rtt_s=parse_duration(rtt))
    require_possible()
    if backend is Whose.SLURM and (reason := cluster.obstacle()):
        raise RefusedError(reason, hint="make setup")
    config = LabConfig(name=lab_name("job"), wan=link)
    with staged(config, _tell, keep=keep) as stage:
        lines = _run(stage.lab, nodes, rate, bandwidth, argv, on_slurm=backend is Whose.SLURM)
    if keep:
        _tell(f"the lab stays up as '{config.name}': virtgrid lab down --lab {config.name} when it is enough")
    moments = timeline(lines)
    last = next((line for line in reversed(lines) if isinstance(line, JobTold)), None)
    status = next((line.status for line in lines if isinstance(line, Finished)), None)
    if as_json:
        print_json(
            {
                "command": argv,
                "status": status,
                "reason": None if last is None else last.reason,
                "moments": [{"at_s": at_s, "what": what} for at_s, what in moments],
            }
        )
    else:
        print()
        print_table(("AFTER", "WHAT"), [(f"{at_s:6.2f} s", what) for at_s, what in moments])
    if status != 0:
        raise LabError(f"the program did not succeed: {'nothing was told' if last is None else last.reason}")


def _run(
    lab: Lab, nodes: int, rate: str, bandwidth: str, argv: list[str], *, on_slurm: bool
) -> list[JournalLine]:
    """The job's journal; the grid is gone afterwards."""
    sites = [site.name for site in lab.sites[:2]]
    manager = "a CRM on its own Slurm" if on_slurm else "a CRM"
    _tell(f"grid: a virtgridd and {manager} at {' and '.join(sites)}, a network manager, a coordinator")
    teller, lines = Teller(), []
    with GridLab(lab, nodes=nodes, rate=rate, on_slurm=on_slurm) as grid:
        options = ["--nodes", ",".join(f"{site}:{nodes}" for site in sites), "--walltime", "5m"]
        options += ["--bandwidth", bandwidth, "--env", "OMPI_MCA_mpi_yield_when_idle=1"]
        shown = " ".join([*options[:-2], "--", *argv])
        _tell(f"$ virtgrid job run {shown}")
        for line in grid.job(options, argv):
            teller.tell(line)
            lines.append(line)
    return lines


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
