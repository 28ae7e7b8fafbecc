"""A line is a message or is refused with a sentence; nothing else can come of it."""

from __future__ import annotations

import json

import pytest

from virtgrid.core import errors
from virtgrid.wire import message
from virtgrid.wire.lines import LineCutter, LineTooLongError
from virtgrid.wire.message import BadMessageError, Fault, Request, Response, decode, encode


@pytest.mark.parametrize(
    "said",
    [
        Request(method="INIT", params={"a": [1, {"b": None}]}, id=7),
        Request(method="TELL", params={}),
        Response(id=7, result={"x": "\u2028 \ud800 ü"}),
        Response(id="a", result=None),
        Response(id=None, fault=Fault(code=-32700, message="no")),
        Response(id=3, fault=Fault(code=3, message="no", data={"error": "VG-REFUSED"})),
    ],
)
def test_what_is_encoded_is_one_line_of_ascii_and_decodes_to_the_same(said: message.Message) -> None:
    line = encode(said)
    assert line.count(b"\n") == 1
    assert line.isascii()
    assert decode(line) == said


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b'{"jsonrpc":"2.0","method":"PING","id":1', message.PARSE_ERROR, "not JSON"),
        (b"\xff\xfe{}", message.PARSE_ERROR, "not UTF-8"),
        (b"[" * 5000 + b"]" * 5000, message.PARSE_ERROR, "deep"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, message.PARSE_ERROR, "deep"),
        (b'{"jsonrpc":"2.0","method":"A","id":1,"id":2}', message.PARSE_ERROR, "twice"),
        (b'{"jsonrpc":"2.0","method":"A","params":{"x":NaN}}', message.PARSE_ERROR, "NaN"),
        (b'{"jsonrpc":"2.0","method":"A","params":{"x":1e999}}', message.PARSE_ERROR, "too large"),
        (b'{"jsonrpc":"2.0","id":' + b"9" * 5000 + b"}", message.PARSE_ERROR, "not JSON"),
        (b"[]", message.INVALID_REQUEST, "batch"),
        (b"null", message.INVALID_REQUEST, "object"),
        (b'{"method":"A","id":1}', message.INVALID_REQUEST, "jsonrpc"),
        (b'{"jsonrpc":"2.0","method":7,"id":1}', message.INVALID_REQUEST, "method"),
        (b'{"jsonrpc":"2.0","method":"a b","id":1}', message.INVALID_REQUEST, "method"),
        (b'{"jsonrpc":"2.0","method":"A","params":[1],"id":1}', message.INVALID_REQUEST, "by name"),
        (b'{"jsonrpc":"2.0","method":"A","id":{}}', message.INVALID_REQUEST, "id"),
        (b'{"jsonrpc":"2.0","method":"A","id":true}', message.INVALID_REQUEST, "id"),
        (b'{"jsonrpc":"2.0","method":"A","id":1.5}', message.INVALID_REQUEST, "id"),
        (b'{"jsonrpc":"2.0","method":"A","id":1,"x":1}', message.INVALID_REQUEST, "unknown member"),
        (b'{"jsonrpc":"2.0","id":1}', message.INVALID_REQUEST, "neither"),
        (b'{"jsonrpc":"2.0","id":1,"result":1,"error":{"code":1,"message":""}}', -32600, "neither"),
        (b'{"jsonrpc":"2.0","id":1,"error":"x"}', message.INVALID_REQUEST, "an error has"),
    ],
)
def test_a_line_that_is_no_message_is_refused_with_a_sentence(line: bytes, code: int, words: str) -> None:
    with pytest.raises(BadMessageError) as caught:
        decode(line)
    assert caught.value.fault.code == code
    assert words in caught.value.fault.message


def test_brackets_within_texts_are_not_depth() -> None:
    text = '[{"\\"' * 200
    assert decode(encode(Request(method="A", params={"x": text}))) == Request(method="A", params={"x": text})


def test_a_message_longer_than_a_line_is_never_sent() -> None:
    with pytest.raises(ValueError, match="longer"):
        encode(Request(method="A", params={"x": "y" * message.LINE_LIMIT_BYTES}))


def test_lines_are_cut_wherever_the_bytes_were_split() -> None:
    text = b'{"a":1}\n\r\n{"b":2}\r\nhalf'
    for at in range(len(text)):
        cutter = LineCutter()
        assert cutter.feed(text[:at]) + cutter.feed(text[at:]) == [b'{"a":1}', b'{"b":2}']
        assert cutter.rest == b"half"


@pytest.mark.parametrize("piece", [1 << 12, 1 << 16, 1 << 21])
def test_a_line_of_two_mib_is_refused_and_never_held(piece: int) -> None:
    cutter = LineCutter()

    def feed() -> None:
        for _ in range((2 << 20) // piece):
            cutter.feed(b"x" * piece)

    with pytest.raises(LineTooLongError):
        feed()
    assert len(cutter.rest) <= message.LINE_LIMIT_BYTES + piece


@pytest.mark.parametrize(
    "error",
    [
        errors.RefusedError("no", hint="ask"),
        errors.NotFoundError("nothing", where="there", cause="gone"),
        errors.VirtgridError("bad"),
    ],
)
def test_an_error_of_ours_is_the_same_at_the_other_end(error: errors.VirtgridError) -> None:
    answer = decode(encode(Response(id=1, fault=message.fault_of(error))))
    assert isinstance(answer, Response)
    assert answer.fault is not None
    again = message.error_of(answer.fault)
    assert type(again) is type(error)
    assert again.as_dict() == error.as_dict()


def test_a_fault_of_a_stranger_keeps_its_code() -> None:
    fault = Fault(code=-32601, message="there is no method X")
    again = message.error_of(fault)
    assert isinstance(again, message.RemoteError)
    assert message.fault_of(again) == fault
    assert json.loads(encode(Response(id=1, fault=fault)))["error"]["code"] == -32601


def test_an_error_that_is_told_at_length_is_cut() -> None:
    for code in ("VG-REFUSED", "VG-OTHER"):
        data = {"error": code, "hint": "h" * 50_000}
        told = message.error_of(Fault(code=3, message="w" * 50_000, data=data))
        assert len(told.what) == 2000
        assert len(told.hint or "") <= 2000
