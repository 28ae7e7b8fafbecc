"""A guest behind a stretched segment: its switchover loses no frame, failures leave nothing turned."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from migrating import Migration, Stage, until

from virtgrid.core import journal as journals
from virtgrid.core.events import Record
from virtgrid.lab import faults, processes
from virtgrid.lab.felt_pause import AROUND_S, felt_pause, probing
from virtgrid.lab.lab import Lab, take_down
from virtgrid.lab.layout import BRIDGE, LabConfig, LinkSpec
from virtgrid.net import redirect
from virtgrid.net.forwarding import Entry, entry
from virtgrid.net.link import Links
from virtgrid.net.usher import RETURN_RANK

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def lab(lab_possible: None) -> Iterator[Lab]:
    """In place of the run's: clients reach alice only; bob's bridge is joined to alice's by a segment."""
    name = f"t{os.getpid()}s"
    config = LabConfig(name=name, wan=LinkSpec(rate_bytes_s=125e6, rtt_s=0.02), stretched=True)
    try:
        yield Lab.up(config)
    finally:
        take_down(name)


def _check_forwarding(stage: Stage, on: str) -> None:
    """Every bridge sends the guest's frames to where it runs, by what it learned; nothing is led astray."""
    stage.answers()
    for site in stage.lab.sites:
        with Links(site.netns) as links:
            everything = {link.index: link for link in links.all()}
            found = entry(links, stage.spec.mac, links.require(BRIDGE))
            tails = {link.name for link in everything.values() if link.mac[2:] == stage.spec.mac[2:]}
            segments = [link for link in everything.values() if link.tunnel is not None]
            left_over = [
                rule for link in segments for rule in redirect.redirects(links, link.index)
                if rule.rank == RETURN_RANK
            ]  # fmt: skip
        assert left_over == [], f"{site.name} still sends its frames away"
        if site.name == on:
            assert found is not None, site.name
            assert found == Entry(port=found.port)
            assert everything[found.port].name in tails, f"{site.name}: to {everything[found.port].name}"
        elif found is not None:
            assert found == Entry(port=found.port), "neither sticky nor static"
            assert everything[found.port].tunnel is not None, f"{site.name}: to {everything[found.port].name}"


def _flips(records: list[Record]) -> list[str]:
    return [str(record["state"]) for record in records if record.event == "flip"]


#: Whether it is drained depends on what was under way; QEMU may be late after it.
DRAINED = ("draining", "given back")


def _last_journal(stage: Stage) -> list[Record]:
    return journals.read(next(journals.newest_first(stage.home / "state" / "migrations")))


def test_no_ping_is_lost_there_and_back(stage: Stage) -> None:
    for _ in range(2):
        with probing(stage.lab, stage.spec.address) as prober:
            done = stage.migrate("--policy", "backoff")
            assert done.status == 0, done.last
            time.sleep(AROUND_S)  # what is measured ends so long after the pause
            probes = prober.stop()
        records = _last_journal(stage)
        at_s = {record.event: record.mono_s for record in records if record.event in ("stopped", "resumed")}
        felt = felt_pause(probes, at_s["stopped"], at_s["resumed"])
        assert felt.pings_sent > 100
        assert felt.pings_lost == 0, felt
        assert [one for one in _flips(records) if one not in DRAINED] == ["ready", "flipped", "settled"]
        stage.check_moved()
        _check_forwarding(stage, stage.here)
    until(lambda: not stage.flippers(), "no process that flips any more", deadline_s=5)


def test_without_the_flip_the_journal_says_so(stage: Stage) -> None:
    assert stage.migrate("--policy", "backoff", "--flip", "off").status == 0
    (record,) = [record for record in _last_journal(stage) if record.event == "flip"]
    assert (record["state"], record["text"]) == ("off", "not wanted (--flip off)")
    stage.check_moved()
    _check_forwarding(stage, stage.here)


