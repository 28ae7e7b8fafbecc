"""Names, places and addresses of a lab. Nothing here changes anything.

Address plan: WAN 10.99.0.N on ``wan0``; client segment 10.77.0.0/24 with the client at .1 and
site N at .(N+1) on ``br0``; guests take 10.77.0.10 and up and keep them at every site.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from virtgrid.core.errors import RefusedError, UsageError

DEFAULT_NAME: Final = "lab"
DEFAULT_DIRECTORY: Final = Path("/var/lib/virtgrid/labs")
DIRECTORY_VARIABLE: Final = "VIRTGRID_LAB_DIR"
SITE_NAMES: Final = ("alice", "bob", "carol", "dave")
CLIENT: Final = "client"
MARKER: Final = "VIRTGRID_LAB_PROCESS_OF"
"""Environment variable of every process a lab starts; its value is the lab's directory."""

# No dash: it separates the parts of a namespace's name, so 'vg-a-*' can never mean lab 'a-b'.
_LAB_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,23}")
_SITE_NAME: Final = re.compile(r"[a-z][a-z0-9]{0,11}")
_PLAIN_PATH: Final = re.compile(r"[A-Za-z0-9_./-]+")
_TAKEN: Final = (
    "/run",
    "/var/run",
    "/etc",
    "/sys",
    "/proc",
    "/dev",
    "/var/lib/libvirt",
    "/var/log/libvirt",
    "/var/cache/libvirt",
    "/var/lib/virtgrid/sandboxes",
)
_SOCKET_PATH_LIMIT: Final = 107
"""sockaddr_un has 108 bytes, one of them the end."""

WAN_INTERFACE: Final = "wan0"
WAN_MTU: Final = 1600
"""Room for VXLAN around full-size frames."""
BRIDGE: Final = "br0"
CLIENT_BRIDGE: Final = "seg0"
CLIENT_ADDRESS: Final = "10.77.0.1"
PREFIX: Final = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """What a link does to frames, each direction alike.

    rate_bytes_s: 0 is unlimited. rtt_s: there and back, half of it each way.
    queue_s: how long a frame may wait for its turn before it is dropped instead. loss: share 0..1.
    """

    rate_bytes_s: float = 12.5e6
    rtt_s: float = 0.0
    queue_s: float = 0.1
    loss: float = 0.0

    def __post_init__(self) -> None:
        if self.rate_bytes_s != 0 and not 125 <= self.rate_bytes_s <= 12.5e9:
            raise UsageError("the rate of a link is between 1kbit and 100gbit")
        if not 0 <= self.rtt_s <= 10:
            raise UsageError("the round-trip time of a link is between 0 and 10 s")
        if not 0.001 <= self.queue_s <= 10:
            raise UsageError("the queue of a link is between 1ms and 10s")
        if not 0 <= self.loss < 1:
            raise UsageError(
                "the loss of a link is between 0% and 99.9%", hint="cut the link to lose everything"
            )

    def as_dict(self) -> dict[str, float]:
        return {
            "rate_bytes_s": self.rate_bytes_s,
            "rtt_s": self.rtt_s,
            "queue_s": self.queue_s,
            "loss": self.loss,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LabConfig:
    """What ``lab up`` is asked for. client_rtt_s 0 is a plain cable between client and sites.

    stretched: the client has a cable to the first site only; segments join the other sites' bridges to it.
    """

    name: str = DEFAULT_NAME
    sites: tuple[str, ...] = SITE_NAMES[:2]
    wan: LinkSpec = field(default_factory=LinkSpec)
    client_rtt_s: float = 0.0
    stretched: bool = False
    directory: Path | None = None
    """The directory holding all labs; None is the environment's or the default one."""

    def __post_init__(self) -> None:
        check_name(self.name)
        check_sites(self.sites)
        if not 0 <= self.client_rtt_s <= 10:
            raise UsageError("the client's round-trip time is between 0 and 10 s")

    def as_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "name": self.name,
            "sites": list(self.sites),
            "wan": self.wan.as_dict(),
            "client_rtt_s": self.client_rtt_s,
            "stretched": self.stretched,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any], directory: Path | None = None) -> LabConfig:
        """The inverse. Errors: KeyError, TypeError, ValueError, UsageError."""
        return LabConfig(
            name=data["name"],
            sites=tuple(data["sites"]),
            wan=LinkSpec(**data["wan"]),
            client_rtt_s=float(data["client_rtt_s"]),
            stretched=bool(data.get("stretched", False)),
            directory=directory,
        )


def check_name(name: str) -> str:
    """The name of a lab, or UsageError."""
    if not _LAB_NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot be the name of a lab",
            hint="lower-case letters, digits and '_', a letter first, at most 24",
        )
    return name


def check_sites(sites: Sequence[str]) -> tuple[str, ...]:
    """The names of the sites, or UsageError."""
    if not 2 <= len(sites) <= len(SITE_NAMES):
        raise UsageError(f"a lab has 2 to {len(SITE_NAMES)} sites, not {len(sites)}")
    for site in sites:
        if not _SITE_NAME.fullmatch(site) or site in (CLIENT, "localhost", "wan"):
            raise UsageError(
                f"'{site}' cannot be the name of a site",
                hint="lower-case letters and digits, a letter first, at most 12; not 'client' or 'wan'",
            )
    if len(set(sites)) != len(sites):
        raise UsageError("two sites cannot have the same name")
    return tuple(sites)


