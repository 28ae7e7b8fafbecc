"""The definition language: text in, frozen rules out.

A definition holds no code. It is read line by line; docs/reference/protocol-definitions.md is the
language's reference. Errors name the file, the line, what is wrong there and what to write instead
(RefusedError: nothing has been touched yet).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.core.units import parse_duration, parse_size
from virtgrid.tracker.patterns import PatternError, compile_pattern, first_bytes
from virtgrid.tracker.rules import (
    GREETING,
    STATES,
    WAITING,
    Body,
    Choice,
    Definition,
    Kind,
    Pause,
    Rule,
    table,
)

FILE_BYTES_MAX: Final = 64 << 10
LINES_MAX: Final = 400
HEAD_BYTES_MAX: Final = 64 << 10
_SILENCE_MAX_S: Final = 3600.0
_LARGE_MAX: Final = 1 << 50
_TERMINATOR_MAX: Final = 16

_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,30}")
_WORD: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,30}")
_NUMBER: Final = re.compile(r"[0-9]{1,15}")
_SLASHES: Final = r"/((?:[^/\\]|\\.)*)/"
_RULE: Final = re.compile(_SLASHES + r"\s*(?:\.\.\s*" + _SLASHES + r"\s*)?(?:if\s+([^>]*?)\s*)?->\s*(.*)")
_PATTERN: Final = re.compile(_SLASHES)
_SIDES: Final = ("client", "server")
_ESCAPES: Final = {"r": "\r", "n": "\n", "t": "\t", "\\": "\\"}
_ACTIONS: Final = (
    "client: push WORD [GROUP], await FIELD VALUE, ask ..., waiting, transfer; "
    "server: pop [GROUP], drop [GROUP], reply, go, upto GROUP; "
    "both: note, body ..., more, size, volume, add, expect ..., become opaque, become tls"
)


class LineError(ValueError):
    """What is wrong in a line; ``hint`` says what to write instead."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


@dataclass(slots=True)
class _Draft:
    """What has been read so far."""

    name: str = ""
    ports: list[int] = field(default_factory=list)
    head_max: int = 0
    lines: bool = False
    greeting: bool = False
    large_bytes: int | None = None
    ignore_case: bool = False
    fields: dict[str, bytes] = field(default_factory=dict)
    pauses: dict[str, Pause] = field(default_factory=dict)
    detect: dict[str, list[re.Pattern[bytes]]] = field(default_factory=lambda: {s: [] for s in _SIDES})
    resume: dict[str, list[re.Pattern[bytes]]] = field(default_factory=lambda: {s: [] for s in _SIDES})
    rules: dict[str, list[Rule]] = field(default_factory=lambda: {s: [] for s in _SIDES})
    more: dict[str, list[Rule]] = field(default_factory=lambda: {s: [] for s in _SIDES})

    def any_pattern(self) -> bool:
        groups: Iterable[dict[str, list[Rule]] | dict[str, list[re.Pattern[bytes]]]]
        groups = (self.detect, self.resume, self.rules, self.more)
        return any(any(g.values()) for g in groups)


def parse(text: str, path: str) -> Definition:
    """The definition in ``text``; ``path`` is for messages. Errors: RefusedError."""
    if len(text) > FILE_BYTES_MAX:
        raise RefusedError(
            f"{path}: larger than {FILE_BYTES_MAX >> 10} KiB", hint="a definition has some 30 lines"
        )
    lines = text.splitlines()
    if len(lines) > LINES_MAX:
        raise RefusedError(f"{path}: more than {LINES_MAX} lines", hint="a definition has some 30 lines")
    draft = _Draft()
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            _line(draft, line, number)
        except (LineError, PatternError) as error:
            raise RefusedError(
                f"{path}:{number}: {error}", cause=line[:200], hint=error.hint or None
            ) from error
    try:
        return _finish(draft, path, hashlib.sha256(text.encode()).hexdigest()[:16])
    except LineError as error:
        raise RefusedError(f"{path}:{len(lines)}: {error}", hint=error.hint or None) from error


