"""Memory and disks encrypted on their way, held as ever; a certificate nobody knows moves nothing."""

from __future__ import annotations

import pytest
from migrating import Stage

from virtgrid.lab import faults

pytestmark = pytest.mark.lab


def test_an_encrypted_migration_is_held_and_arrives(stage: Stage) -> None:
    with stage.caught_in("hold", "--tls") as migration:
        asked = '{"execute": "query-migrate-parameters"}'
        said = stage.virsh(stage.here, "qemu-monitor-command", stage.name, asked)
        assert '"tls-creds":"objlibvirt_migrate_tls0"' in said.replace(" ", "")
        assert stage.virtgrid("migration", "release", migration.id).status == 0
        ended = migration.end()
    assert ended.status == 0, ended.last
    assert ended.last["answering"] == "yes"
    stage.check_moved()


def test_a_destination_nobody_knows_is_refused_and_the_guest_stays(stage: Stage) -> None:
    faults.foreign_certificate(stage.target)
    try:
        ended = stage.migrate("--tls", "--policy", "immediate")
    finally:
        faults.restore_certificate(stage.lab, stage.target)
    assert (ended.status, ended.last["error"]) == (1, "VG-MIGRATION-FAILED"), ended.last
    assert f"{stage.name} runs on {stage.here}." in ended.last["where"]
    assert "/etc/pki/qemu" in ended.last.get("hint", ""), str(ended.last)
    stage.check_safe_at_source()


def test_another_name_than_the_certificates_is_refused(stage: Stage) -> None:
    ended = stage.migrate("--tls", "--tls-destination", "somebody.else", "--policy", "immediate")
    assert (ended.status, ended.last["error"]) == (1, "VG-MIGRATION-FAILED"), ended.last
    assert "/etc/pki/qemu" in ended.last.get("hint", ""), str(ended.last)
    stage.check_safe_at_source()
