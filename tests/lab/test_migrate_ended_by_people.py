"""A migration somebody ends, or lets go, or forbids: where the guest is then, and what is said."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from migrating import Stage, until

from virtgrid.core.process import process_started
from virtgrid.lab import faults, guest

pytestmark = pytest.mark.lab

PHASES = ("storage", "precopy", "hold")


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_leaves_the_guest_at_the_source_and_exits_130(stage: Stage, phase: str) -> None:
    with stage.caught_in(phase) as migration:
        migration.process.send_signal(signal.SIGINT)
        ended = migration.end()
    assert ended.status == 130
    assert ended.last["event"] == "failed"
    assert f"{stage.name} runs on {stage.here}." in ended.last["where"]
    stage.check_safe_at_source()


def test_ctrl_c_at_once_is_not_lost(stage: Stage) -> None:
    migration = stage.start("--policy", "strict")
    migration.process.send_signal(signal.SIGINT)
    assert migration.end().status == 130
    until(lambda: process_started(migration.worker_pid) is None, "the worker gone")
    migration.bury()
    stage.check_safe_at_source()


def test_ctrl_c_while_connecting_leaves_nobody_to_migrate_later(stage: Stage) -> None:
    stage.target_image.unlink(missing_ok=True)
    journals = len(list((stage.home / "state" / "migrations").glob("*.jsonl")))
    faults.stop_libvirtd(stage.target)
    command = subprocess.Popen(
        stage.command(),
        env=stage.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children")
    (worker,) = map(int, until(lambda: children.read_text().split(), "the worker"))
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=30)
    assert command.returncode == 130
    until(lambda: process_started(worker) is None, "the worker gone")
    faults.continue_libvirtd(stage.target)
    assert len(list((stage.home / "state" / "migrations").glob("*.jsonl"))) == journals
    stage.check_safe_at_source()


def test_a_second_ctrl_c_only_ends_the_view(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        migration.process.send_signal(signal.SIGINT)
        migration.wait_for("user", action="abort")
        migration.process.send_signal(signal.SIGINT)
        assert migration.end().status == 130
        until(lambda: migration.all()[-1].event == "failed", "its end in the journal")
    stage.check_safe_at_source()


@pytest.mark.parametrize("phase", PHASES)
def test_abort_leaves_the_guest_at_the_source_and_exits_6(stage: Stage, phase: str) -> None:
    with stage.caught_in(phase) as migration:
        assert stage.virtgrid("migration", "abort", stage.name).status == 0
        ended = migration.end()
    assert (ended.status, ended.last["error"]) == (6, "VG-ABORTED")
    assert f"{stage.name} runs on {stage.here}." in ended.last["where"]
    stage.check_safe_at_source()
    if phase == "hold":
        stage.check_clean_migration()


@pytest.mark.parametrize("phase", PHASES)
def test_domjobabort_by_somebody_else_is_told_as_such(stage: Stage, phase: str) -> None:
    with stage.caught_in(phase) as migration:
        guest.virsh(stage.source, "domjobabort", stage.name)
        ended = migration.end()
    if ended.status == 1:
        # Cancelled in the middle of a write, QEMU says that its stream broke; the hint knows.
        assert "domjobabort" in ended.last["hint"], ended.last
    else:
        assert (ended.status, ended.last["error"]) == (6, "VG-ABORTED"), ended.last
        assert "somebody else" in ended.last["what"]
    assert f"{stage.name} runs on {stage.here}." in ended.last["where"]
    stage.check_safe_at_source()


def test_release_by_hand_moves_the_guest(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        said = stage.virtgrid("migration", "release", migration.id)
        assert (said.status, said.out.strip()) == (0, "released")
        ended = migration.end()
    assert (ended.status, ended.last["event"], ended.last["answering"]) == (0, "finished", "yes")
    assert migration.wait_for("released", by="user")["unsuitable"] == 1
    stage.check_moved()


def test_when_time_is_up_abort_exits_5_and_the_guest_stays(stage: Stage) -> None:
    with stage.caught_in("hold", "--max-wait", "2s", "--on-timeout", "abort") as migration:
        ended = migration.end()
    assert (ended.status, ended.last["error"]) == (5, "VG-HOLD-TIMEOUT")
    assert f"{stage.name} runs on {stage.here}." in ended.last["where"]
    assert ended.last["held_s"] >= 2
    stage.check_safe_at_source()
    stage.check_clean_migration()


def test_when_time_is_up_release_moves_the_guest(stage: Stage) -> None:
    with stage.caught_in("hold", "--max-wait", "2s", "--on-timeout", "release") as migration:
        ended = migration.end()
    assert ended.status == 0
    assert migration.wait_for("released", by="timeout")["unsuitable"] == 1
    stage.check_moved()


def test_when_time_is_up_hold_keeps_holding_until_a_person_lets_go(stage: Stage) -> None:
    with stage.caught_in("hold", "--max-wait", "1s", "--on-timeout", "hold") as migration:

        def past_its_time() -> bool:
            gates = [record for record in migration.all() if record.event == "gate"]
            return gates[-1]["decision"] == "hold" and "only a person" in gates[-1]["reason"]

        until(past_its_time, "the gate past its deadline")
        assert stage.virtgrid("migration", "release", stage.name).status == 0
        ended = migration.end()
    assert ended.status == 0
    assert migration.wait_for("released", by="user")
    stage.check_moved()


def test_timeout_suspends_the_guest_so_that_the_migration_ends(stage: Stage) -> None:
    with stage.caught_in("hold", "--timeout", "8") as migration:
        ended = migration.end()
    assert ended.status == 0, ended.last
    assert "suspended" in migration.wait_for("released", by="timeout")["reason"]
    stage.check_moved()


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        # libvirt's own shutdown waits for the migration's end; who sits at the guest does not.
        ("storage", ["qemu-monitor-command", "--hmp", "mover", "system_powerdown"]),
        ("precopy", ["destroy", "mover"]),
        ("hold", ["destroy", "mover"]),
    ],
)
def test_a_domain_shut_down_meanwhile_is_told_as_shut_off(stage: Stage, phase: str, words: list[str]) -> None:
    with stage.caught_in(phase) as migration:
        guest.virsh(stage.source, *words)
        ended = migration.end()
    assert (ended.status, ended.last["event"]) == (1, "failed"), ended.last["where"]
    assert "shut off" in ended.last["where"]
    assert ended.last.get("on") is None
    assert stage.state(stage.here) == "shut off"
    assert stage.state(stage.there) == ""
    assert not stage.target_image.exists()
    assert stage.pools(stage.there) == []
    guest.virsh(stage.source, "start", stage.name)
    stage.answers()
    stage.remember_downtime()
    stage.check_safe_at_source()
    if phase == "hold":
        stage.check_clean_migration()


def test_a_second_migration_of_the_same_domain_is_refused_and_does_not_harm_the_first(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        second = stage.migrate("--policy", "strict", keep_target=True)
        assert (second.status, second.last["error"]) == (3, "VG-REFUSED")
        assert migration.id in second.last["what"] + second.last["hint"]
        assert stage.state(stage.here) == "running"
        assert migration.all()[-1].event not in ("failed", "finished")
        stage.virtgrid("migration", "release", migration.id)
        assert migration.end().status == 0
    stage.check_moved()


def test_of_two_migrations_begun_at_once_one_is_refused(stage: Stage) -> None:
    stage.target_image.unlink(missing_ok=True)
    words = stage.words("--policy", "immediate")
    both = [
        subprocess.Popen(
            stage.source.argv([str(stage.program), *words]),
            env=stage.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert sorted(process.returncode for process in both) == [0, 3], said
    stage.check_moved()


def test_a_migration_by_virsh_is_in_the_way(stage: Stage) -> None:
    stage.target_image.unlink(missing_ok=True)
    with stage.target_image.open("xb") as file:
        file.truncate((stage.source.images / stage.spec.disk_name).stat().st_size)
    words = ["migrate", "--live", "--copy-storage-all", "--bandwidth", "4", stage.name]
    other = subprocess.Popen(
        stage.source.argv(
            ["virsh", "-q", "-c", "qemu:///system", *words, f"qemu+tcp://{stage.there}/system"]
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: "None" not in guest.virsh(stage.source, "domjobinfo", stage.name), "virsh's job")
        ended = stage.migrate(keep_target=True)
        assert (ended.status, ended.last["error"]) == (3, "VG-REFUSED")
        assert "job of somebody else" in ended.last["what"] or "already" in ended.last["what"]
        guest.virsh(stage.source, "domjobabort", stage.name)
        other.wait(timeout=60)
    finally:
        other.kill()
        other.wait()
    stage.target_image.unlink()
    stage.check_safe_at_source()
