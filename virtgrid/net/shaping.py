"""The kernel's netem: is it there, set it, read its counters. tc(8) with JSON output does the talking."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from typing import Any, Final

from virtgrid.core.errors import LabError
from virtgrid.net import netns
from virtgrid.net.link import Links

_TIMEOUT_S: Final = 10.0
_PACKET_BYTES: Final = 1500


def netem_arguments(*, rate_bytes_s: float, delay_s: float, queue_s: float, loss: float) -> list[str]:
    """netem's words for a link of this kind; a rate of 0 is unlimited, a loss of 1 a cut link.

    netem's limit counts the packets under way too, so it is queue and delay together.
    """
    words = ["netem"]
    if rate_bytes_s:
        limit = round(rate_bytes_s * (queue_s + delay_s) / _PACKET_BYTES)
        words += ["limit", str(max(10, limit)), "rate", f"{round(rate_bytes_s * 8)}bit"]
    else:
        words += ["limit", "100000"]
    if delay_s:
        words += ["delay", f"{round(delay_s * 1e6)}us"]
    if loss:
        words += ["loss", f"{loss * 100:g}%"]
    return words


def has_netem(namespace: str) -> bool:
    """Does this kernel have netem? Tried on the namespace's loopback, and taken off again."""
    if _tc(namespace, ["qdisc", "add", "dev", "lo", "root", "netem", "limit", "1000"]).returncode != 0:
        return False
    _tc(namespace, ["qdisc", "del", "dev", "lo", "root"])
    return True


def make_pair(namespace: str, interface: str, peer_namespace: str, peer: str) -> None:
    """A veth pair between two namespaces; one that is there already is kept."""
    with Links(namespace) as links:
        links.veth(interface, peer=peer, peer_namespace=peer_namespace)


def set_netem(
    namespace: str, interface: str, *, rate_bytes_s: float, delay_s: float, queue_s: float, loss: float
) -> None:
    """Put netem on the interface, or change it. Errors: LabError."""
    words = netem_arguments(rate_bytes_s=rate_bytes_s, delay_s=delay_s, queue_s=queue_s, loss=loss)
    done = _tc(namespace, ["qdisc", "replace", "dev", interface, "root", *words])
    if done.returncode != 0:
        raise LabError(f"netem could not be set on {interface} in {namespace}", cause=done.stderr.strip())


def netem_counters(namespace: str, interface: str) -> dict[str, int]:
    """frames, bytes and dropped of the interface's root qdisc. Errors: LabError."""
    done = _tc(namespace, ["-s", "-j", "qdisc", "show", "dev", interface, "root"])
    if done.returncode != 0:
        raise LabError(f"{interface} in {namespace} has no counters", cause=done.stderr.strip())
    return parse_counters(done.stdout)


def parse_counters(text: str) -> dict[str, int]:
    """``tc -s -j qdisc show`` -> frames, bytes, dropped of the first qdisc."""
    found: list[dict[str, Any]] = json.loads(text)
    first = found[0] if found else {}
    return {
        "frames": int(first.get("packets", 0)),
        "bytes": int(first.get("bytes", 0)),
        "dropped": int(first.get("drops", 0)),
    }


def _tc(namespace: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # nsenter, not `tc -n`: that one makes a mount namespace of its own each time
    command = ["nsenter", f"--net={netns.path(namespace)}", "--", "tc", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
