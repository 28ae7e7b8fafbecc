"""What a sandbox is asked to be. Pure: nothing here looks at the host."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from virtgrid.core.errors import UsageError
from virtgrid.grid.node import root

MIB: Final = 1 << 20
DEFAULT_TEMPLATE: Final = "default"
_INTERFACE: Final = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_CPUSET: Final = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*")

#: Host ids for user namespaces: sandbox n gets FIRST_BASE + n * 65536 and up. Above what useradd(8) and
#: systemd-nspawn(1) hand out, below 2^31.
FIRST_BASE: Final = 0x70000000
BASES: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """What a sandbox may use at most.

    memory_bytes: of all its processes and its layer together. layer_bytes: written outside the user's
    home. cpuset: ``0-3,6``; None is every processor. processes: of the user, at one time.
    walltime_s: after so many seconds it ends by itself; None never.
    """

    memory_bytes: int = 512 * MIB
    layer_bytes: int = 256 * MIB
    processes: int = 1024
    cpuset: str | None = None
    walltime_s: int | None = None

    def __post_init__(self) -> None:
        for what, value, low, high in (
            ("memory of a sandbox", self.memory_bytes, 16 * MIB, 1 << 50),
            ("layer of a sandbox", self.layer_bytes, MIB, 1 << 49),
            ("number of processes", self.processes, 4, 4_000_000),
            ("time of a sandbox", 1 if self.walltime_s is None else self.walltime_s, 1, 10**9),
        ):
            if not low <= value <= high:
                raise UsageError(f"the {what} is between {low} and {high}, not {value}")
        if self.cpuset is not None and not _CPUSET.fullmatch(self.cpuset):
            raise UsageError(f"'{self.cpuset}' is no list of processors", hint="write 0-3,6")


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec:
    """A sandbox of one user at one address.

    name: the domain's and the host's name inside. user: the name inside. account: the host's account
    whose home and ids are used; None is the one called ``user``. address: with its prefix,
    ``10.77.0.11/24``, IPv4 or IPv6. bridge: the segment's bridge on this host. mtu: of the one
    interface inside, 1450 over a VXLAN on 1500. user_namespace: False runs it as the host's own root:
    only by explicit request. Errors: UsageError.
    """

    name: str
    user: str
    address: str
    bridge: str
    account: str | None = None
    gateway: str | None = None
    mtu: int = 1500
    template: str = DEFAULT_TEMPLATE
    limits: SandboxLimits = field(default_factory=SandboxLimits)
    user_namespace: bool = True

    def __post_init__(self) -> None:
        try:
            root.check_name(self.name, "sandbox")
            root.check_user(self.user)
            root.check_name(self.template, "template")
        except root.RootError as error:
            raise UsageError(error.what, hint=error.hint) from None
        if self.account is not None and (not self.account or len(self.account) > 256 or "\0" in self.account):
            raise UsageError(f"{self.account[:80]!r} cannot be an account")
        try:
            interface = ipaddress.ip_interface(self.address)
            gateway = None if self.gateway is None else ipaddress.ip_address(self.gateway)
        except ValueError as error:
            raise UsageError(str(error), hint="write 10.77.0.11/24") from None
        if "/" not in self.address or "%" in self.address:
            raise UsageError(f"the address {self.address} needs its prefix", hint=f"write {interface.ip}/24")
        address = interface.ip
        if address.is_multicast or address.is_unspecified or address.is_loopback:
            raise UsageError(f"{address} cannot be the address of a sandbox")
        network = interface.network
        ends = (network.network_address, network.broadcast_address)
        if address.version == 4 and network.prefixlen < 31 and address in ends:
            raise UsageError(f"{address} is the network's or the broadcast address of {network}")
        if gateway is not None and (gateway not in network or gateway == address):
            raise UsageError(f"gateway {gateway} is not another host of {network}")
        if not _INTERFACE.fullmatch(self.bridge) or self.bridge in (".", ".."):
            raise UsageError(f"{self.bridge[:40]!r} is no name of a bridge")
        low = 68 if address.version == 4 else 1280
        if not low <= self.mtu <= 9216:
            raise UsageError(f"the MTU is between {low} and 9216, not {self.mtu}")

    @property
    def host_account(self) -> str:
        """The host's account."""
        return self.account or self.user

    @property
    def ip(self) -> str:
        """The address without its prefix, written the shortest way."""
        return str(ipaddress.ip_interface(self.address).ip)

    @property
    def prefix(self) -> int:
        return int(ipaddress.ip_interface(self.address).network.prefixlen)

    @property
    def family(self) -> str:
        """``ipv4`` or ``ipv6``."""
        return f"ipv{ipaddress.ip_interface(self.address).version}"

    @property
    def mac(self) -> str:
        """Made from the address, so that neighbours who remember it are right next time as well.

        IPv4: 52:54 and its four bytes. IPv6: 56:54 and four bytes of its hash. Both locally administered.
        """
        packed = ipaddress.ip_interface(self.address).ip.packed
        four = packed if len(packed) == 4 else hashlib.blake2s(packed, digest_size=4).digest()
        return ":".join(f"{byte:02x}" for byte in (0x52 if len(packed) == 4 else 0x56, 0x54, *four))

    @property
    def port(self) -> str:
        """The host's end of its cable."""
        return port_of(self.name)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> SandboxSpec:
        """The inverse. Errors: TypeError, KeyError, UsageError."""
        return SandboxSpec(**{**data, "limits": SandboxLimits(**data["limits"])})


def port_of(name: str) -> str:
    """The host's end of a sandbox's cable: the same each time, so that it is found after a crash."""
    return f"vg{hashlib.blake2s(name.encode(), digest_size=6).hexdigest()}"


def base_candidates(name: str) -> list[int]:
    """Where a sandbox's ids may begin, in the order to try: by its name, then onwards. Pure."""
    first = int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "big") % BASES
    return [FIRST_BASE + (first + step) % BASES * 65536 for step in range(BASES)]


def id_map(base: int, kept: int) -> list[tuple[int, int, int]]:
    """(first id inside, first on the host, how many): 0-65535 from ``base`` up, but ``kept`` itself.

    The user keeps the number that its files at home have.
    """
    if kept > 65535:
        return [(0, base, 65536), (kept, kept, 1)]
    parts = [(0, base, kept), (kept, kept, 1), (kept + 1, base + kept + 1, 65535 - kept)]
    return [part for part in parts if part[2] > 0]
