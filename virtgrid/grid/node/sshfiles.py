"""The files that let every node of a cluster reach every other one by ssh, strictly checked. Pure.

Formats: sshd(8) "AUTHORIZED_KEYS FILE FORMAT" and "SSH_KNOWN_HOSTS FILE FORMAT", and the hostfile of Open MPI
(``NAME slots=N``). The paper's section 3.3. What goes in was checked by ``virtgrid.grid.messages``: no text
there has a space, a newline or a comma to break out with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from virtgrid.grid.messages.node import HostEntry
from virtgrid.grid.node.layer import Trust


def render(hosts: Sequence[HostEntry]) -> Trust:
    """What a node is given to know and to trust. Each host is known by name and by address."""
    return Trust(
        known_hosts=_text(f"{host.hostname},{host.address} {host.host_key}" for host in hosts),
        # Two nodes may share a user key; a line twice does no harm but is noise.
        authorized_keys=_text(dict.fromkeys(host.user_key for host in hosts)),
        hostfile=_text(f"{host.hostname} slots={host.slots}" for host in hosts),
        hosts=tuple((host.address, host.hostname) for host in hosts),
    )


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
