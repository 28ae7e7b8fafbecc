"""Whatever stands in a key's file, in --dns, in the configuration or on the wire: understood or refused."""

from __future__ import annotations

import base64
import contextlib

import dns.exception
import dns.message
import dns.tsig
from hypothesis import given, settings
from hypothesis import strategies as st

from virtgrid.core.errors import UsageError
from virtgrid.migration.naming import parse_request
from virtgrid.wire.dns.key import parse_key
from virtgrid.wire.dns.records import ServerAddress

WORDS = st.lists(
    st.sampled_from(
        ["web", ".", "=", ",", "10.0.0.1", "::1", "fe80::1%a", "*", "\\", "é", "[", "]", ":", "53"]
    )
).map("".join)


@given(st.binary(min_size=1, max_size=64))
def test_every_secret_is_read_back(secret: bytes) -> None:
    text = f'key "k" {{ algorithm hmac-sha512; secret "{base64.b64encode(secret).decode()}"; }};'
    assert parse_key(text).secret == secret


@given(st.one_of(st.text(), WORDS))
def test_any_text_is_a_key_or_a_value_error(text: str) -> None:
    for whole in (text, f'key "k" {{ algorithm hmac-sha256; secret "{text}"; }};'):
        with contextlib.suppress(ValueError):
            parse_key(whole)


@settings(max_examples=300)
@given(st.one_of(st.text(), WORDS), st.one_of(st.text(), WORDS))
def test_any_words_are_a_request_or_a_usage_error(name: str, rest: str) -> None:
    for text in (name, f"{name}={rest}"):
        with contextlib.suppress(UsageError):
            asked = parse_request(text, server="ns", key_file="k")
            assert asked.name
            assert 1 <= len(asked.addresses) <= 2


@given(st.one_of(st.text(), WORDS))
def test_any_text_is_a_server_that_is_written_as_it_is_read_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        address = ServerAddress.parse(text)
        assert ServerAddress.parse(str(address)) == address


KEY = dns.tsig.Key("virtgrid", "AAAABBBB", "hmac-sha256")


@settings(max_examples=300)
@given(st.data())
def test_a_signed_answer_that_was_tampered_with_says_the_same_or_is_refused(data: st.DataObject) -> None:
    query = dns.message.make_query("web.svc.test", "A", flags=0)
    query.use_tsig(KEY)
    query.to_wire()
    answer = dns.message.make_response(query)
    answer.use_tsig(KEY)
    wire = bytearray(answer.to_wire())
    # Not the id: the exchange compares it. Letters may change their case: the name stays the same.
    at = data.draw(st.integers(2, len(wire) - 1))
    wire[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(dns.exception.DNSException):
        taken = dns.message.from_wire(bytes(wire), keyring=KEY, request_mac=query.mac)
        assert (taken.flags, taken.question, taken.answer) == (answer.flags, answer.question, answer.answer)
