"""A plugged cable is told to the neighbours at once: nobody waits for the answer to an old question."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable

import pytest
from hosting import SandboxHost

from virtgrid.grid.node.sandbox import Sandboxes
from virtgrid.grid.node.spec import SandboxSpec
from virtgrid.lab.layout import BRIDGE

pytestmark = pytest.mark.lab

_ETH_P_ALL = 3
#: An IPv6 address is told once the check for duplicates is over: two seconds and a bit.
_TOLD_S = 10.0


def _gratuitous_arp(frame: bytes, address: str) -> bool:
    packed = socket.inet_aton(address)
    return frame[12:14] == b"\x08\x06" and frame[28:32] == packed and frame[38:42] == packed


def _neighbour_advertisement(frame: bytes, address: str) -> bool:
    """ICMPv6 type 136 for this target, to all nodes: nobody has asked."""
    packed = ipaddress.ip_address(address).packed
    everybody = ipaddress.ip_address("ff02::1").packed
    told = frame[12:14] == b"\x86\xdd" and frame[20] == 58 and frame[54] == 136
    return told and frame[38:54] == everybody and frame[62:78] == packed


@pytest.mark.parametrize(
    ("address", "told"),
    [("10.77.0.99/24", _gratuitous_arp), ("fd77::99/64", _neighbour_advertisement)],
)
def test_an_address_is_told_to_all_neighbours_when_its_cable_is_plugged(
    host: SandboxHost, address: str, told: Callable[[bytes, str], bool]
) -> None:
    spec: SandboxSpec = host.spec("box", address=address)
    mac = bytes.fromhex(spec.mac.replace(":", ""))

    async def heard(sandboxes: Sandboxes) -> bool:
        await sandboxes.prepare(spec)
        await sandboxes.stage("box")
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as line:
            line.bind((BRIDGE, 0))
            await sandboxes.start("box")
            deadline_s = time.monotonic() + _TOLD_S
            while (left_s := deadline_s - time.monotonic()) > 0:
                line.settimeout(left_s)
                try:
                    frame = line.recv(2048)
                except TimeoutError:
                    break
                if frame[6:12] == mac and told(frame, spec.ip):
                    return True
        return False

    assert host.inside(heard)
