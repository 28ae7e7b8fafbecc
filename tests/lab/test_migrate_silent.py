"""A guest that arrives and is silent: cured where that is possible, else told apart."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from migrating import Migration, Stage, staged, until

from virtgrid.lab.guest import GuestSpec
from virtgrid.lab.lab import Lab

pytestmark = pytest.mark.lab


def _arrives(stage: Stage, migration: Migration) -> dict[str, object]:
    """Let it go, whatever its connections; returns what ``verified`` said."""
    assert stage.virtgrid("migration", "release", migration.id).status == 0
    ended = migration.end()
    assert ended.status == 0, ended.last
    return dict(migration.last("verified").fields)


def test_a_link_that_hangs_is_put_off_and_on(stage: Stage) -> None:
    with stage.caught_in("hold", "--verify-timeout", "1") as migration:
        # libvirt does not know of it: to its knowledge the cable is in.
        down = '{"execute": "set_link", "arguments": {"name": "net0", "up": false}}'
        stage.virsh(stage.here, "qemu-monitor-command", stage.name, down)
        said = _arrives(stage, migration)
        tried = [record["tried"] for record in migration.all() if record.event == "cure"]
    assert tried == ["announced it to its segment again", "put its link off and on"]
    assert said["answering"] == "yes"
    assert "why" not in said
    stage.check_moved()


def test_a_link_that_is_down_on_purpose_stays_down(stage: Stage) -> None:
    stage.virsh(stage.here, "domif-setlink", stage.name, stage.spec.mac, "down")
    migration = stage.start("--policy", "immediate", "--verify-timeout", "1")
    try:
        ended = migration.end()
    finally:
        migration.bury()
    assert ended.status == 0, ended.last
    said = migration.last("verified")
    assert (said["answering"], said["why"]) == ("no", "unplugged")
    records = migration.all()
    assert not [record for record in records if record.event == "cure"]
    [note] = [record for record in records if record.event == "note" and "its link is down" in record["text"]]
    assert note["hint"] == f"virsh domif-setlink {stage.name} {stage.spec.mac} up"
    stage.virsh(stage.there, "domif-setlink", stage.name, stage.spec.mac, "up")
    stage.check_moved()


@pytest.fixture
def fragile(lab: Lab) -> Iterator[Stage]:
    """A guest whose kernel panics at an NMI."""
    home = Path(tempfile.mkdtemp(prefix="vgf"))
    spec = GuestSpec(
        name="fragile", address="10.77.0.61", memory_mib=128, extra_cmdline="unknown_nmi_panic panic=0"
    )
    try:
        with staged(lab, home, spec) as stage:
            yield stage
    finally:
        shutil.rmtree(home)


def test_a_guest_whose_kernel_panicked_is_told_from_a_dead_network(fragile: Stage) -> None:
    with fragile.caught_in("hold", "--verify-timeout", "1") as migration:
        nmi = '{"execute": "inject-nmi"}'  # virsh inject-nmi waits for the migration to end
        fragile.virsh(fragile.here, "qemu-monitor-command", fragile.name, nmi)
        said = _arrives(fragile, migration)
    assert said["answering"] == "no"
    assert said["why"] in ("hung", "crashed")
    until(lambda: fragile.state(fragile.there) in ("running", "crashed", "shut off"), "it being there")
