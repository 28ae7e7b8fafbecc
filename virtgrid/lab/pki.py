"""The lab's certificates: one authority, and for every site those of its host and its coordinators.

They are made and placed by ``virtgrid.wire.pki``, as everybody's are, only all in one go and for longer: a
lab's authority and its sites are directories of one machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.wire.identity import Identity, Role
from virtgrid.wire.pki.authority import Authority
from virtgrid.wire.pki.places import Places
from virtgrid.wire.pki.signing import (
    AUTHORITY_LIFETIME,
    Signer,
    alternative_names,
    authority_name,
    key_pem,
    new_key,
    pem,
)

_ROLES: Final = (Role.HOST, Role.GRC, Role.CRM, Role.NRM)


def authority(directory: Path, name: str) -> Authority:
    """The authority in this directory, made at first use."""
    try:
        return Authority.load(directory)
    except (NotFoundError, RefusedError):
        for half in directory.glob("*.key.pem"):
            half.unlink()
        return Authority.create(directory, name, now=datetime.now(UTC))


def furnish(authority: Authority, directory: Path, site: str, hosts: Sequence[str]) -> None:
    """Write a site's certificates below ``directory`` (its /etc/pki), replacing what is there.

    hosts: the site's names and addresses.
    """
    now = datetime.now(UTC)
    for role in _ROLES:
        identity = Identity(role=role, site=site, name=site)
        authority.enrol(Places(directory), identity, hosts, now=now, lifetime=AUTHORITY_LIFETIME)


def furnished(directory: Path) -> bool:
    """Whether there is everything that ``furnish`` writes."""
    return set(_ROLES) <= set(Places(directory).roles())


def furnish_foreign(directory: Path, site: str, hosts: Sequence[str]) -> None:
    """The same, of an authority that nobody knows."""
    with tempfile.TemporaryDirectory() as scratch:
        furnish(authority(Path(scratch), "somebody else"), directory, site, hosts)


def single(hosts: Sequence[str]) -> tuple[bytes, bytes]:
    """A certificate and its key (PEM) for a server that has nothing to do with the grid."""
    now = datetime.now(UTC)
    signer, key = Signer.create(authority_name("virtgrid lab", "servers"), now=now), new_key()
    certificate = signer.certify(
        key.public_key(),
        name=authority_name(hosts[0], "servers"),
        names=alternative_names(None, hosts),
        serves=True,
        now=now,
        until=now + AUTHORITY_LIFETIME,
    )
    return pem(certificate), key_pem(key)