def test_an_aborted_migration_leaves_the_forwarding_alone(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        assert stage.virtgrid("migration", "abort", migration.id).status == 0
        assert migration.end().status == 6
    assert _flips(migration.all()) == ["ready"]
    stage.check_safe_at_source()
    _check_forwarding(stage, stage.here)


def _let_go(stage: Stage, migration: Migration, state: str | None = None) -> None:
    """Release, and return when the guest has stopped (or its frames are in this state)."""
    migration.let_go()
    if state is None:
        until(lambda: any(record.event == "stopped" for record in migration.all()), "stopped")
    else:
        until(lambda: state in _flips(migration.all()), f"frames {state}")


def _check_wherever(stage: Stage, migration: Migration, status: int) -> None:
    """The guest runs in one place, after ``recover`` where that is needed, and is reached there."""
    if status:
        done = stage.virtgrid("migration", "recover", migration.id, "--yes")
        assert done.status == 0, done.out + done.err
    if stage.state(stage.there) == "running":
        stage.check_moved()
    else:
        until(lambda: faults.qemu_pid(stage.target, stage.name) is None, "the incoming QEMU gone")
        stage.check_safe_at_source()
    _check_forwarding(stage, stage.here)


def test_a_destination_qemu_killed_at_the_flip_gives_the_frames_back(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        stage.lab.change_wan(rate_bytes_s=125e3)  # so that the rest of memory takes its time
        _let_go(stage, migration, "flipped")
        faults.kill_qemu(stage.target, stage.name)
        stage.lab.restore_wan()
        ended = migration.end(deadline_s=120)
    assert ended.status == 1, ended.last
    assert "put back" in _flips(migration.all())
    stage.check_safe_at_source()
    _check_forwarding(stage, stage.here)


def test_a_destination_libvirtd_killed_at_the_flip_leaves_the_forwarding_right(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        _let_go(stage, migration)
        faults.kill_libvirtd(stage.target)
        ended = migration.end(deadline_s=120)
    faults.restore_libvirtd(stage.target)
    _check_wherever(stage, migration, ended.status)


def test_what_flips_killed_in_the_hold_costs_the_flip_and_not_the_migration(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        for pid in stage.flippers():
            processes.send(pid, signal.SIGKILL, wait_s=5.0)
        until(lambda: "lost" in _flips(migration.all()), "the loss told")
        stage.virtgrid("migration", "release", migration.id)
        ended = migration.end()
    assert ended.status == 0, ended.last
    assert "flipped" not in _flips(migration.all())
    stage.check_moved()
    _check_forwarding(stage, stage.here)


def test_what_flips_killed_after_the_flip_of_a_failing_migration_leaves_nothing_turned(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        stage.lab.change_wan(rate_bytes_s=125e3)
        _let_go(stage, migration, "flipped")
        for pid in stage.flippers():
            processes.send(pid, signal.SIGKILL, wait_s=5.0)
        faults.kill_qemu(stage.target, stage.name)
        stage.lab.restore_wan()
        ended = migration.end(deadline_s=120)
    assert ended.status == 1, ended.last
    stage.check_safe_at_source()
    _check_forwarding(stage, stage.here)


def test_a_worker_killed_at_the_flip_leaves_the_guest_reachable(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        stage.lab.change_wan(rate_bytes_s=125e3)
        _let_go(stage, migration, "flipped")
        migration.kill_worker()
        stage.lab.restore_wan()
        ended = migration.end()
    # Nobody has recovered anything yet: what flips hears the guest go on here, and puts it back by itself.
    if stage.state(stage.there) != "running":
        stage.answers()
        until(lambda: not stage.flippers(), "what flips has seen it through")
        _check_forwarding(stage, stage.here)
    _check_wherever(stage, migration, ended.status)


def test_recover_puts_right_what_a_killed_worker_and_flipper_left(stage: Stage) -> None:
    with stage.caught_in("hold") as migration:
        stage.lab.change_wan(rate_bytes_s=125e3)
        _let_go(stage, migration, "flipped")
        pids = stage.flippers()
        migration.kill_worker()
        for pid in pids:
            processes.send(pid, signal.SIGKILL, wait_s=5.0)
        stage.lab.restore_wan()
        ended = migration.end()
    until(lambda: stage.state(stage.there) in ("", "shut off", "running"), "both sites quiet")
    _check_wherever(stage, migration, ended.status)
