"""A virtgridd on a host without a network and without libvirt, for tests of what it hears."""

from __future__ import annotations

from pathlib import Path

from virtgrid.host.daemon import Virtgridd
from virtgrid.host.guests import Libvirt
from virtgrid.host.mover import Mover
from virtgrid.host.networks import Networks
from virtgrid.host.tenancies import Tenancies
from virtgrid.host.wanted import Wanted
from virtgrid.wire import seal
from virtgrid.wire.endpoint import Endpoint

#: Signs tickets that are good there.
KEY = seal.new_key()


class Quiet:
    """A host without a network."""

    def establish(self, want: Wanted) -> dict[str, str]:
        return {}


def agent(tmp_path: Path, mover: Mover | None = None) -> Virtgridd:
    """It listens at ``tmp_path / "host"``."""
    return Virtgridd(
        where=Endpoint(tmp_path / "host"),
        keys=[KEY.public_key()],
        bridge="br{tag}",
        libvirt=Libvirt("test:///nowhere", state=str(tmp_path)),
        tenancies=Tenancies(tmp_path / "tenancies"),
        networks=Networks(Quiet(), directory=tmp_path / "networks"),
        orphan_s=60,
        notices=tmp_path / "notice",
        mover=mover,
    )
