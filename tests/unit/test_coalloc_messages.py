"""What cannot be meant is refused where it comes in, with the place and one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from virtgrid.grid.messages.coalloc import Hold, Nodes, Reserve, range_for
from virtgrid.grid.messages.common import parse
from virtgrid.wire.message import BadMessageError, decode

HOLD: dict[str, Any] = {
    "key": "k" * 16,
    "reservation": "r1",
    "window": {"begins_at_s": 1000, "ends_at_s": 2000},
    "ttl_s": 30,
    "asked_at_s": 990,
    "wanted": {"kind": "nodes", "nodes": 2, "addresses": "10.1.0.0/29"},
}
BACKWARDS = {"kind": "paths", "sites": ["a", "b"], "paths": [{"between": ["b", "a"], "rate_bytes_s": 1}]}
RESERVE: dict[str, Any] = {
    "id": "r1",
    "window": {"begins_at_s": 1000, "ends_at_s": 2000},
    "sites": [{"site": "alpha", "nodes": 2}, {"site": "beta", "nodes": 2}],
    "bandwidth_bytes_s": 12_500_000,
}


def _with(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The same with one member changed: ``window.ends_at_s``, ``sites.0.nodes``."""
    import copy

    changed = copy.deepcopy(base)
    at: Any = changed
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        at = at[part]
    at[last] = value
    return changed


def test_what_can_be_meant_is_read() -> None:
    assert parse(Hold, "HOLD", HOLD).wanted == Nodes(nodes=2, addresses="10.1.0.0/29")
    assert [wish.site for wish in parse(Reserve, "RESERVE", RESERVE).sites] == ["alpha", "beta"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("window.ends_at_s", 1000, "window: the window ends before it begins"),
        ("window.ends_at_s", 10**10, "window: a window is at most 366 days long"),
        ("window.begins_at_s", "2026-11-27T10:00:00", "window.begins_at_s: Input should be a valid integer"),
        ("window.begins_at_s", -1, "window.begins_at_s: Input should be greater than or equal to 0"),
        ("sites", [], "sites: Tuple should have at least 1 item"),
        ("sites.0.nodes", 0, "sites.0.nodes: Input should be greater than or equal to 1"),
        ("sites.0.nodes", 1.5, "sites.0.nodes: Input should be a valid integer"),
        ("sites.1.site", "alpha", "a site stands there twice"),
        ("sites.0.site", "../x", "sites.0.site: String should match pattern"),
        ("sites.0.addresses", "0.0.0.0/0", "sites.0.addresses: a range of addresses is between /20 and /30"),
        ("sites.0.addresses", "10.1.0.1/32", "sites.0.addresses: a range of addresses is between /20 and"),
        ("sites.0.addresses", "10.1.0.1/28", "sites.0.addresses: 10.1.0.1/28 has host bits set"),
        ("sites.0.addresses", "8.8.8.0/28", "sites.0.addresses: the nodes' addresses are private ones"),
        ("sites.0.addresses", "10.1.0.0/31\n", "sites.0.addresses: "),
        ("segment", 0, "segment: Input should be greater than or equal to 1"),
        ("segment", 1 << 24, "segment: Input should be less than or equal to 16777215"),
        ("bandwidth_bytes_s", 0, "bandwidth_bytes_s: Input should be greater than or equal to 1"),
        ("bandwidth_bytes_s", -5, "bandwidth_bytes_s: Input should be greater than or equal to 1"),
        ("surprise", 1, "surprise: is not known"),
        ("id", "Größe", "id: String should match pattern"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_place(path: str, value: object, words: str) -> None:
    with pytest.raises(BadMessageError) as caught:
        parse(Reserve, "RESERVE", _with(RESERVE, path, value))
    assert caught.value.fault.message.startswith(f"RESERVE: {words}")
    assert "\n" not in caught.value.fault.message


def test_overlapping_ranges_are_refused() -> None:
    wish = _with(_with(RESERVE, "sites.0.addresses", "10.1.0.0/24"), "sites.1.addresses", "10.1.0.64/28")
    with pytest.raises(BadMessageError, match=r"10\.1\.0\.0/24 of alpha and 10\.1\.0\.64/28 of beta overlap"):
        parse(Reserve, "RESERVE", wish)


def test_a_range_has_room_for_its_nodes() -> None:
    with pytest.raises(BadMessageError, match=r"10\.1\.0\.0/30 has 2 addresses, too few for 3 nodes"):
        parse(
            Reserve, "RESERVE", _with(_with(RESERVE, "sites.0.addresses", "10.1.0.0/30"), "sites.0.nodes", 3)
        )
    assert [range_for(nodes) for nodes in (1, 2, 3, 6, 7, 14, 4094)] == [30, 30, 29, 29, 28, 28, 20]


def test_bandwidth_needs_two_sites() -> None:
    with pytest.raises(BadMessageError, match="bandwidth is between sites, and there is only one"):
        parse(Reserve, "RESERVE", _with(RESERVE, "sites", RESERVE["sites"][:1]))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_what_is_no_number_is_no_message(number: str) -> None:
    with pytest.raises(BadMessageError):
        decode(
            b'{"jsonrpc":"2.0","id":1,"method":"RESERVE","params":{"bandwidth_bytes_s":%s}}' % number.encode()
        )


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("key", "short", "key: String should match pattern"),
        ("ttl_s", 0, "ttl_s: Input should be greater than or equal to 1"),
        ("ttl_s", 10**6, "ttl_s: Input should be less than or equal to 600"),
        ("wanted", {}, "wanted: Unable to extract tag"),
        ("wanted.nodes", 7, "wanted.nodes: 10.1.0.0/29 has 6 addresses, too few for 7 nodes"),
        (
            "wanted",
            BACKWARDS,
            "wanted.paths.paths.0: a path is between two sites, in the order of their names",
        ),
    ],
)
def test_a_hold_that_cannot_be_meant_is_refused(path: str, value: object, words: str) -> None:
    with pytest.raises(BadMessageError) as caught:
        parse(Hold, "HOLD", _with(HOLD, path, value))
    assert caught.value.fault.message.startswith(f"HOLD: {words}")
