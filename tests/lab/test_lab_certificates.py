"""libvirt takes the grid's certificates of hosts, and those alone."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from virtgrid.lab import faults, pki
from virtgrid.lab.lab import Lab
from virtgrid.lab.site import Site
from virtgrid.wire.identity import Identity, Role
from virtgrid.wire.pki.authority import Authority
from virtgrid.wire.pki.places import Places
from virtgrid.wire.pki.signing import LIFETIME

HOST, USER = "virtgrid://alice/host/n1", "virtgrid://alice/user/kenji"


@pytest.fixture
def authority(mended_lab: Lab, tmp_path: Path) -> Iterator[Authority]:
    """One that bob's libvirtd trusts for the test."""
    bob = _site(mended_lab, "bob")
    made = pki.authority(tmp_path / "authority", "test")
    _furnish_bob(mended_lab, made)
    try:
        yield made
    finally:
        for name in ("CA/cacrl.pem", "qemu/ca-crl.pem", "virtgrid/revoked.pem"):
            (bob.plan.certificates / name).unlink(missing_ok=True)
        faults.restore_certificate(mended_lab, bob)


def _site(lab: Lab, name: str) -> Site:
    return next(site for site in lab.sites if site.name == name)


def _furnish_bob(lab: Lab, authority: Authority) -> None:
    bob = _site(lab, "bob")
    pki.furnish(authority, bob.plan.certificates, "bob", bob.plan.hosts)
    bob.kill_libvirtd()
    bob.launch_libvirtd()
    bob.wait_libvirtd()


def _client(authority: Authority, uri: str, directory: Path) -> Path:
    """A directory as libvirt's pkipath= wants it."""
    identity, places = Identity.parse(uri), Places(directory / "pki")
    hosts = ["n1"] if identity.role is Role.HOST else []
    authority.enrol(places, identity, hosts, now=datetime.now(UTC), lifetime=LIFETIME)
    flat = directory / "flat"
    flat.mkdir()
    for name, source in (
        # Both authorities, so that the client is content with its own certificate and the server decides.
        ("cacert.pem", places.trust),
        ("clientcert.pem", places.certificate(identity.role)),
        ("clientkey.pem", places.key(identity.role)),
    ):
        (flat / name).write_bytes(source.read_bytes())
    return flat


def _virsh(lab: Lab, pkipath: Path) -> tuple[int, str]:
    words = ["virsh", "-c", f"qemu+tls://bob/system?pkipath={pkipath}", "uri"]
    ended = _site(lab, "alice").run(words, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def test_a_user_of_the_grid_is_no_administrator_of_its_hosts(
    mended_lab: Lab, authority: Authority, tmp_path: Path
) -> None:
    for name in ("host", "user"):
        (tmp_path / name).mkdir()
    status, said = _virsh(mended_lab, _client(authority, HOST, tmp_path / "host"))
    assert status == 0, said
    status, said = _virsh(mended_lab, _client(authority, USER, tmp_path / "user"))
    assert status != 0
    assert "TLS confirmation" in said


def test_a_host_whose_certificate_was_revoked_is_refused_by_libvirtd(
    mended_lab: Lab, authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "host").mkdir()
    flat = _client(authority, HOST, tmp_path / "host")
    authority.revoke(HOST, now=datetime.now(UTC))
    _furnish_bob(mended_lab, authority)
    bob = _site(mended_lab, "bob")
    assert (bob.plan.certificates / "CA/cacrl.pem").exists()
    status, said = _virsh(mended_lab, flat)
    assert status != 0
    assert "TLS confirmation" in said
    (tmp_path / "again").mkdir()
    status, said = _virsh(mended_lab, _client(authority, HOST, tmp_path / "again"))
    assert status == 0, said
