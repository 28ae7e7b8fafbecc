"""What is refused before anything is touched, and disks that do not fit: status, words, and no trace."""

from __future__ import annotations

import os

import pytest
from migrating import Ended, Stage

from virtgrid.lab import faults
from virtgrid.tracker.definition import USER_DIRECTORY

pytestmark = pytest.mark.lab


def _refused(stage: Stage, ended: Ended, status: int, code: str) -> str:
    """Nothing was touched -> what was said."""
    assert (ended.status, ended.last["error"]) == (status, code), ended.last
    stage.check_safe_at_source()
    return " ".join(str(ended.last.get(key) or "") for key in ("what", "where", "cause", "hint"))


def _journals(stage: Stage) -> int:
    return len(list((stage.home / "state" / "migrations").glob("*.jsonl")))


@pytest.mark.parametrize(
    "uri",
    [
        "qemu+tcp://nowhere.invalid/system",  # no such name
        "qemu+tcp://bob:1/system",  # connection refused
        "qemu+tcp://10.99.0.77/system",  # no such host
        "qemu+tcp://bob/nonsense",  # no such path
        "qemu+unix:///system?socket=/run/nothing",
        "qemu+nonsense://bob/system",
    ],
)
def test_a_destination_that_cannot_be_reached_exits_8_and_writes_no_journal(stage: Stage, uri: str) -> None:
    before = _journals(stage)
    ended = stage.migrate(uri=uri.replace("bob", stage.there))
    said = _refused(stage, ended, 8, "VG-PEER-UNREACHABLE")
    assert "cannot connect to" in said
    assert _journals(stage) == before


def test_a_destination_behind_a_cut_wan_exits_8(stage: Stage) -> None:
    stage.lab.cut_wan()
    ended = stage.migrate()
    stage.lab.restore_wan()
    assert ended.status == 8
    stage.check_safe_at_source()


def test_a_destination_that_hangs_exits_8(stage: Stage) -> None:
    faults.stop_libvirtd(stage.target)
    ended = stage.migrate()
    faults.continue_libvirtd(stage.target)
    assert ended.status == 8
    assert "did not answer within" in ended.last["cause"]
    stage.check_safe_at_source()


def test_a_foreign_certificate_is_refused_with_a_hint(stage: Stage) -> None:
    faults.foreign_certificate(stage.target)
    try:
        ended = stage.migrate(uri=f"qemu+tls://{stage.there}/system")
    finally:
        faults.restore_certificate(stage.lab, stage.target)
    said = _refused(stage, ended, 8, "VG-PEER-UNREACHABLE")
    assert "certificate" in said
    assert "virt-pki-validate" in said
    again = stage.migrate("--policy", "immediate", uri=f"qemu+tls://{stage.there}/system")
    assert again.status == 0, again.last
    stage.check_moved()


def test_the_host_it_runs_on_already_is_refused(stage: Stage) -> None:
    ended = stage.migrate(uri="qemu:///system")
    assert "already runs on" in _refused(stage, ended, 3, "VG-REFUSED")


def test_an_unknown_domain_exits_4_and_writes_no_journal(stage: Stage) -> None:
    before = _journals(stage)
    for name in ("nobody", "4711", "00000000-0000-4000-8000-000000000000", "-x"):
        ended = stage.virtgrid(
            "migrate", "--policy", "strict", "--json", "--", name, f"qemu+tcp://{stage.there}/system"
        )
        assert (ended.status, ended.last["error"]) == (4, "VG-NOT-FOUND")
        assert name in ended.last["what"]
    assert _journals(stage) == before


def test_an_unknown_disk_or_interface_exits_2_and_names_those_there_are(stage: Stage) -> None:
    ended = stage.migrate("--migrate-disks", "vdz")
    assert "vda" in _refused(stage, ended, 2, "VG-USAGE")
    ended = stage.migrate("--tap", "nothing0")
    assert "nothing0" in _refused(stage, ended, 2, "VG-USAGE")


def test_a_migration_address_that_does_not_resolve_is_refused(stage: Stage) -> None:
    ended = stage.migrate("--migrateuri", "tcp://nowhere.invalid")
    assert "nowhere.invalid cannot be resolved" in _refused(stage, ended, 3, "VG-REFUSED")


