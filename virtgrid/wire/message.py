"""JSON-RPC 2.0 messages, one object per line of UTF-8: bytes in, frozen messages out. Pure.

Source: the JSON-RPC 2.0 specification (jsonrpc.org). Stricter than it where strictness costs nobody anything:
no batches, parameters by name only, an id is a short text or an integer, no key twice in one object.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from virtgrid.core import errors
from virtgrid.core.errors import VirtgridError

LINE_LIMIT_BYTES: Final = 1 << 20
"""The longest line, its end included. A 2 MiB line is refused, not read."""
DEPTH_LIMIT: Final = 32
"""Objects and lists within each other. Python's own parser gives up at some 1,000 with a RecursionError."""
_METHOD: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.]{0,63}")
_ID_LIMIT: Final = 64
_TOLD_LIMIT: Final = 2000
"""Characters of each text of an error: for a person, who reads no more, and is not to be buried."""

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
BUSY: Final = -32001
"""Too many requests wait on this line; ask again when one was answered."""

Id = str | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A question. id None: a notification, which nobody answers."""

    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    id: Id | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why something was not done. code: of the specification when negative, else an exit status of ours."""

    code: int
    message: str
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """An answer: a result, or a fault. id None: the question could not be read."""

    id: Id | None
    result: Any = None
    fault: Fault | None = None


Message = Request | Response


class BadMessageError(ValueError):
    """A line that is no message. id: of the request, when that much could be read."""

    def __init__(self, fault: Fault, id: Id | None = None) -> None:
        super().__init__(fault.message)
        self.fault = fault
        self.id = id


def no_such_method(method: str) -> BadMessageError:
    """What a handler raises for a method it does not have."""
    return BadMessageError(Fault(code=METHOD_NOT_FOUND, message=f"there is no method {method}"))


def bad_parameters(method: str, why: str) -> BadMessageError:
    """What a handler raises for parameters that are not what the method takes."""
    return BadMessageError(Fault(code=INVALID_PARAMS, message=f"{method}: {why}"))


class RemoteError(VirtgridError):
    """The other side refused or failed, and its reason is none of our own classes of error."""

    code = "VG-REMOTE"

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message[:_TOLD_LIMIT])
        self.fault = fault


def _families() -> dict[str, type[VirtgridError]]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return {kind.code: kind for kind in kinds if issubclass(kind, VirtgridError)}


_BY_CODE: Final = _families()


def fault_of(error: VirtgridError) -> Fault:
    """An error of ours as it goes over the wire; ``error_of`` makes it again at the other end."""
    if isinstance(error, RemoteError):
        return error.fault
    return Fault(code=error.exit_status, message=error.what, data=error.as_dict())


def error_of(fault: Fault) -> VirtgridError:
    """The error a fault stands for."""
    data = fault.data or {}
    kind = _BY_CODE.get(str(data.get("error")))
    if kind is None:
        return RemoteError(fault)
    told = {key: data[key] for key in ("where", "cause", "hint") if data.get(key) is not None}
    texts = {key: str(value)[:_TOLD_LIMIT] for key, value in told.items()}
    return kind(fault.message[:_TOLD_LIMIT], **texts)


def encode(message: Message) -> bytes:
    """One line with its end. Errors: ValueError when it would be longer than the limit."""
    body: dict[str, Any] = {"jsonrpc": "2.0"}
    if isinstance(message, Request):
        body["method"] = message.method
        body["params"] = dict(message.params)
        if message.id is not None:
            body["id"] = message.id
    else:
        if message.fault is None:
            body["result"] = message.result
        else:
            fault = message.fault
            body["error"] = {"code": fault.code, "message": fault.message}
            if fault.data is not None:
                body["error"]["data"] = dict(fault.data)
        body["id"] = message.id
    # ASCII only: a lone surrogate or a line separator in a text cannot break the line.
    line = json.dumps(body, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    if len(line) > LINE_LIMIT_BYTES:
        raise ValueError(f"a message of {len(line)} bytes is longer than a line may be")
    return line


def decode(line: bytes) -> Message:
    """One line, its end included or not, as a message. Errors: BadMessageError, and nothing else."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise _bad(PARSE_ERROR, "the line is not UTF-8") from None
    if _depth(text) > DEPTH_LIMIT:
        raise _bad(PARSE_ERROR, f"objects and lists lie more than {DEPTH_LIMIT} deep in each other")
    try:
        body = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
    except ValueError as error:
        raise _bad(PARSE_ERROR, f"the line is not JSON: {error}") from None
    if not isinstance(body, dict):
        what = "a batch" if isinstance(body, list) else "not an object"
        raise _bad(INVALID_REQUEST, f"the line is {what}; a line is one object")
    return _message(body)


def _message(body: Mapping[str, Any]) -> Message:
    given = body.get("id")
    known = given if _is_id(given) else None
    if body.get("jsonrpc") != "2.0":
        raise _bad(INVALID_REQUEST, 'the message does not say "jsonrpc": "2.0"', known)
    if "id" in body and known is None and not (given is None and "error" in body):
        raise _bad(INVALID_REQUEST, f"an id is an integer or a text of at most {_ID_LIMIT} characters")
    if "method" in body:
        method, params = body["method"], body.get("params", {})
        if not isinstance(method, str) or not _METHOD.fullmatch(method):
            raise _bad(INVALID_REQUEST, "a method is a short name", known)
        if not isinstance(params, dict):
            raise _bad(INVALID_REQUEST, "parameters are given by name, as an object", known)
        _only(body, {"jsonrpc", "id", "method", "params"}, known)
        return Request(method=method, params=params, id=known)
    if ("result" in body) == ("error" in body) or "id" not in body:
        raise _bad(INVALID_REQUEST, "the message is neither a request nor an answer", known)
    _only(body, {"jsonrpc", "id", "result", "error"}, known)
    if "result" in body:
        return Response(id=known, result=body["result"])
    return Response(id=known, fault=_fault(body["error"]))


def _fault(error: Any) -> Fault:
    if isinstance(error, dict):
        code, message, data = error.get("code"), error.get("message"), error.get("data")
        if isinstance(code, int) and isinstance(message, str) and isinstance(data, dict | None):
            return Fault(code=code, message=message, data=data)
    raise _bad(INVALID_REQUEST, "an error has a code, a message and perhaps data")


def _only(body: Mapping[str, Any], allowed: set[str], known: Id | None) -> None:
    if strange := sorted(body.keys() - allowed):
        raise _bad(INVALID_REQUEST, f"the message has an unknown member {strange[0][:40]!r}", known)


def _is_id(value: Any) -> bool:
    if isinstance(value, str):
        return 0 < len(value) <= _ID_LIMIT
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53


def _bad(code: int, message: str, id: Id | None = None) -> BadMessageError:
    return BadMessageError(Fault(code=code, message=message), id)


_STRINGS: Final = re.compile(r'"(?:[^"\\]|\\.)*"?')


def _depth(text: str) -> int:
    """How deep objects and lists lie in each other; brackets within texts do not count."""
    if text.count("[") + text.count("{") <= DEPTH_LIMIT:
        return 0  # cheap, and true of nearly every line
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", _STRINGS.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value
