"""The driver of a migration is killed with -9: libvirt keeps the guest, recover puts the rest right."""

from __future__ import annotations

import json

import pytest
from migrating import Migration, Stage, until

from virtgrid.lab import faults

pytestmark = pytest.mark.lab


def _check_told(migration: Migration) -> None:
    """What the person watching is told: that nobody knows, and what to do."""
    ended = migration.end()
    assert (ended.status, ended.last["error"]) == (7, "VG-POSITION-UNKNOWN")
    assert f"virtgrid migration recover {migration.id}" in ended.last["hint"]


@pytest.mark.parametrize("phase", ["storage", "precopy", "hold"])
def test_killed_before_the_switchover_the_guest_stays_and_recover_cleans_up(stage: Stage, phase: str) -> None:
    with stage.caught_in(phase) as migration:
        migration.kill_worker()
        _check_told(migration)
    until(lambda: faults.qemu_pid(stage.target, stage.name) is None, "the incoming QEMU gone")
    before = migration.journal.read_bytes()
    looked = stage.virtgrid("migration", "recover", migration.id)
    assert looked.status == 0
    assert f"{stage.name} runs on {stage.here}." in looked.out
    assert "would do: remove " in looked.out
    assert stage.target_image.exists(), "without --yes nothing is done"
    assert migration.journal.read_bytes() == before

    done = stage.virtgrid("migration", "recover", migration.id, "--yes", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["situation"]["place"] == "source"
    stage.check_safe_at_source()
    again = json.loads(stage.virtgrid("migration", "recover", migration.id, "--yes", "--json").out)
    assert again["done"]
    stage.check_safe_at_source()
    if phase == "hold":
        stage.check_clean_migration()


@pytest.mark.parametrize("moment", ["released", "stopped"])
def test_killed_around_the_release_the_guest_ends_in_exactly_one_place(stage: Stage, moment: str) -> None:
    with stage.caught_in("hold") as migration:
        migration.let_go()
        until(lambda: any(record.event == moment for record in migration.all()), moment)
        migration.kill_worker()
        ended = migration.end()
    # The worker may have been through before the signal came.
    assert ended.status in (0, 7)
    if ended.status == 7:
        until(lambda: _settled(stage), "both sites quiet")
        done = stage.virtgrid("migration", "recover", migration.id, "--yes", "--json")
        assert done.status == 0, done.out + done.err
        assert json.loads(done.out)["situation"]["place"] in ("source", "destination")
    if stage.state(stage.there) == "running":
        stage.check_moved()
    else:
        stage.check_safe_at_source()
    stage.check_clean_migration()


def _settled(stage: Stage) -> bool:
    """libvirt has ended what it ends by itself: no incoming guest waits."""
    return stage.state(stage.there) in ("", "shut off", "running")


@pytest.mark.parametrize("phase", ["preflight", "prepare", "verify"])
def test_killed_at_the_edges_the_guest_ends_in_exactly_one_place(stage: Stage, phase: str) -> None:
    migration = stage.start("--policy", "immediate")
    until(lambda: phase in migration.phases(), phase)
    migration.kill_worker()
    ended = migration.end()
    migration.bury()
    assert ended.status in (0, 7)
    if ended.status == 7:
        done = stage.virtgrid("migration", "recover", stage.name, "--yes", "--json")
        assert done.status == 0, done.out + done.err
    if stage.state(stage.there) == "running":
        assert phase == "verify"
        stage.check_moved()
    else:
        stage.check_safe_at_source()


def test_recover_of_a_running_migration_is_refused(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        refused = stage.virtgrid("migration", "recover", migration.id, "--yes")
        assert refused.status == 3
        assert "still running" in refused.err
        assert stage.virtgrid("migration", "abort", migration.id).status == 0
        assert migration.end().status == 6
    stage.check_safe_at_source()


def test_wait_says_that_the_driver_died(stage: Stage) -> None:
    with stage.caught_in("storage") as migration:
        migration.kill_worker()
        waited = stage.virtgrid("migration", "wait", migration.id)
        assert waited.status == 1
        assert f"virtgrid migration recover {migration.id}" in waited.err
    assert stage.virtgrid("migration", "recover", migration.id, "--yes").status == 0
    stage.check_safe_at_source()
