"""What a coordinator makes of what it hears, for a job's journal; and what its program is told. Pure."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from pydantic import ValidationError

from virtgrid.grid.messages import node as notes
from virtgrid.grid.messages.coalloc import View
from virtgrid.grid.messages.common import parse
from virtgrid.grid.messages.job import Finished, NodeTold, NodeView, Wrote
from virtgrid.grid.messages.node import Exec, Tell
from virtgrid.grid.store.jobs import KeptJob
from virtgrid.wire.message import BadMessageError

HOSTFILE: Final = "/etc/virtgrid/hostfile"
_log = logging.getLogger(__name__)

#: What an MPI user's environment has in a cluster, so that ``mpirun -np 4 ./a.out`` is all there is to say.
#: Open MPI reads OMPI_MCA_*: the hostfile, the one interface, and no question at a first ssh.
ENVIRONMENT: Final[Mapping[str, str]] = {
    "VIRTGRID_HOSTFILE": HOSTFILE,
    "OMPI_MCA_orte_default_hostfile": HOSTFILE,
    "OMPI_MCA_plm_rsh_args": "-o BatchMode=yes",
    "OMPI_MCA_oob_tcp_if_include": "eth0",
    "OMPI_MCA_btl_tcp_if_include": "eth0",
    "OMPI_MCA_btl": "tcp,self",
}


def program(kept: KeptJob) -> Exec:
    """A job's program with its environment; what its user said comes before ours."""
    nodes = sum(site.nodes for site in kept.wish.sites)
    ours = {**ENVIRONMENT, "VIRTGRID_JOB": kept.id, "VIRTGRID_NODES": str(nodes)}
    return Exec(argv=kept.program.argv, env={**ours, **kept.program.env})


def output_lines(text: str, cursor: int, at_s: float) -> list[Wrote | Finished]:
    """A site's lines of output as the journal's. cursor: where the first begins. What is none is left out."""
    lines: list[Wrote | Finished] = []
    for line in text.removesuffix("\n").split("\n") if text else ():  # a text may hold other separators
        cursor += len(line.encode()) + 1
        try:
            tell = Tell.model_validate_json(line)
            note = parse(notes.NOTES[tell.kind], tell.kind, tell.body)
        except (ValidationError, BadMessageError) as error:
            _log.warning("a line of output is none: %s", error)
            continue
        if isinstance(note, notes.Output):
            lines.append(Wrote(at_s=at_s, stream=note.stream, data=note.data, cursor=cursor))
        elif isinstance(note, notes.Finished):
            lines.append(
                Finished(at_s=at_s, status=note.status, usage=note.usage, problem=note.problem, cursor=cursor)
            )
    return lines


def node_line(
    before: Mapping[str, tuple[str, str]], site: str, node: NodeView, at_s: float
) -> NodeTold | None:
    """A line for the journal when there is something new. before: sandbox -> what was told last."""
    state = "LOST" if node.problem else str(node.state or "AWAITED")
    reason = node.problem or node.reason
    if before.get(node.sandbox) == (state, reason):
        return None
    return NodeTold(
        at_s=at_s,
        site=site,
        node=node.node,
        sandbox=node.sandbox,
        address=node.address,
        state=state,
        reason=reason,
    )


def refusal(view: View) -> str:
    """The reason of every party, and when all could."""
    reasons = "; ".join(f"{one.party}: {one.why}" for one in view.parties if one.why)
    return reasons or view.reason