def parse_sites(text: str) -> tuple[str, ...]:
    """``2`` or ``alice,bob`` -> names."""
    if text.isascii() and text.isdigit():
        if not 2 <= int(text) <= len(SITE_NAMES):
            raise UsageError(f"a lab has 2 to {len(SITE_NAMES)} sites, not {text}")
        return SITE_NAMES[: int(text)]
    return check_sites(tuple(part.strip() for part in text.split(",")))


def labs_directory() -> Path:
    """The directory that holds all labs."""
    return Path(os.environ.get(DIRECTORY_VARIABLE) or DEFAULT_DIRECTORY).absolute()


def _check_place(root: Path) -> None:
    text = os.fspath(root)
    if not _PLAIN_PATH.fullmatch(text):  # mount(8)'s options are split at ',' and ':'
        raise RefusedError(
            f"the lab's directory {text} has characters other than letters, digits, '_', '.', '-'"
        )
    for taken in _TAKEN:
        if text.startswith(f"{taken}/"):
            raise RefusedError(
                f"the lab's directory {text} lies below {taken}, which every site has of its own",
                hint=f"choose another one with {DIRECTORY_VARIABLE}",
            )


def namespace_prefix(lab: str) -> str:
    return f"vg-{lab}-"


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan:
    """One site's names, addresses and places. number counts from 1."""

    lab: str
    name: str
    number: int
    root: Path

    @property
    def namespace(self) -> str:
        return f"{namespace_prefix(self.lab)}{self.name}"

    @property
    def fqdn(self) -> str:
        return f"{self.name}.{self.lab}.lab"

    @property
    def wan_address(self) -> str:
        return f"10.99.0.{self.number}"

    @property
    def segment_address(self) -> str:
        return f"10.77.0.{self.number + 1}"

    @property
    def wan_mac(self) -> str:
        return f"02:76:67:99:00:{self.number:02x}"

    @property
    def bridge_mac(self) -> str:
        return f"02:76:67:77:00:{self.number + 1:02x}"

    @property
    def client_port(self) -> str:
        """The port of the client's bridge that leads to this site."""
        return f"to-{self.name}"

    @property
    def host_uuid(self) -> str:
        """libvirt refuses to migrate between two hosts of one UUID."""
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{self.fqdn}.{self.root}"))

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def images(self) -> Path:
        return self.root / "lib" / "images"

    @property
    def socket(self) -> Path:
        return self.run / "libvirt" / "libvirt-sock"

    @property
    def keeper_socket(self) -> Path:
        return self.root / "keeper.sock"

    @property
    def libvirtd_pid_file(self) -> Path:
        return self.run / "libvirtd.pid"

    @property
    def certificates(self) -> Path:
        return self.root / "pki"

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names and addresses its certificates stand for."""
        return (self.name, self.fqdn, "localhost", self.wan_address, self.segment_address, "127.0.0.1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where everything of a lab is."""

    name: str
    root: Path
    sites: tuple[SitePlan, ...] = ()

    @staticmethod
    def of(name: str, sites: Sequence[str] = (), directory: Path | None = None) -> Layout:
        """The layout of a lab below ``directory``. Errors: UsageError, RefusedError (path too long)."""
        root = (directory or labs_directory()).resolve() / check_name(name)
        _check_place(root)
        plans = tuple(
            SitePlan(lab=name, name=site, number=number, root=root / "sites" / site)
            for number, site in enumerate(sites, start=1)
        )
        for plan in plans:
            if len(os.fsencode(plan.socket)) > _SOCKET_PATH_LIMIT:
                raise RefusedError(
                    f"the lab's directory {root} is too deep: {plan.socket} cannot be a socket",
                    hint=f"choose a shorter one with {DIRECTORY_VARIABLE}",
                )
        return Layout(name=name, root=root, sites=plans)

    @property
    def state_file(self) -> Path:
        return self.root / "lab.json"

    @property
    def lock_file(self) -> Path:
        return self.root / "lock"

    @property
    def authority(self) -> Path:
        """The lab's certificate authority."""
        return self.root / "ca"

    @property
    def client_namespace(self) -> str:
        return f"{namespace_prefix(self.name)}{CLIENT}"

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (*(site.namespace for site in self.sites), self.client_namespace)

    def link_socket(self, link: str) -> Path:
        """The control socket of a link: ``wan``, or ``client-SITE``."""
        return self.root / f"link-{link}.sock"

    def site(self, name: str) -> SitePlan | None:
        return next((site for site in self.sites if site.name == name), None)

    def hosts(self, here: SitePlan) -> str:
        """/etc/hosts of a site: every site by its WAN address, the client by its own."""
        lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost"]
        lines += [f"{site.wan_address} {site.fqdn} {site.name}" for site in self.sites]
        lines.append(f"{CLIENT_ADDRESS} {CLIENT}.{self.name}.lab {CLIENT}")
        return "\n".join(lines) + f"\n# site {here.name} of lab {self.name}\n"
