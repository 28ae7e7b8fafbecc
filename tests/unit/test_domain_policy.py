"""A domain's policy: what may stand there, where it leads, and that nothing hostile gets in."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtgrid.core.errors import RefusedError
from virtgrid.migration.domainpolicy import (
    LIMIT_BYTES,
    NAMESPACE,
    DomainPolicy,
    bare,
    cheaper,
    choose,
    parse,
    read,
)

FULL = f"""\
<policy xmlns="{NAMESPACE}">
  <!-- who reads this -->
  <yield to="jobs"/>
  <destination name="hostb" price="20">
    <window from="22:00" until="06:00" zone="Europe/Berlin" days="mon,sun" price="5"/>
  </destination>
  <destination site="kyoto" price="10"/>
  <gate policy="strict" max-wait="2m" on-timeout="abort" bandwidth="100mbit"/>
  <foreign gate="yes"/>
</policy>
""".encode()
SITES = {"hostb": "b", "hostk": "kyoto", "hostl": "kyoto"}


def test_all_that_can_be_said_is_read() -> None:
    found = parse(FULL, what="f")
    assert (found.yields, found.gate, found.max_wait_s, found.on_timeout) == (True, "strict", 120.0, "abort")
    assert (found.bandwidth_bytes_s, found.gate_foreign) == (12.5e6, True)
    assert [wish.text for wish in found.wishes] == ["hostb", "site kyoto"]


def test_nothing_is_a_policy_too() -> None:
    assert parse(b"<policy/>", what="f") == DomainPolicy()


def test_libvirt_s_form_without_a_namespace_means_the_same() -> None:
    text = bare(read(FULL, what="f"))
    assert NAMESPACE not in text
    assert parse(text.encode(), what="f") == parse(FULL, what="f")


@pytest.mark.parametrize(
    ("at", "to"),
    [
        ("2026-11-30T12:00", "hostk"),  # a Monday's noon: 10 is the lowest
        ("2026-11-30T21:30", "hostb"),  # 22:30 in Berlin
        ("2026-12-01T04:59", "hostb"),  # the same night, 05:59 in Berlin
        ("2026-12-01T05:00", "hostk"),
        ("2026-12-01T21:30", "hostk"),  # Tuesday's night is not among the days
        ("2026-11-29T22:00", "hostb"),  # Sunday
        ("2026-07-06T20:30", "hostb"),  # in summer 22:30 there, too
        ("2026-07-06T19:59", "hostk"),
    ],
)
def test_the_lowest_price_of_the_moment_wins(at: str, to: str) -> None:
    assert choose(parse(FULL, what="f"), SITES, datetime.fromisoformat(at).replace(tzinfo=UTC)).to == to


def test_of_equal_prices_the_first_counts_and_unknown_ones_are_left_out() -> None:
    text = b'<policy><destination name="gone"/><destination name="b"/><destination name="a"/></policy>'
    now = datetime(2026, 1, 1, tzinfo=UTC)
    found = choose(parse(text, what="f"), {"a": None, "b": None}, now)
    assert (found.to, found.reason) == ("b", "b, price 0, the lowest of 2")
    nowhere = choose(parse(text, what="f"), {}, now)
    assert (nowhere.to, nowhere.reason) == (None, "the configuration has no destination gone, b, a")
    assert choose(DomainPolicy(), SITES, now).reason == "its policy names no destination"


@pytest.mark.parametrize(
    ("at", "to"), [("2026-11-30T12:00", "hostk"), ("2026-11-30T21:30", None), ("2026-12-01T05:00", "hostk")]
)
def test_who_follows_prices_goes_when_it_is_cheaper_elsewhere_and_only_then(at: str, to: str | None) -> None:
    text = FULL.replace(b"<yield", b'<follow what="price"/><yield')
    now = datetime.fromisoformat(at).replace(tzinfo=UTC)
    assert cheaper(parse(text, what="f"), SITES, ("hostb", "b"), now).to == to
    # At its place it stays: there is no cheaper one, and none of the same price is worth a migration.
    there = cheaper(parse(text, what="f"), SITES, (to or "hostk", "kyoto"), now)
    assert there.to == (None if to else "hostb")


def test_prices_are_followed_only_where_they_are_known() -> None:
    text = FULL.replace(b"<yield", b'<follow what="price"/><yield')
    now = datetime(2026, 11, 30, 12, tzinfo=UTC)
    assert cheaper(parse(FULL, what="f"), SITES, ("hostb", "b"), now).to is None
    assert cheaper(parse(text, what="f"), SITES, ("hosta", "a"), now).reason == (
        "its policy has no price for hosta, where it is"
    )
    assert cheaper(parse(text, what="f"), SITES, ("hostb", "b"), now).reason == (
        "hostk, price 10, is cheaper than here, 20"
    )


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (b"<policy>\n<postcopy/>\n</policy>", 2, "postcopy"),
        (b"<policy>\n<gate\n policy='never'/></policy>", 3, "policy"),
        (b"<policy>\n<gate postcopy='yes'/></policy>", 2, "postcopy"),
        (b"<policy>\n<gate on-timeout='hold'/></policy>", 2, "on-timeout"),
        (b"<policy>\n\n<destination uri='qemu+ssh://evil/?command=/bin/sh'/></policy>", 3, "destination"),
        (b"<policy>\n<destination name='../hostb'/></policy>", 2, "destination"),
        (b"<policy>\n<destination name='a' site='b'/></policy>", 2, "destination"),
        (b"<policy>\n<yield to='jobs'/>\n<yield to='jobs'/></policy>", 3, "yield"),
        (b"<policy>\n<gate max-wait='3parsecs'/></policy>", 2, "max-wait"),
        (b"<policy>\n<gate max-wait='3sec'/></policy>", 2, "not a duration"),
        (b"<policy>\n<gate max-wait='9d'/></policy>", 2, "longer than a week"),
        (b"<policy>\n<gate bandwidth='1kbit'/></policy>", 2, "less than 1 MiB/s"),
        (b"<policy>\nwords</policy>", 1, "text"),
        (b"<policy>\n<yield to='jobs'></policy>", 2, "mismatch"),
        (b"<policy xmlns='urn:other'/>", 1, "namespace"),
        (b"<policy>\n<x:yield xmlns:x='urn:other' to='jobs'/></policy>", 2, "yield"),
        (b"<domain/>", 1, "domain"),
        (b"", 1, "empty"),
        (b"\x00", 1, ""),
        (b"<?xml version='1.0' encoding='klingon'?><policy/>", 1, "encoding"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_line(text: bytes, line: int, words: str) -> None:
    with pytest.raises(RefusedError) as caught:
        parse(text, what="web1.xml")
    assert caught.value.what.startswith(f"web1.xml:{line}: "), caught.value.what
    assert words in caught.value.what
    assert caught.value.hint


@pytest.mark.parametrize("zone", ["Europe/Nowhere", "a/b/c", "posixrules/x"])
def test_a_zone_that_is_none_is_told(zone: str) -> None:
    text = f"<policy><destination name='a'>\n<window from='01:00' until='02:00' zone='{zone}' price='1'/>"
    with pytest.raises(RefusedError, match="f:2: there is no time zone"):
        parse(f"{text}</destination></policy>".encode(), what="f")


@pytest.mark.parametrize(
    "text",
    [
        b"<!DOCTYPE policy [<!ENTITY a 'aaaa'>]><policy>&a;</policy>",
        b"<!DOCTYPE policy [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><policy>&a;</policy>",
        b"<!DOCTYPE policy SYSTEM 'http://127.0.0.1:1/x.dtd'><policy/>",
        b"<policy>" + b"<a>" * 1000,
        b"<policy>" + b" " * LIMIT_BYTES + b"</policy>",
        "<!DOCTYPE policy [<!ENTITY a 'b'>]><policy/>".encode("utf-16"),
    ],
)
def test_what_is_made_to_harm_is_refused(text: bytes) -> None:
    with pytest.raises(RefusedError, match=r"^f:\d+: "):
        parse(text, what="f")


_PIECES = st.sampled_from(
    [
        b"<policy>", b"</policy>", b"<policy/>", b"<yield to='jobs'/>", b"<destination name='a'", b"/>", b">",
        b"<gate ", b"max-wait='9s'", b"price='1'", b"<window from='22:00' until='22:00' zone='UTC'",
        b"</destination>", b"<!DOCTYPE a [", b"<!ENTITY b 'c'>", b"]>", b"&b;", b"&#0;", b"<![CDATA[",
        b"\xff", b"xmlns='urn:x'", b"<?xml version='1.0' encoding='utf-16'?>", b"<!--", b"-->", b"<?pi?>",
    ]
)  # fmt: skip


@given(st.one_of(st.binary(max_size=300), st.lists(_PIECES, max_size=24).map(b"".join)))
def test_whatever_stands_there_is_read_or_refused_with_a_line(text: bytes) -> None:
    refused: RefusedError | None = None
    try:
        found = parse(text, what="f")
    except RefusedError as error:
        refused = error
    if refused is not None:
        assert re.match(r"f:[1-9][0-9]*: .", refused.what)
        assert len(refused.what) < 600
    else:
        choose(found, SITES, datetime(2026, 1, 1, tzinfo=UTC))
        again = bare(read(text, what="f"))
        assert parse(again.encode(), what="f") == found
