"""Names, places and addresses of a lab."""

from __future__ import annotations

from pathlib import Path

import pytest

from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.lab.layout import LabConfig, Layout, LinkSpec, check_name, parse_sites


@pytest.mark.parametrize("name", ["", "Lab", "1lab", "a-b", "a/b", "..", "a" * 25, "lab\n", "ä"])
def test_a_name_that_could_mean_something_else_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


def test_sites_by_number_or_by_name() -> None:
    assert parse_sites("2") == ("alice", "bob")
    assert parse_sites("4") == ("alice", "bob", "carol", "dave")
    assert parse_sites("tsukuba, osaka") == ("tsukuba", "osaka")


@pytest.mark.parametrize("text", ["1", "5", "0", "alice", "alice,alice", "client,bob", "a b,c", "", "²"])
def test_senseless_sites_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_sites(text)


@pytest.mark.parametrize(
    "values",
    [
        {"rate_bytes_s": -1.0}, {"rate_bytes_s": 1.0}, {"rtt_s": -0.1}, {"rtt_s": 11.0}, {"queue_s": 0.0},
        {"loss": 1.0}, {"loss": -0.1}, {"rtt_s": float("nan")}, {"rate_bytes_s": float("inf")},
    ],
)  # fmt: skip
def test_a_link_out_of_range_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        LinkSpec(**values)


def test_no_two_sites_share_an_address_a_mac_or_a_uuid() -> None:
    sites = Layout.of("lab", ("a", "b", "c", "d"), Path("/srv/labs")).sites
    for what in ("wan_address", "segment_address", "wan_mac", "bridge_mac", "host_uuid", "namespace", "root"):
        assert len({getattr(site, what) for site in sites}) == 4
    assert "10.77.0.1" not in {site.segment_address for site in sites}


def test_a_record_survives_writing_and_reading() -> None:
    config = LabConfig(name="x", sites=("a", "b", "c"), wan=LinkSpec(rtt_s=0.1, loss=0.02), client_rtt_s=0.02)
    assert LabConfig.from_dict(config.as_dict()) == config


def test_a_directory_too_deep_for_a_socket_is_refused_at_once() -> None:
    with pytest.raises(RefusedError, match="too deep"):
        Layout.of("lab", ("alice", "bob"), Path("/srv") / ("x" * 80))


@pytest.mark.parametrize(
    "directory", ["/run/labs", "/etc/labs", "/var/lib/libvirt/labs", "/srv/a,b", "/srv/a b"]
)
def test_a_directory_that_a_site_could_not_see_is_refused(directory: str) -> None:
    with pytest.raises(RefusedError):
        Layout.of("lab", ("alice", "bob"), Path(directory))


def test_every_site_knows_every_name() -> None:
    layout = Layout.of("lab", ("alice", "bob"), Path("/srv/labs"))
    for here in layout.sites:
        assert "10.99.0.1 alice.lab.lab alice" in layout.hosts(here)
        assert "10.99.0.2 bob.lab.lab bob" in layout.hosts(here)
