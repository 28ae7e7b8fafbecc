"""What cannot be meant is refused before anything is touched; a plan creates what is missing, no more."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import libvirt
import pytest

from tests.unit import plans
from tests.unit.plans import COPY, TARGET, request
from virtgrid.core.errors import UsageError
from virtgrid.migration.plan import check_request, migrate_uri_for
from virtgrid.virt.migrate import MigrateOptions, flags, parameters


def test_a_plain_request_is_accepted() -> None:
    check_request(request())


@pytest.mark.parametrize(
    "uri",
    ["", "bob", "bob/system", "/system", "qemu:system", "lxc:///", "xen+ssh://bob/", "1qemu://bob/system"],
)
def test_a_destination_that_is_no_qemu_hypervisor_is_refused(uri: str) -> None:
    with pytest.raises(UsageError):
        check_request(request(dest_uri=uri))


@pytest.mark.parametrize("uri", ["qemu+tls://bob/system", "qemu+unix:///system?socket=/x", "qemu:///system"])
def test_libvirt_s_ways_of_writing_a_hypervisor_are_accepted(uri: str) -> None:
    check_request(request(dest_uri=uri))


RANGES = [
    ("--bandwidth", "bandwidth_bytes_s", 2**20, 2**43),
    ("--timeout", "timeout_s", 1, 30 * 86400),
    ("--max-downtime", "max_downtime_s", 0.02, 600),
    ("--large", "large_bytes", 1, 2**50),
    ("--stall-timeout", "stall_timeout_s", 5, 86400),
    ("--verify-timeout", "verify_timeout_s", 0, 600),
]


@pytest.mark.parametrize(("option", "field", "low", "high"), RANGES)
def test_every_number_has_a_range_and_the_refusal_names_the_option(
    option: str, field: str, low: float, high: float
) -> None:
    check_request(request(**{field: low}))
    check_request(request(**{field: high}))
    for wrong in (low - 1, high * 1.01, math.nan, math.inf, -math.inf):
        with pytest.raises(UsageError, match=option) as caught:
            check_request(request(**{field: wrong}))
        assert caught.value.exit_status == 2
        assert caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"domain": ""},
        {"domain": "  "},
        {"migrate_disks": ("vda",), "copy_storage": None},
        {"undefine_source": True, "persistent": False},
        {"migrate_uri": "bob"},
        {"migrate_uri": "rdma://bob"},
    ],
)
def test_words_that_contradict_each_other_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        check_request(request(**changes))


@pytest.mark.parametrize(
    ("dest_uri", "asked", "expected"),
    [
        ("qemu+tls://bob/system", None, "tcp://bob"),
        ("qemu+ssh://root@bob:2222/system", None, "tcp://bob"),
        ("qemu+tls://[2001:db8::1]/system", None, "tcp://[2001:db8::1]"),
        ("qemu+unix:///system?socket=/run/x", None, None),
        ("qemu:///system", None, None),
        ("qemu+tls://bob/system", "tcp://10.0.0.2:49152", "tcp://10.0.0.2:49152"),
    ],
)
def test_qemu_connects_to_the_host_the_user_typed(
    dest_uri: str, asked: str | None, expected: str | None
) -> None:
    assert migrate_uri_for(dest_uri, asked) == expected


def test_only_images_that_are_not_there_are_created() -> None:
    second = replace(COPY, target="vdb", path="/images/data.raw", format="raw")
    there = replace(TARGET, path=second.path, exists=True, capacity_bytes=8 << 30, format="raw")
    made = plans.plan(disks=(COPY, second), targets=(TARGET, there))
    assert made.to_create == (COPY,)
    assert made.options.disks == ("vda", "vdb")


def test_nothing_is_created_when_no_storage_is_copied() -> None:
    made = plans.plan(request(copy_storage=None), disks=(), targets=())
    assert made.to_create == ()
    assert made.estimate.storage_bytes == 0


def test_the_estimate_counts_what_goes_over_the_wire() -> None:
    raw = replace(COPY, format="raw")
    assert plans.plan(disks=(COPY,)).estimate.storage_bytes == COPY.allocated_bytes
    assert plans.plan(disks=(raw,)).estimate.storage_bytes == COPY.capacity_bytes
    assert (
        plans.plan(request(copy_storage="inc"), disks=(raw,)).estimate.storage_bytes == COPY.allocated_bytes
    )
    timed = plans.plan(request(bandwidth_bytes_s=float(1 << 20))).estimate
    assert timed.memory_s == pytest.approx(256)
    assert timed.storage_s == pytest.approx(1024)
    assert plans.plan().estimate.memory_s is None


def test_the_options_become_libvirt_s_flags_and_parameters() -> None:
    asked = request(persistent=True, undefine_source=True, unsafe=True, bandwidth_bytes_s=1.5 * 2**20)
    options = plans.plan(asked).options
    wanted = flags(options)
    for flag in (
        libvirt.VIR_MIGRATE_LIVE, libvirt.VIR_MIGRATE_NON_SHARED_DISK, libvirt.VIR_MIGRATE_PERSIST_DEST,
        libvirt.VIR_MIGRATE_UNDEFINE_SOURCE, libvirt.VIR_MIGRATE_UNSAFE,
        libvirt.VIR_MIGRATE_CHANGE_PROTECTION,
    ):  # fmt: skip
        assert wanted & flag
    # Driven by this client: were it peer to peer, a dead client would leave the migration going on.
    assert not wanted & (libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_NON_SHARED_INC)
    given = parameters(options)
    assert given[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH] == 2, "whole MiB/s, rounded up"
    assert given[libvirt.VIR_MIGRATE_PARAM_URI] == "tcp://bob"
    assert given[libvirt.VIR_MIGRATE_PARAM_MIGRATE_DISKS] == ["vda"]


def test_a_plain_migration_has_no_parameters_nobody_asked_for() -> None:
    assert parameters(MigrateOptions(migrate_uri=None)) == {}
    assert not flags(MigrateOptions(migrate_uri=None)) & libvirt.VIR_MIGRATE_NON_SHARED_DISK
