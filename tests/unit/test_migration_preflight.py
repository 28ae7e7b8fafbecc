"""Every preflight check says PASS, WARN or FAIL for the facts it should, with a way out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.unit import plans
from tests.unit.plans import COPY, DISK, RUNNING, TARGET, XML, host
from virtgrid.migration.policy import PolicyConfig
from virtgrid.migration.preflight import Check, CheckVerdict, failures, preflight
from virtgrid.virt.domain import DomainState, Position

PASS, WARN, FAIL = CheckVerdict.PASS, CheckVerdict.WARN, CheckVerdict.FAIL
IMMEDIATE = plans.request(policy=PolicyConfig(name="immediate"))
SHARED = plans.request(copy_storage=None)
SHUTOFF = Position(state=DomainState.SHUTOFF)
PAUSED = Position(state=DomainState.PAUSED, reason="migration")
RESOLVED = host("bob", address_resolves=True)
NO_DIRECTORY = replace(TARGET, problem="no such file")
SMALL = replace(TARGET, exists=True, capacity_bytes=1 << 30)
SECOND = replace(COPY, target="vdb", path="/images/web1-data.qcow2", allocated_bytes=6 << 30)


def checks(name: str, asked: Any = None, **changes: Any) -> list[Check]:
    return [check for check in preflight(plans.plan(asked, **changes)) if check.name == name]


def test_a_healthy_plan_passes_every_check() -> None:
    found = preflight(plans.plan())
    assert {check.verdict for check in found} == {PASS}
    assert {check.name for check in found} >= {
        "hosts", "domain", "destination", "address", "machine", "cpu", "storage", "connections",
    }  # fmt: skip
    assert failures(found) == ()


CASES: list[tuple[str, CheckVerdict, str, dict[str, Any], Any]] = [
    ("hosts", FAIL, "already runs on", {"destination": host("bob", host_uuid="uuid of alice")}, None),
    ("domain", FAIL, "being migrated already", {"other_migration": "20260101T000000-web1"}, None),
    ("domain", FAIL, "somebody else", {"source_position": replace(RUNNING, job=True)}, None),
    ("domain", FAIL, "shut off", {"source_position": SHUTOFF}, None),
    ("domain", FAIL, "paused (migration)", {"source_position": PAUSED}, None),
    ("destination", FAIL, "already running", {"destination_position": RUNNING}, None),
    ("destination", FAIL, "already paused", {"destination_position": PAUSED}, None),
    ("destination", FAIL, "another domain", {"destination_name_taken_by": "other"}, None),
    ("destination", PASS, "no web1", {"destination_name_taken_by": plans.UUID}, None),
    ("destination", WARN, "replaced", {"destination_position": SHUTOFF}, None),
    ("address", FAIL, "cannot be resolved", {"migrate_host_resolves": False}, None),
    ("address", FAIL, "cannot resolve", {"migrate_uri": None}, None),
    ("address", PASS, "announces", {"migrate_uri": None, "destination": RESOLVED}, None),
    ("machine", FAIL, "no machine type", {"machine_known": False}, None),
    ("machine", PASS, "pc-i440fx", {"machine_known": None}, None),
    ("cpu", FAIL, "lacks avx", {"cpu_compatible": False, "cpu_text": "bob lacks avx"}, None),
    ("cpu", WARN, "cannot tell", {"cpu_compatible": None, "cpu_text": "cannot tell"}, None),
    ("devices", FAIL, "2 host device", {"xml": replace(XML, host_devices=2)}, None),
    ("storage", WARN, "must share", {}, SHARED),
    ("storage", FAIL, "no disk 'vdz'", {"disk_problems": ("the domain has no disk 'vdz'",)}, None),
    ("storage", FAIL, "cannot open the directory", {"targets": (NO_DIRECTORY,)}, None),
    ("storage", FAIL, "too small", {"targets": (SMALL,)}, None),
    (
        "storage", FAIL, "is raw, the disk is qcow2",
        {"targets": (replace(TARGET, exists=True, capacity_bytes=8 << 30, format="raw"),)}, None,
    ),
    (
        "storage", PASS, "will be overwritten",
        {"targets": (replace(TARGET, exists=True, capacity_bytes=9 << 30, format="qcow2"),)}, None,
    ),
    ("storage", PASS, "will be created", {}, None),
    ("space", FAIL, "free", {"targets": (replace(TARGET, free_bytes=1 << 20),)}, None),
    ("connections", FAIL, "no tap", {"tap": None, "tap_visible": False, "tap_problem": "no tap"}, None),
    ("connections", WARN, "no tap", {"tap": None, "tap_visible": False, "tap_problem": "no tap"}, IMMEDIATE),
    ("hooks", WARN, "older than", {"hook_warning": "a hook is older than libvirtd"}, None),
    ("hooks", PASS, "hooks are", {"hook_text": "the hooks are read"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "verdict", "says", "changes", "asked"), CASES)
def test_each_fact_has_its_verdict(
    name: str, verdict: CheckVerdict, says: str, changes: dict[str, Any], asked: Any
) -> None:
    found = checks(name, asked, **changes)
    assert any(check.verdict is verdict and says in check.text for check in found), found


@pytest.mark.parametrize(("name", "verdict", "says", "changes", "asked"), [c for c in CASES if c[1] is FAIL])
def test_what_refuses_says_what_to_do(
    name: str, verdict: CheckVerdict, says: str, changes: dict[str, Any], asked: Any
) -> None:
    refusing = failures(preflight(plans.plan(asked, **changes)))
    assert refusing
    assert all(check.hint or check.text in changes.get("disk_problems", ()) for check in refusing)


def test_disks_in_one_file_system_are_counted_together() -> None:
    targets = tuple(replace(TARGET, path=disk.path, free_bytes=6 << 30) for disk in (COPY, SECOND))
    found = checks("space", disks=(COPY, SECOND), targets=targets)
    assert [check.verdict for check in found] == [FAIL]
    assert "7.0 GiB" in found[0].text


def test_disks_in_two_file_systems_are_counted_each_for_itself() -> None:
    targets = (replace(TARGET, free_bytes=2 << 30), replace(TARGET, path=SECOND.path, free_bytes=7 << 30))
    assert checks("space", disks=(COPY, SECOND), targets=targets) == []


def test_shared_and_readonly_disks_need_no_copying() -> None:
    disks = (replace(DISK, shareable=True), replace(DISK, target="vdb", readonly=True))
    assert checks("storage", SHARED, xml=replace(XML, disks=disks), disks=(), targets=()) == []
