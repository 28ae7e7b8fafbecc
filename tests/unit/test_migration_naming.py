"""A guest's name: what was asked for, which records can be swapped, and what its records are at each step."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from plans import plan, request

from virtgrid.core.errors import UsageError
from virtgrid.migration.naming import (
    LOW_TTL_S,
    NameFacts,
    NameMove,
    NameRequest,
    NameState,
    obstacle,
    parse_request,
)
from virtgrid.migration.preflight import CheckVerdict, preflight
from virtgrid.wire.dns.records import Change, Entry, Record, ServerAddress, in_order

NAME = "web.example.org"
OLD, NEW, OTHER = "10.0.0.1", "198.51.100.1", "203.0.113.9"
OLD6, NEW6 = "fd00::1", "2001:db8::1"
ASKED = NameRequest(name=NAME, addresses=(NEW,), server=ServerAddress("ns"), key_file="/etc/key")


def entry(*addresses: str, ttl_s: int = 300, **more: str) -> Entry:
    records = in_order(Record.of(address, ttl_s) for address in addresses)
    return Entry(name=NAME, zone="example.org", records=records, **more)


def parse(text: str, server: str | None = "ns:5353", key_file: str | None = "/etc/key") -> NameRequest:
    return parse_request(text, server=server, key_file=key_file)


# --- the words ----------------------------------------------------------------------------


def test_a_name_and_its_addresses_are_read() -> None:
    asked = parse(f"Web.Example.ORG.={NEW},2001:DB8:0::1")
    assert (asked.name, asked.addresses) == (NAME, (NEW, NEW6))
    assert asked.server == ServerAddress("ns", 5353)


@pytest.mark.parametrize("text", ["", NAME, f"={NEW}", f".={NEW}", f"*.example.org={NEW}", f"a..b={NEW}"])
def test_words_without_a_name_are_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--dns"):
        parse(text)


@pytest.mark.parametrize("name", ["a" * 64 + ".org", "a." * 130 + "org", "\\300"])
def test_what_is_no_name_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="--dns"):
        parse(f"{name}={NEW}")


@pytest.mark.parametrize(
    "addresses",
    [
        "", f"{NEW},", "hostB", f"{NEW},{OTHER}", f"{NEW6},{NEW6}", "0.0.0.0", "::", "224.0.0.1", "fe80::1",
        "fe80::1%eth0", "198.51.100.1/24",
    ],
)  # fmt: skip
def test_addresses_that_cannot_be_meant_are_a_usage_error(addresses: str) -> None:
    with pytest.raises(UsageError, match="--dns"):
        parse(f"{NAME}={addresses}")


@pytest.mark.parametrize(("server", "key_file"), [(None, "/etc/key"), ("ns", None), ("", "/etc/key")])
def test_without_a_configured_server_and_key_the_hint_says_where_they_belong(
    server: str | None, key_file: str | None
) -> None:
    with pytest.raises(UsageError) as caught:
        parse(f"{NAME}={NEW}", server, key_file)
    assert "virtgrid.toml" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("text", "host", "port", "again"),
    [
        ("ns1", "ns1", 53, "ns1"),
        ("ns1.example.org:5353", "ns1.example.org", 5353, "ns1.example.org:5353"),
        ("192.0.2.53", "192.0.2.53", 53, "192.0.2.53"),
        ("2001:db8::53", "2001:db8::53", 53, "[2001:db8::53]"),
        ("[2001:db8::53]:5353", "2001:db8::53", 5353, "[2001:db8::53]:5353"),
    ],
)
def test_a_server_s_address_is_read_and_written(text: str, host: str, port: int, again: str) -> None:
    address = ServerAddress.parse(text)
    assert (address.host, address.port, str(address)) == (host, port, again)
    assert ServerAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", ":53", "ns:", "ns:0", "ns:65536", "ns:http", "[ns]:53", "[::1", "a b", "ns:٣"]
)
def test_what_is_no_server_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no name server"):
        ServerAddress.parse(text)


# --- preflight ----------------------------------------------------------------------------


def findings(found: NameFacts, asked: NameRequest = ASKED) -> list[tuple[str, str]]:
    checks = preflight(plan(request(dns=asked), name=found))
    return [(check.verdict.value, check.text) for check in checks if check.name == "name"]


def test_records_that_can_be_swapped_pass() -> None:
    assert findings(NameFacts(entry=entry(OLD, ttl_s=30))) == [("PASS", f"{NAME} {OLD} → {NEW}, at ns")]
    both = replace(ASKED, addresses=(NEW6, NEW))
    [(verdict, text)] = findings(NameFacts(entry=entry(OLD, OLD6, ttl_s=30)), both)
    assert (verdict, text) == ("PASS", f"{NAME} {OLD} and {OLD6} → {NEW} and {NEW6}, at ns")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (entry(), "has no A record"),
        (entry(OLD6), "has no A record"),
        (entry(OLD, OTHER), "cannot be told"),
        (entry(alias="www.example.org"), "is an alias of www.example.org"),
    ],
)
def test_records_that_cannot_be_swapped_fail(found: Entry, words: str) -> None:
    [(verdict, text)] = findings(NameFacts(entry=found))
    assert verdict == CheckVerdict.FAIL.value
    assert words in text
    assert obstacle(ASKED, found) is not None


def test_a_name_server_that_did_not_do_it_fails_with_its_own_words() -> None:
    assert findings(NameFacts(problem="it does not answer", hint="is it running?")) == [
        ("FAIL", "it does not answer")
    ]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (entry(OLD, ttl_s=3600), "for up to 1h00m"),
        (entry(OLD, OLD6, ttl_s=30), f"goes on pointing to {OLD6} as well"),
        (entry(NEW, ttl_s=30), "already"),
    ],
)
def test_what_clients_may_notice_is_warned_of(found: Entry, words: str) -> None:
    [(passed, _), (verdict, text)] = findings(NameFacts(entry=found))
    assert (passed, verdict) == ("PASS", "WARN")
    assert words in text


# --- the states ---------------------------------------------------------------------------


def way(*addresses: str, ttl_s: int = 300) -> NameMove:
    both = replace(ASKED, addresses=(NEW, NEW6)[: len(addresses)])
    return NameMove.of(both, entry(*addresses, ttl_s=ttl_s))


def told(records: tuple[Record, ...]) -> list[tuple[str, int]]:
    return [(record.address, record.ttl_s) for record in records]


def test_the_records_of_each_state() -> None:
    assert {state: told(way(OLD, OLD6).records(state)) for state in NameState} == {
        NameState.ORIGINAL: [(OLD, 300), (OLD6, 300)],
        NameState.LOWERED: [(OLD, LOW_TTL_S), (OLD6, LOW_TTL_S)],
        NameState.MOVED: [(NEW, LOW_TTL_S), (NEW6, LOW_TTL_S)],
        NameState.SETTLED: [(NEW, 300), (NEW6, 300)],
    }


def test_a_time_to_live_that_is_short_already_is_not_raised() -> None:
    assert told(way(OLD, ttl_s=2).records(NameState.MOVED)) == [(NEW, 2)]


@pytest.mark.parametrize("ttl_s", [2, LOW_TTL_S, 300])
@pytest.mark.parametrize(("state", "last"), list(product(NameState, (NameState.ORIGINAL, NameState.SETTLED))))
def test_from_every_state_of_ours_the_last_one_is_reached(
    state: NameState, last: NameState, ttl_s: int
) -> None:
    ours = way(OLD, OLD6, ttl_s=ttl_s)
    found = replace(entry(), records=ours.records(state))
    change = ours.end(found, last)
    if found.records == ours.records(last):
        assert change is None
    else:
        assert isinstance(change, Change)
        assert (change.before, change.after) == (found.records, ours.records(last))


@pytest.mark.parametrize("last", [NameState.ORIGINAL, NameState.SETTLED])
@pytest.mark.parametrize(
    "found", [entry(OTHER), entry(), entry(OLD, OTHER), entry(OLD, ttl_s=77), entry(NEW, ttl_s=77)]
)
def test_records_that_somebody_else_has_set_are_left_alone(found: Entry, last: NameState) -> None:
    sentence = way(OLD).end(found, last)
    assert isinstance(sentence, str)
    assert "somebody else" in sentence


def test_records_of_a_kind_that_was_not_asked_for_do_not_matter() -> None:
    ours = way(OLD)
    assert ours.end(entry(OLD, OLD6), NameState.ORIGINAL) is None


def test_what_a_journal_keeps_gives_the_same_again() -> None:
    ours = replace(way(OLD, OLD6), server=ServerAddress("::1", 5353))
    assert NameMove.from_fields(ours.fields()) == ours