def _line(draft: _Draft, line: str, number: int) -> None:
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word != "protocol" and not draft.name:
        raise LineError("the first line must be 'protocol NAME'")
    match word:
        case "protocol":
            if draft.name:
                raise LineError("'protocol' comes twice", "one protocol in one file")
            if not _NAME.fullmatch(rest):
                raise LineError("'protocol' needs a name of a-z, 0-9 and '-'")
            draft.name = rest
        case "port":
            for item in rest.split() or [""]:
                if not item.isascii() or not item.isdigit() or not 0 < int(item[:6]) < 65536:
                    raise LineError(
                        f"'{item}' is not a TCP port", "numbers from 1 to 65535, separated by spaces"
                    )
                draft.ports.append(int(item))
        case "unit":
            _unit(draft, rest.split())
        case "case":
            if rest not in ("keep", "ignore"):
                raise LineError("'case' is 'keep' or 'ignore'")
            if draft.any_pattern():
                raise LineError("'case' must stand before the first pattern")
            draft.ignore_case = rest == "ignore"
        case "greeting":
            if rest:
                raise LineError("'greeting' stands alone", "it says that the server speaks first")
            draft.greeting = True
        case "large":
            if draft.large_bytes is not None:
                raise LineError("'large' comes twice")
            draft.large_bytes = _size(rest, 1, _LARGE_MAX, "'large' must be at least a byte")
        case "field":
            parts = rest.split()
            if len(parts) != 2 or not all(_WORD.fullmatch(p) for p in parts):
                raise LineError(
                    "'field' needs a name and a header", "for instance: field length content-length"
                )
            if parts[0] in draft.fields:
                raise LineError(f"field '{parts[0]}' is defined twice")
            draft.fields[parts[0]] = parts[1].lower().encode()
        case "pause":
            _pause(draft, rest.split())
        case "detect" | "resume":
            side, _, pattern = rest.partition(" ")
            match = _PATTERN.fullmatch(pattern.strip())
            if side not in _SIDES or not match:
                raise LineError(
                    f"'{word}' needs a side and a pattern", f"for instance: {word} client /^GET /"
                )
            patterns = draft.detect if word == "detect" else draft.resume
            patterns[side].append(compile_pattern(match[1], ignore_case=draft.ignore_case))
        case "client" | "server":
            more, _, behind = rest.partition(" ")
            if more == "more":
                draft.more[word].append(_Line(draft, word, number, more=True).rule(behind.strip()))
            else:
                draft.rules[word].append(_Line(draft, word, number, more=False).rule(rest))
        case _:
            raise LineError(
                f"unknown word '{word[:40]}'",
                "known are protocol port unit case greeting large field pause detect resume client server",
            )


def _size(text: str, low: int, high: int, what: str) -> int:
    try:
        size = parse_size(text)
    except UsageError as error:
        raise LineError(error.what, error.hint or "") from error
    if not low <= size <= high:
        raise LineError(what)
    return size


def _unit(draft: _Draft, words: list[str]) -> None:
    if words[:1] not in (["head"], ["line"]) or len(words) not in (1, 3) or words[1:2] not in ([], ["max"]):
        raise LineError("'unit' must be 'head' or 'line', or 'head max SIZE' or 'line max SIZE'")
    if draft.head_max:
        raise LineError("'unit' comes twice")
    limit = "a head's limit must lie between 64 and 65536 bytes"
    draft.head_max = _size(words[2], 64, HEAD_BYTES_MAX, limit) if len(words) == 3 else HEAD_BYTES_MAX
    draft.lines = words[0] == "line"


