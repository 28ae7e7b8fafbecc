"""A link shared between a migration and the service: the tree, the rates, and what connections are told."""

from __future__ import annotations

import pytest
from plans import plan, request

from virtgrid.core.errors import UsageError
from virtgrid.migration.plan import WanFacts, check_request
from virtgrid.migration.preflight import CheckVerdict, preflight
from virtgrid.net import share
from virtgrid.net.guarantee import AddFilter, Class, Plant, SetClass
from virtgrid.net.share import Sharing, Uplink
from virtgrid.net.streams import UNSENT_MAX_BYTES, UNSENT_MIN_BYTES, choose

LINK = Sharing(link_bytes_s=12.5e6, service=0.1)


def _classes(steps: tuple[object, ...]) -> dict[int, Class]:
    return {step.minor: step.to for step in steps if isinstance(step, SetClass)}


@pytest.mark.parametrize("service", [0.01, 0.1, 0.333, 0.9])
@pytest.mark.parametrize("rate", [1 << 20, 12.5e6, 12.5e9])
def test_the_two_parts_are_never_more_than_the_link(rate: float, service: float) -> None:
    sharing = Sharing(link_bytes_s=rate, service=service)
    for steps in (share.shared(sharing), share.raised(sharing)):
        classes = _classes(steps)
        parts = classes[share.SERVICE].rate_bytes_s + classes[share.MIGRATION].rate_bytes_s
        assert parts <= round(rate)
        assert classes[share.SERVICE].ceil_bytes_s == round(rate)


def test_the_service_comes_first_until_the_release() -> None:
    before, after = _classes(share.shared(LINK)), _classes(share.raised(LINK))
    assert before[share.SERVICE].prio < before[share.MIGRATION].prio
    assert before[share.MIGRATION].ceil_bytes_s == LINK.migration_bytes_s
    assert after[share.MIGRATION].prio < after[share.SERVICE].prio
    assert after[share.MIGRATION].ceil_bytes_s == 12_500_000
    assert after[share.SERVICE].rate_bytes_s == LINK.service_bytes_s


def test_what_no_filter_knows_is_the_service_and_what_is_beside_the_link_passes_by() -> None:
    steps = share.shared(LINK, ("192.0.2.0/24", "fe80::/64"))
    assert steps[0] == Plant(share.SERVICE)
    assert [step.minor for step in steps if isinstance(step, AddFilter)] == [0, 0]


def test_qemu_is_told_what_its_class_carries() -> None:
    asked = request(bandwidth_bytes_s=12.5e6, service_share=0.1)
    assert asked.precopy_bytes_s == share.payload(11_250_000) < 11_250_000
    assert asked.release_bytes_s == share.payload(12_500_000)
    plain = request(bandwidth_bytes_s=12.5e6)
    assert plain.precopy_bytes_s == plain.release_bytes_s == 12.5e6


@pytest.mark.parametrize(
    ("rate", "unsent"),
    [(0, UNSENT_MIN_BYTES), (12.5e6, UNSENT_MIN_BYTES), (1.25e8, 1_250_000), (1e12, UNSENT_MAX_BYTES)],
)
def test_a_hundredth_of_a_second_may_be_unsent(rate: float, unsent: int) -> None:
    assert choose(rate, 0.0, kernel_bytes=1 << 40).unsent_bytes == unsent


def test_a_buffer_is_set_only_where_the_kernels_own_would_slow_it_down() -> None:
    assert choose(12.5e6, 0.1, kernel_bytes=4 << 20).buffer_bytes is None
    assert choose(1.25e8, 0.1, kernel_bytes=4 << 20).buffer_bytes == 25_000_000 + 1_250_000


def test_a_share_without_a_bandwidth_or_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match="--service-share is a part of --bandwidth"):
        check_request(request(service_share=0.1))
    with pytest.raises(UsageError, match="--service-share is out of range"):
        check_request(request(service_share=0.95, bandwidth_bytes_s=12.5e6))


def test_preflight_says_where_the_link_is_shared_or_why_not() -> None:
    asked = request(bandwidth_bytes_s=12.5e6, service_share=0.1)
    there = plan(asked, wan=WanFacts(peers=("192.0.2.2",), uplink=Uplink(interface="wan0")))
    refused = plan(asked, wan=WanFacts(peers=("192.0.2.2",), problem="wan0 is taken", hint="tc"))
    verdicts = [
        next(check for check in preflight(one) if check.name == "share").verdict for one in (there, refused)
    ]
    assert verdicts == [CheckVerdict.PASS, CheckVerdict.WARN]
    assert not [check for check in preflight(plan()) if check.name == "share"]
