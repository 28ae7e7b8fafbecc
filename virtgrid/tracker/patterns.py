"""The regular expressions a definition may use, and why they cannot hang the tracker.

A pattern is accepted only when it can be matched in time linear in the text, times a small
constant. That is decided here by reading the pattern, before ``re`` ever sees it:

* known words only: literals, ``.``, classes, ``\\d \\s \\w`` and their opposites, groups, ``|``,
  ``? * + {m,n}``, ``^ $ \\b``; no back-references, no look-around, no inline flags;
* only a single character or class may be repeated, a group may at most be optional:
  so repetitions never nest;
* an unbounded repetition must be followed by something it cannot match itself, or by the end:
  so there is one way to match it, and nothing to try again;
* what choices remain (alternatives, options, bounded repetitions) multiply to at most 256.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

CHOICES_MAX: Final = 256
LENGTH_MAX: Final = 500
_REPEAT_MAX: Final = 256
_DEPTH_MAX: Final = 10

Bytes = frozenset[int]
ALL: Final[Bytes] = frozenset(range(256))


def _of(pattern: bytes) -> Bytes:
    return frozenset(i for i in range(256) if re.match(pattern, bytes([i])))


_CLASSES: Final[dict[str, Bytes]] = {
    **{c: _of(b"\\" + c.encode()) for c in "dDsSwW"},
    **{c: frozenset({v}) for c, v in (("r", 13), ("n", 10), ("t", 9))},
}
_DOT: Final = ALL - {10}
_COUNT: Final = re.compile(r"\{(\d{1,4})(,)?(\d{1,4})?\}")
_GROUP: Final = re.compile(r"\?(?::|P<([a-z][a-z0-9_]{0,30})>)")


class PatternError(ValueError):
    """What is wrong with a pattern; ``hint`` says what to write instead."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


@dataclass(slots=True)
class _Node:
    """One piece: a set of bytes, or a group of alternatives; with how often it may come."""

    chars: Bytes = frozenset()
    branches: list[list[_Node]] = field(default_factory=list)
    low: int = 1
    high: int | None = 1
    anchor: bool = False


class _Reader:
    def __init__(self, text: str, ignore_case: bool) -> None:
        self.text = text
        self.ignore_case = ignore_case
        self.at = 0
        self.groups: list[str] = []

    def peek(self) -> str:
        return self.text[self.at] if self.at < len(self.text) else ""

    def take(self) -> str:
        char = self.peek()
        if not char:
            raise PatternError("the pattern ends in the middle")
        self.at += 1
        return char

    def branches(self, depth: int) -> list[list[_Node]]:
        if depth > _DEPTH_MAX:
            raise PatternError("groups are nested too deeply")
        out: list[list[_Node]] = [[]]
        while (char := self.peek()) and char != ")":
            if char == "|":
                self.at += 1
                out.append([])
            else:
                out[-1].append(self.repeated(self.piece(depth)))
        return out

    def piece(self, depth: int) -> _Node:
        char = self.take()
        if char in "^$":
            return _Node(anchor=True)
        if char == "(":
            if self.peek() == "?":
                match = _GROUP.match(self.text, self.at)
                if not match:
                    raise PatternError(
                        "'(?' must be '(?:' or '(?P<name>'",
                        "look-around, flags and conditions are not allowed",
                    )
                if match[1]:
                    if match[1] in self.groups:
                        raise PatternError(f"group '{match[1]}' is named twice")
                    self.groups.append(match[1])
                self.at = match.end()
            node = _Node(branches=self.branches(depth + 1))
            if self.peek() != ")":
                raise PatternError("a group is not closed")
            self.at += 1
            return node
        if char == "[":
            return _Node(chars=self.char_class())
        if char == ".":
            return _Node(chars=_DOT)
        if char == "\\":
            if self.peek() == "b":
                self.at += 1
                return _Node(anchor=True)
            return _Node(chars=self.escape())
        if char in "*+?{":
            raise PatternError(
                f"'{char}' repeats nothing", "write '\\' before it when the character itself is meant"
            )
        return _Node(chars=self.literal(char))

    def literal(self, char: str) -> Bytes:
        if not " " <= char <= "~":
            raise PatternError(
                "only printable ASCII may stand in a pattern", "write \\r, \\n, \\t or a class"
            )
        return frozenset(map(ord, {char, char.lower(), char.upper()} if self.ignore_case else {char}))

    def escape(self) -> Bytes:
        char = self.take()
        if char in _CLASSES:
            return _CLASSES[char]
        if char.isalnum():
            raise PatternError(
                f"'\\{char}' is not allowed", "known are \\d \\s \\w \\D \\S \\W \\r \\n \\t \\b"
            )
        return self.literal(char)

    def char_class(self) -> Bytes:
        negated = self.peek() == "^"
        self.at += negated
        chars: set[int] = set()
        begin = self.at
        while (char := self.take()) != "]" or self.at - 1 == begin:
            if char == "[":
                raise PatternError("'[' inside a class", "write '\\['")
            if char == "\\":
                chars |= self.escape()
                continue
            if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                last = self.take()
                if last == "\\" or last < char:
                    raise PatternError(f"'{char}-{last}' is no range")
                for code in range(ord(char), ord(last) + 1):
                    chars |= self.literal(chr(code))
            else:
                chars |= self.literal(char)
        return ALL - chars if negated else frozenset(chars)

    def repeated(self, node: _Node) -> _Node:
        char = self.peek()
        if char and char in "?*+":
            self.at += 1
            low, high = {"?": (0, 1), "*": (0, None), "+": (1, None)}[char]
        elif char == "{":
            match = _COUNT.match(self.text, self.at)
            if not match:
                raise PatternError("'{' must be '{m}', '{m,}' or '{m,n}'", "write '\\{' for the character")
            self.at = match.end()
            low = int(match[1])
            high = low if not match[2] else int(match[3]) if match[3] else None
            if low > _REPEAT_MAX or (high is not None and (high > _REPEAT_MAX or high < low)):
                raise PatternError(f"'{match[0]}': counts go from 0 to {_REPEAT_MAX}, smaller first")
        else:
            return node
        if self.peek() in ("*", "+", "?", "{"):
            raise PatternError(
                "a repetition of a repetition" if self.peek() != "?" else "lazy repetition is not allowed",
                "one quantifier for each piece",
            )
        if node.anchor or (node.branches and (low, high) != (0, 1)):
            raise PatternError(
                "only a single character or class may be repeated, a group may only be optional",
                "a repeated group could take exponential time",
            )
        node.low, node.high = low, high
        return node


