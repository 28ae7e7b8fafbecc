"""A libvirtd dies or hangs, a QEMU dies or hangs, the WAN is cut: the guest runs in exactly one place."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from migrating import Ended, Migration, Stage, until

from virtgrid.core.events import TERMINAL
from virtgrid.lab import faults

pytestmark = pytest.mark.lab


def _at_source(stage: Stage, ended: Ended) -> None:
    """Exit 1, and the message says that the guest runs where it was."""
    assert (ended.status, ended.last["error"]) == (1, "VG-MIGRATION-FAILED"), ended.last
    assert f"{stage.name} runs on {stage.here}." in ended.last["where"]


def _recover(stage: Stage, migration: Migration) -> str:
    """``recover --yes`` -> where it found the guest."""
    done = stage.virtgrid("migration", "recover", migration.id, "--yes", "--json")
    assert done.status == 0, done.out + done.err
    return str(json.loads(done.out)["situation"]["place"])


@pytest.mark.parametrize("phase", ["storage", "precopy", "hold"])
def test_destination_libvirtd_killed_leaves_the_guest_at_the_source(stage: Stage, phase: str) -> None:
    with stage.caught_in(phase) as migration:
        faults.kill_libvirtd(stage.target)
        ended = migration.end()
    _at_source(stage, ended)
    stage.answers()
    assert [record for record in migration.all() if record.event == "left"], (
        "what could not be removed is told"
    )
    faults.restore_libvirtd(stage.target)
    assert _recover(stage, migration) == "source"
    until(lambda: faults.qemu_pid(stage.target, stage.name) is None, "the incoming QEMU gone")
    stage.check_safe_at_source()
    if phase == "hold":
        stage.check_clean_migration()


def test_a_destination_that_died_before_its_qemu_began_is_told(stage: Stage) -> None:
    with stage.caught_in("storage") as migration:
        faults.kill_libvirtd(stage.target)
        ended = migration.end()
    _at_source(stage, ended)
    # As libvirtd leaves it when it is killed after it wrote the domain down, before it started QEMU.
    faults.kill_qemu(stage.target, stage.name)
    status = stage.target.plan.run / "libvirt" / "qemu" / f"{stage.name}.xml"
    text = status.read_text()
    begun = re.search(r"<domstatus state='paused' reason='[a-z ]+' pid='[0-9]+'>", text)
    assert begun, text[:500]
    status.write_text(text.replace(begun[0], "<domstatus state='paused' reason='starting up' pid='0'>"))
    faults.restore_libvirtd(stage.target)
    try:
        done = stage.virtgrid("migration", "recover", migration.id, "--yes", "--json")
        assert done.status == 0, done.out + done.err
        said = json.loads(done.out)
        assert said["situation"]["place"] == "source"
        [advice] = [action for action in said["actions"] if "never began" in action]
        assert f"/run/libvirt/qemu/{stage.name}.xml" in advice
        assert not stage.target_image.exists()
        stage.answers()
    finally:  # what the advice says
        faults.kill_libvirtd(stage.target)
        status.unlink()
        faults.restore_libvirtd(stage.target)
    stage.check_safe_at_source()
    stage.check_clean_migration()


# "resumed" is the worst moment: the guest may run over there, and the answer that says so is lost.
@pytest.mark.parametrize("moment", ["released", "stopped", "resumed"])
def test_destination_libvirtd_killed_around_the_release_ends_in_one_place(stage: Stage, moment: str) -> None:
    with stage.caught_in("hold") as migration:
        migration.let_go()
        until(lambda: any(record.event == moment for record in migration.all()), moment)
        faults.kill_libvirtd(stage.target)
        ended = migration.end(deadline_s=120)
    faults.restore_libvirtd(stage.target)
    if ended.status:
        assert ended.last["event"] == "failed"
        assert ended.status in (1, 7)
        _recover(stage, migration)
    if stage.state(stage.there) == "running":
        stage.check_moved()
    else:
        until(lambda: faults.qemu_pid(stage.target, stage.name) is None, "the incoming QEMU gone")
        stage.check_safe_at_source()
    stage.check_clean_migration()


def test_source_libvirtd_killed_for_long_is_told_as_unknown_and_recovered(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        faults.kill_libvirtd(stage.source)
        ended = migration.end()
    # Nobody can say for sure until that host answers again.
    assert (ended.status, ended.last["error"]) == (7, "VG-POSITION-UNKNOWN"), ended.last
    assert f"virtgrid migration recover {migration.id}" in ended.last["hint"]
    stage.answers()
    faults.restore_libvirtd(stage.source)
    assert _recover(stage, migration) == "source"
    stage.check_safe_at_source()
    stage.check_clean_migration()


@pytest.mark.parametrize("phase", ["storage", "precopy", "hold"])
def test_source_libvirtd_restarted_leaves_the_guest_at_the_source(stage: Stage, phase: str) -> None:
    with stage.caught_in(phase) as migration:
        faults.kill_libvirtd(stage.source)
        faults.restore_libvirtd(stage.source)
        ended = migration.end()
    _at_source(stage, ended)
    stage.check_safe_at_source()


@pytest.mark.parametrize("phase", ["precopy", "hold"])
def test_destination_qemu_killed_leaves_the_guest_at_the_source(stage: Stage, phase: str) -> None:
    with stage.caught_in(phase) as migration:
        faults.kill_qemu(stage.target, stage.name)
        ended = migration.end()
    _at_source(stage, ended)
    stage.check_safe_at_source()


def test_a_hanging_libvirtd_at_the_source_ends_the_hold_not_the_guest(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        faults.stop_libvirtd(stage.source)
        migration.wait_for_phase("cleanup")
        stage.answers()
        faults.continue_libvirtd(stage.source)
        ended = migration.end()
    _at_source(stage, ended)
    assert "monitor" in ended.last["what"]
    stage.check_safe_at_source()
    stage.check_clean_migration()


def test_a_libvirtd_that_never_comes_back_is_told_and_recovered(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        faults.stop_libvirtd(stage.source)
        ended = migration.end(deadline_s=150)
    assert (ended.status, ended.last["error"]) == (7, "VG-POSITION-UNKNOWN")
    stage.answers()
    faults.continue_libvirtd(stage.source)
    assert _recover(stage, migration) == "source"
    stage.check_safe_at_source()


def test_the_guest_is_not_let_go_towards_a_destination_that_hangs(stage: Stage) -> None:
    def told(event: str, field: str, text: str) -> bool:
        return any(record.event == event and text in record[field] for record in migration.all())

    with stage.caught_in("hold") as migration:
        faults.stop_libvirtd(stage.target)
        try:
            until(lambda: told("note", "text", "does not answer"), "the silence being noticed")
            assert stage.virtgrid("migration", "release", migration.id).status == 0
            until(lambda: told("gate", "reason", "not let go"), "the gate refusing to let go")
            stage.answers()
            assert "released" not in [record.event for record in migration.all()]
        finally:
            faults.continue_libvirtd(stage.target)
        ended = migration.end()
    # It was let go as soon as the destination answered again.
    assert (ended.status, ended.last["event"]) == (0, "finished")
    stage.check_moved()


def test_a_hanging_qemu_at_the_source_is_not_waited_for(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        pid = faults.qemu_pid(stage.source, stage.name)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            migration.wait_for_phase("cleanup")
        finally:
            os.kill(pid, signal.SIGCONT)
        ended = migration.end()
    _at_source(stage, ended)
    assert "monitor" in ended.last["what"]
    stage.check_safe_at_source()
    stage.check_clean_migration()


@pytest.mark.parametrize("phase", ["precopy", "hold"])
def test_a_wan_cut_for_10_s_is_survived(stage: Stage, phase: str) -> None:
    with stage.caught_in(phase) as migration:
        stage.lab.cut_wan(for_s=10)
        until(lambda: stage.lab.wan_status()["cut"] is False, "the WAN whole again")
        assert not [record for record in migration.all() if record.event in TERMINAL]
        migration.wait_for("hold")
        stage.virtgrid("migration", "release", migration.id)
        ended = migration.end()
    assert ended.status == 0, ended.last
    stage.check_moved()


@pytest.mark.parametrize("phase", ["storage", "hold"])
def test_a_wan_cut_for_good_leaves_the_guest_at_the_source(stage: Stage, phase: str) -> None:
    with stage.caught_in(phase, "--stall-timeout", "5s") as migration:
        stage.lab.cut_wan()
        ended = migration.end(deadline_s=150)
    _at_source(stage, ended)
    stage.lab.restore_wan()
    assert _recover(stage, migration) == "source"
    until(lambda: faults.qemu_pid(stage.target, stage.name) is None, "the incoming QEMU gone")
    stage.check_safe_at_source()
    if phase == "hold":
        stage.check_clean_migration()


def test_a_wan_cut_in_the_switchover_does_not_let_the_guest_run_twice(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        migration.let_go()
        until(lambda: any(record.event == "stopped" for record in migration.all()), "stopped")
        # Longer than our patience with the control connection, shorter than the destination's with us.
        stage.lab.cut_wan(for_s=25)
        ended = migration.end(deadline_s=120)
    if ended.status == 7:
        _recover(stage, migration)
    if stage.state(stage.there) == "running":
        stage.check_moved()
    else:
        until(lambda: faults.qemu_pid(stage.target, stage.name) is None, "the incoming QEMU gone")
        stage.target_image.unlink(missing_ok=True)
        stage.check_safe_at_source()