def _duration(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except UsageError as error:
        raise LineError(error.what, error.hint or "") from error
    if not 0 < seconds <= _SILENCE_MAX_S:
        raise LineError(f"'{text}': must be more than 0 and at most an hour")
    return seconds


def _pause(draft: _Draft, words: list[str]) -> None:
    hint = "for instance: pause idle ok; pause new hold 5s; pause opaque quiet 2s"
    states = (*STATES, WAITING)
    if len(words) < 2 or words[0] not in states:
        raise LineError(f"'pause' needs one of the states {' '.join(states)} and a verdict", hint)
    if words[0] in draft.pauses:
        raise LineError(f"the verdict of '{words[0]}' is given twice")
    match words[1:]:
        case ["ok"]:
            pause = Pause(Kind.OK)
        case ["hold"]:
            pause = Pause(Kind.HOLD)
        case ["hold", span]:
            pause = Pause(Kind.HOLD, _duration(span))
        case ["quiet", span]:
            pause = Pause(Kind.QUIET, _duration(span))
        case ["quiet", span, asked]:
            pause = Pause(Kind.QUIET, _duration(span), _duration(asked))
        case _:
            raise LineError("a verdict is 'ok', 'hold', 'hold TIME' or 'quiet TIME [TIME]'", hint)
    if pause.kind is Kind.HOLD and pause.for_s is not None and words[0] != "new":
        raise LineError("only 'new' can be 'hold TIME'", "elsewhere 'hold', or 'quiet TIME' for silence")
    if pause.kind is Kind.QUIET and words[0] == "moving":
        raise LineError("'moving' cannot be 'quiet'", "a transfer under way is not silent: 'ok' or 'hold'")
    if pause.asked_s is not None and words[0] != "opaque":
        raise LineError("only 'opaque' can have two times", "elsewhere it is known who waits for whom")
    # A definition must not be able to call a waiting client suitable.
    if words[0] == "busy" and pause != Pause(Kind.HOLD):
        raise LineError("'busy' can only be 'hold'", "a request is outstanding in that state")
    draft.pauses[words[0]] = pause


class _Line:
    """One rule being read."""

    def __init__(self, draft: _Draft, side: str, number: int, *, more: bool) -> None:
        self.draft = draft
        self.side = side
        self.is_more = more
        self.set: dict[str, object] = {"line": number}
        self.groups: set[str] = set()

    def rule(self, rest: str) -> Rule:
        match = _RULE.fullmatch(rest)
        if not match:
            raise LineError(
                "a rule is: SIDE [more] /PATTERN/ [.. /PATTERN/] [if WORD ...] -> ACTION ; ACTION",
                "a '/' in a pattern is '\\/'",
            )
        ignore_case = self.draft.ignore_case
        pattern = compile_pattern(match[1], ignore_case=ignore_case)
        self.set |= {"pattern": pattern, "source": rest}
        self.groups |= pattern.groupindex.keys()
        if (first := first_bytes(match[1], ignore_case=ignore_case)) is not None:
            self.set["first"] = first
        if match[2] is not None:
            tail = compile_pattern(match[2], ignore_case=ignore_case)
            if twice := self.groups & tail.groupindex.keys():
                raise LineError(f"group '{min(twice)}' is named twice")
            self.set["tail"] = tail
            self.groups |= tail.groupindex.keys()
        if match[3] is not None:
            guard = frozenset(match[3].split())
            words = guard and all(_WORD.fullmatch(w) for w in guard)
            if self.side == "client" or self.is_more or not words:
                raise LineError(
                    "'if' needs words that a client's rule pushes", "only a server's rule can have it"
                )
            self.set["guard"] = guard
        for action in match[4].split(";"):
            self.action(action.split())
        return self.checked()

    def checked(self) -> Rule:
        keys = self.set.keys()
        says = {"push", "pop", "counts", "note", "opaque", "go"}
        if self.is_more:
            if wrong := keys & (says - {"note"}):
                raise LineError(f"a 'more' rule cannot {min(wrong)}", "its message has begun already")
        elif not says & keys:
            raise LineError("a rule needs 'push', 'pop', 'drop', 'reply', 'go', 'note' or 'become opaque'")
        if "note" in keys and {"push", "pop", "counts"} & keys:
            raise LineError("'note' cannot stand with 'push', 'pop' or 'reply'")
        if "ask" in keys and not self.is_more and "push" not in keys:
            raise LineError("'ask' needs 'push'", "leave is given to an exchange")
        for name in ("waiting", "transfer"):
            if name in keys and "push" not in keys:
                raise LineError(f"'{name}' needs 'push'", "it says something of an exchange")
        if "waiting" in keys and "ask" not in keys:
            raise LineError(
                "'waiting' needs 'ask'", "the server's leave begins it, the client's answer ends it"
            )
        if "ask" in keys and "bodies" in keys:
            raise LineError("'ask' cannot stand with 'body'", "the body comes at once or on leave, not both")
        if (not self.draft.lines and {"more", "upto", "ask", "tail"} & keys) or (
            self.is_more and not self.draft.lines
        ):
            raise LineError("'more', 'upto', 'ask' and '..' are for line protocols", "unit line, further up")
        return Rule(**self.set)  # type: ignore[arg-type]

    def once(self, word: str, name: str, value: object) -> None:
        if name in self.set:
            raise LineError(f"the action '{word}' comes twice")
        self.set[name] = value

    def group(self, name: str) -> str:
        if name not in self.groups:
            raise LineError(f"no group '{name[:40]}' in the pattern", f"(?P<{name[:30]}>...)")
        return name

    def action(self, words: list[str]) -> None:
        client, server = self.side == "client", self.side == "server"
        word = words[0] if words else ""
        match words:
            case ["push", name] | ["push", name, _] if client and _WORD.fullmatch(name):
                if name == GREETING:
                    raise LineError(f"'{GREETING}' is the server's greeting", "choose another word")
                self.once(word, "push", name)
                self.set["push_group"] = name in self.groups
                if len(words) == 3:
                    self.set["tag"] = self.group(words[2])
            case ["pop" | "drop"] | ["pop" | "drop", _] if server:
                self.once(word, "pop", True)
                self.set["counts"] = word == "pop"
                if len(words) == 2:
                    self.set["tag"] = self.group(words[1])
            case ["reply"] if server:
                self.once(word, "counts", True)
            case ["go" | "note" | "more"] if word != "go" or server:
                self.once(word, word, True)
            case ["waiting" | "transfer"] if client:
                self.once(word, word, True)
            case ["become", "opaque" | "tls"]:
                self.once(word, "opaque", words[1])
            case ["await", name, value] if client:
                self.once(word, "awaits", (self.field(name), value.lower().encode()))
            case ["upto", name] if server:
                self.once(word, "upto", self.group(name))
            case ["size" | "add", name]:
                self.once(word, word, self.group(name))
            case ["volume", name]:
                self.once(word, "volume", int(name) if _NUMBER.fullmatch(name) else self.group(name))
            case ["expect", "active" | "passive", _, *more] if len(more) < 2:
                ports = tuple(self.group(name) for name in words[2:])
                self.once(word, "expect", (words[1] == "active", ports))
            case ["ask", *rest] if client:
                self.once(word, "ask", self.choice(" ".join(rest), asked=True))
            case ["body", *rest]:
                self.once(word, "bodies", self.bodies(" ".join(rest)))
            case _:
                raise LineError(f"'{' '.join(words)[:60]}' is no action of a {self.side}'s rule", _ACTIONS)

    def field(self, name: str) -> str:
        if name not in self.draft.fields:
            raise LineError(f"no field '{name[:40]}'", "define it before: field NAME HEADER")
        return name

    def bodies(self, text: str) -> tuple[Choice, ...]:
        out: list[Choice] = []
        for part in text.split("|"):
            if out and out[-1].kind in (Body.NONE, Body.CLOSE, Body.UNTIL):
                raise LineError("nothing can follow 'none', 'until' or 'close' in a body's choices")
            out.append(self.choice(part, asked=False))
        return tuple(out)

    def choice(self, text: str, *, asked: bool) -> Choice:
        match text.split():
            case ["bytes", name] if name in self.groups:
                return Choice(Body.BYTES, name, group=True)
            case ["bytes", name] if not asked:
                return Choice(Body.BYTES, self.field(name))
            case ["chunked", name] if not asked:
                return Choice(Body.CHUNKED, self.field(name))
            case ["until", end]:
                return Choice(Body.UNTIL, end=_terminator(end))
            case ["none"] if not asked:
                return Choice(Body.NONE)
            case ["close"] if self.side == "server":
                return Choice(Body.CLOSE)
            case ["line"] if asked:
                return Choice(Body.LINE)
            case ["lines"] if asked:
                return Choice(Body.LINES)
        if asked:
            raise LineError(
                f"'{text.strip()[:60]}' cannot be asked for", "bytes GROUP, until TEXT, line, lines"
            )
        raise LineError(
            f"'{text.strip()[:60]}' is no body",
            "bytes FIELD or GROUP, chunked FIELD, until TEXT, none, and for a server close; separated by '|'",
        )


def _terminator(text: str) -> bytes:
    out, rest = "", iter(text)
    for char in rest:
        if char == "\\":
            char = _ESCAPES.get(next(rest, ""), "")
        if not char or (not " " <= char <= "~" and char not in "\r\n\t"):
            raise LineError("what ends a body is printable ASCII, with \\r, \\n, \\t and \\\\")
        out += char
    if not 0 < len(out) <= _TERMINATOR_MAX:
        raise LineError(
            f"what ends a body has 1 to {_TERMINATOR_MAX} bytes", "for instance: until \\r\\n.\\r\\n"
        )
    return out.encode("ascii")


def _finish(draft: _Draft, path: str, digest: str) -> Definition:
    if not draft.name:
        raise LineError("the file is empty", "the first line must be 'protocol NAME'")
    if not draft.head_max:
        raise LineError("'unit' is missing", "unit head max 64KiB")
    for side in _SIDES:
        if not draft.rules[side]:
            raise LineError(f"there is no rule for the {side}")
    if not draft.detect["client"]:
        raise LineError("'detect client' is missing", "without it no connection could be recognised")
    if draft.greeting and not draft.detect["server"]:
        raise LineError("'greeting' needs 'detect server'", "the greeting is what it is recognised by")
    if missing := [s for s in STATES if s not in draft.pauses]:
        raise LineError(f"no verdict for {', '.join(missing)}", f"pause {missing[0]} hold")
    waiting = [r.line for r in draft.rules["client"] if r.waiting]
    if waiting and WAITING not in draft.pauses:
        raise LineError(f"line {waiting[0]}: no verdict for {WAITING}", f"pause {WAITING} ok")
    words = {r.push for r in draft.rules["client"] if r.push and not r.push_group}
    if draft.greeting:
        words.add(GREETING)
    grouped = any(r.push_group for r in draft.rules["client"])
    for rule in draft.rules["server"]:
        if not grouped and (unknown := rule.guard - words):
            raise LineError(f"line {rule.line}: no client's rule pushes '{min(unknown)}'")
    if draft.greeting and not any(
        r.pop and (not r.guard or GREETING in r.guard) for r in draft.rules["server"]
    ):
        raise LineError("nothing answers the greeting", f"server /.../ if {GREETING} -> pop")
    for side in _SIDES:
        for rule in (*draft.rules[side], *draft.more[side]):
            if rule.more and not draft.more[side]:
                raise LineError(f"line {rule.line}: 'more', and no 'more' rule for the {side}")
    headers = None
    if draft.fields:
        names = b"|".join(re.escape(h) for h in sorted(set(draft.fields.values())))
        headers = re.compile(rb"\n(" + names + rb")[ \t]*:[ \t]*([^\r\n]{0,1000})", re.IGNORECASE)
    rules, more = draft.rules, draft.more
    return Definition(
        name=draft.name,
        path=path,
        digest=digest,
        ports=tuple(draft.ports),
        head_max=draft.head_max,
        pauses=draft.pauses,
        detect_client=tuple(draft.detect["client"]),
        detect_server=tuple(draft.detect["server"]),
        resume_client=(*draft.detect["client"], *draft.resume["client"]),
        resume_server=(*draft.detect["server"], *draft.resume["server"]),
        client=tuple(rules["client"]),
        server=tuple(rules["server"]),
        client_more=tuple(more["client"]),
        server_more=tuple(more["server"]),
        lines=draft.lines,
        greeting=draft.greeting,
        large_bytes=draft.large_bytes,
        fields=draft.fields,
        headers=headers,
        marks=tuple(b"\n" + h for h in sorted(set(draft.fields.values()))),
        client_table=table(rules["client"]),
        server_table=table(rules["server"]),
        client_more_table=table(more["client"]),
        server_more_table=table(more["server"]),
    )