def _first(nodes: list[_Node], after: Bytes) -> Bytes:
    """Which bytes may begin what these pieces match, ``after`` following them."""
    out = after
    for node in reversed(nodes):
        if node.anchor:
            continue
        start = frozenset().union(*(_first(b, out) for b in node.branches)) if node.branches else node.chars
        out = start | out if node.low == 0 else start
    return out


def _choices(nodes: list[_Node], after: Bytes) -> int:
    """In how many ways these pieces may have to be tried, at most."""
    product = 1
    for index, node in enumerate(nodes):
        rest = _first(nodes[index + 1 :], after)
        if node.branches:
            ways = sum(_choices(branch, rest) for branch in node.branches) + (node.low == 0)
        elif node.anchor or node.low == node.high or not node.chars & rest:
            ways = 1
        elif node.high is None:
            raise PatternError(
                "an unbounded repetition is followed by something it can match itself",
                "narrow its class, for instance [^ ]+ before a space",
            )
        else:
            ways = node.high - node.low + 1
        product *= ways
        if product > CHOICES_MAX:
            raise PatternError(f"more than {CHOICES_MAX} ways to match", "write several rules instead")
    return product


def first_bytes(text: str, *, ignore_case: bool = False) -> frozenset[int] | None:
    """The bytes with which a text must begin for the pattern to match it; None: any, or none at all."""
    nothing = frozenset({256})
    branches = _Reader(text, ignore_case).branches(0)
    first = frozenset().union(*(_first(b, nothing) for b in branches))
    return None if first & nothing else first


def compile_pattern(text: str, *, ignore_case: bool = False) -> re.Pattern[bytes]:
    """A checked pattern, compiled for bytes. Errors: PatternError."""
    if len(text) > LENGTH_MAX:
        raise PatternError(f"longer than {LENGTH_MAX} characters")
    reader = _Reader(text, ignore_case)
    tree = reader.branches(0)
    if reader.at != len(text):
        raise PatternError("')' closes nothing")
    # Nothing follows a pattern, so nothing is tried again after its last piece.
    if sum(_choices(branch, frozenset()) for branch in tree) > CHOICES_MAX:
        raise PatternError(f"more than {CHOICES_MAX} ways to match", "write several rules instead")
    try:
        return re.compile(text.encode("ascii"), re.IGNORECASE if ignore_case else 0)
    except re.error as error:
        raise PatternError(f"not a regular expression: {error}") from error