def test_a_malformed_protocol_definition_is_refused_with_file_and_line(stage: Stage) -> None:
    path = f"{USER_DIRECTORY}/broken.pdl"
    stage.source.run(["sh", "-c", f"mkdir -p {USER_DIRECTORY} && echo nonsense >{path}"])
    try:
        said = _refused(stage, stage.migrate(), 3, "VG-REFUSED")
    finally:
        stage.source.run(["rm", path])
    assert f"{path}:1" in said


def test_a_name_taken_at_the_destination_is_refused(stage: Stage) -> None:
    xml = (
        f"<domain type='qemu'><name>{stage.name}</name><memory unit='MiB'>16</memory>"
        "<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"
    )
    stage.virsh(stage.there, "define", "/dev/stdin", stdin=xml)
    try:
        ended = stage.migrate()
        assert (ended.status, ended.last["error"]) == (3, "VG-REFUSED")
        assert "another domain named" in ended.last["what"]
    finally:
        stage.virsh(stage.there, "undefine", stage.name)
    stage.check_safe_at_source()


def test_a_paused_domain_is_refused_and_stays_paused(stage: Stage) -> None:
    stage.virsh(stage.here, "suspend", stage.name)
    try:
        ended = stage.migrate()
        assert (ended.status, ended.last["error"]) == (3, "VG-REFUSED")
        assert "paused" in ended.last["what"]
        assert stage.state(stage.here) == "paused"
    finally:
        stage.virsh(stage.here, "resume", stage.name)
    stage.check_safe_at_source()


def test_a_target_image_that_is_too_small_is_refused_and_left_alone(stage: Stage) -> None:
    stage.target_image.write_bytes(b"precious" * 512)
    ended = stage.migrate(keep_target=True)
    assert (ended.status, ended.last["error"]) == (3, "VG-REFUSED")
    assert "is too small" in ended.last["what"]
    assert stage.target_image.read_bytes() == b"precious" * 512
    stage.target_image.unlink()
    stage.check_safe_at_source()


def test_a_target_image_that_was_there_is_not_removed_by_a_failure(stage: Stage) -> None:
    with stage.target_image.open("wb") as file:
        file.truncate((stage.source.images / stage.spec.disk_name).stat().st_size)
    with stage.caught_in("storage", keep_target=True) as migration:
        stage.virtgrid("migration", "abort", migration.id)
        assert migration.end().status == 6
    assert stage.target_image.exists()
    stage.target_image.unlink()
    stage.check_safe_at_source()


def test_too_little_room_for_the_disk_is_found_by_preflight(stage: Stage) -> None:
    faults.limit_disk(stage.target, 1 << 20)
    ended = stage.migrate()
    assert (ended.status, ended.last["error"]) == (3, "VG-REFUSED")
    assert "free and the disks hold" in ended.last["what"]
    assert os.listdir(stage.target.images) == os.listdir(stage.target.images)
    faults.unlimit_disk(stage.target)
    stage.check_safe_at_source()


def test_a_disk_that_fills_up_while_copying_fails_and_cleans_up(stage: Stage) -> None:
    faults.limit_disk(stage.target, 100 << 20)
    with stage.caught_in("storage") as migration:
        # Somebody else's file: what is left is less than the disk still needs.
        fill = ["dd", "if=/dev/zero", "of=/var/lib/libvirt/images/other.img", "bs=1M"]
        assert "No space left" in stage.target.run(fill, check=False).stderr
        ended = migration.end()
    assert (ended.status, ended.last["error"]) == (1, "VG-MIGRATION-FAILED"), ended.last
    assert f"{stage.name} runs on {stage.here}." in ended.last["where"]
    assert "full" in ended.last["hint"]
    images = stage.target.run(["ls", "/var/lib/libvirt/images"]).stdout.split()
    assert stage.spec.disk_name not in images
    assert "other.img" in images
    faults.unlimit_disk(stage.target)
    stage.check_safe_at_source()
    stage.check_clean_migration()


def test_a_dry_run_touches_nothing_and_tells_what_would_be_refused(stage: Stage) -> None:
    before = _journals(stage)
    stage.target_image.unlink(missing_ok=True)
    dry = stage.virtgrid(*stage.words("--dry-run"))
    assert dry.status == 0
    assert '"would_migrate": true' in dry.out
    stage.target_image.write_bytes(b"small")
    dry = stage.virtgrid(*stage.words("--dry-run"))
    assert dry.status == 3
    assert "is too small" in dry.out
    stage.target_image.unlink()
    assert _journals(stage) == before
    stage.check_safe_at_source()
