"""Names and addresses of a server host: a guest's namespace, its clients' namespace, a cable between."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from virtgrid.lab.layout import LinkSpec

GUEST_MAC: Final = "52:54:00:5e:00:02"
CLIENT_MAC: Final = "52:54:00:5e:00:01"
GUEST_INTERFACE: Final = "eth0"
TAP: Final = "tap0"
#: Addresses of documentation (RFC 5737) and of nobody (RFC 4193): they lead nowhere if they leak.
GUEST_V4: Final = "192.0.2.2"
CLIENT_V4: Final = "192.0.2.1"
GUEST_V6: Final = "fd00:c0:2::2"
CLIENT_V6: Final = "fd00:c0:2::1"
V4_PREFIX: Final = 24
V6_PREFIX: Final = 64
#: As fast as it goes.
CABLE: Final = LinkSpec(rate_bytes_s=0, queue_s=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLayout:
    """Where a server host lives. name: unique per run. link: what the cable does to frames.

    offload: frames are of up to 64 KB, as between a guest and its host; else of the wire's size.
    """

    name: str
    directory: Path
    link: LinkSpec = CABLE
    offload: bool = True

    @property
    def guest(self) -> str:
        """The namespace of the servers."""
        return f"vgs-{self.name}-guest"

    @property
    def client(self) -> str:
        """The namespace of the clients; the tap that is watched is in it."""
        return f"vgs-{self.name}-client"

    def to_json(self) -> str:
        return json.dumps(
            {
                "name": self.name,
                "directory": str(self.directory),
                "link": self.link.as_dict(),
                "offload": self.offload,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        read = json.loads(text)
        return cls(
            name=read["name"],
            directory=Path(read["directory"]),
            link=LinkSpec(**read["link"]),
            offload=read["offload"],
        )
