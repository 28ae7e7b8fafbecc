"""What the first line and the fields of a message's head say, read without the machine.

A ``Plan`` can be made of definitions like HTTP's: heads up to an empty line, busy is unsuitable and
idle is suitable whatever the time, and all a rule does is push, pop and tell a body's length. It reads
two kinds of heads, those of nearly all messages of a web server: a request without a body, whole in the
bytes at hand, and an answer whose body is counted, chunked or not there. Whatever else a head may say is
not for it: then it says None, and the machine knows.

Heads come again: of a client's requests all but the first line, of a server's answers the whole for as
long as its ``Date`` lasts. So what has been read is remembered. Bounded: whoever never says the same
thing twice makes that forgotten, and costs what reading costs, and a little more.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from virtgrid.tracker.rules import EMPTY, GREETING, Body, Choice, Definition, Kind, Rule
from virtgrid.tracker.streams import UNKNOWN

_LINE_ENDS: Final = b"\r\n"
_RETURN: Final = _LINE_ENDS[0]
_LINES_MAX: Final = 1024
_LINE_BYTES_MAX: Final = 64
_WORDS_MAX: Final = 256
_RESTS_MAX: Final = 256
_HEADS_MAX: Final = 4096
#: Longer ones are read each time.
_HEAD_BYTES_MAX: Final = 1024

#: Instead of a body's length; and one that is never small.
CHUNKED: Final = -2
_NOT_HERE: Final = 1 << 62

#: Where a field is told: what its line begins with; how it reads where this file knows what it says. A
#: length is its group, without one the body is chunked.
Mark = tuple[bytes, re.Pattern[bytes]]
#: An answer's head as it was read: the word of the request, the head's own bytes, the body's (CHUNKED;
#: UNKNOWN: there is none), whether it counts.
Told = tuple[str, int, int, bool]


class Ask:
    """What a request's first line says. group: of the pattern, its word; 0: ``word`` itself.

    marks: what a line begins with that tells more, of a body for instance. rests: what has been found
    behind first lines and tells nothing. words: by what the group was.
    """

    __slots__ = ("_marks", "group", "pattern", "rests", "word", "words")

    def __init__(self, pattern: re.Pattern[bytes], group: int, word: str, marks: tuple[bytes, ...]) -> None:
        self.pattern = pattern
        self.group = group
        self.word = word
        self._marks = marks
        self.rests: set[bytes] = set()
        self.words: dict[bytes, str] = {}

    def alone(self, rest: bytes) -> bool:
        """Whether behind its first line a head goes on to the end of ``rest``, and tells nothing more."""
        if not rest.endswith(b"\n\r\n") or rest.find(b"\n\r\n") != len(rest) - 3 or b"\n\n" in rest:
            return False
        low = rest.lower()
        for mark in self._marks:
            if mark in low:
                return False
        if len(rest) <= _HEAD_BYTES_MAX:
            if len(self.rests) >= _RESTS_MAX:
                self.rests.clear()
            self.rests.add(rest)
        return True

    def worded(self, word: bytes) -> str:
        """The group's bytes as the machine's word."""
        found = word.decode("ascii", "replace")
        if len(word) <= _LINE_BYTES_MAX:
            if len(self.words) >= _WORDS_MAX:
                self.words.clear()
            self.words[word] = found
        return found


class Answer(NamedTuple):
    """What a response's first line says. ends: where none of the marks is found, there is no body."""

    counts: bool
    marks: tuple[Mark, ...]
    ends: bool


class Plan:
    """A definition, as far as the short way knows it.

    asks: by a line's first byte. answers: what is known of lines (and the words they answer) that have come;
    heads: of whole heads.
    """

    __slots__ = ("answers", "asks", "definition", "head_max", "heads")

    def __init__(self, definition: Definition) -> None:
        self.definition = definition
        self.head_max = definition.head_max
        self.asks = tuple(
            None if first in _LINE_ENDS else _ask(definition, rules)
            for first, rules in enumerate(definition.client_table[:EMPTY])
        )
        self.answers: dict[tuple[bytes, str], Answer | None] = {}
        self.heads: dict[bytes, Told] = {}

    def asked(self, data: bytes) -> str | None:
        """The word of a request without a body that ``data`` is the whole of; None: the machine knows."""
        end = data.find(b"\n")
        if end < 0 or len(data) > self.head_max or (ask := self.asks[data[0]]) is None:
            return None
        rest = data[end:]
        if rest not in ask.rests and not ask.alone(rest):
            return None
        while data[end - 1] == _RETURN:
            end -= 1
        match = ask.pattern.match(data, 0, end)
        if match is None:
            return None
        if not ask.group:
            return ask.word
        group = match[ask.group] or b""
        word = ask.words.get(group) or ask.worded(group)
        return None if word == GREETING else word

    def told(self, data: bytes, word: str) -> Told | None:
        """What the answer to such a request says whose head ``data`` begins with; None: the machine knows."""
        head = data[: data.find(b"\n\r\n") + 3]
        found = self.heads.get(head)
        return found if found is not None and found[0] == word else self._told(head, word)

    def _told(self, head: bytes, word: str) -> Told | None:
        if (
            not head.endswith(b"\n\r\n") or head[0] in _LINE_ENDS or len(head) > self.head_max
            or word == GREETING or b"\n\n" in head
        ):  # fmt: skip
            return None
        key = head[: head.find(b"\n")], word
        answer = self.answers[key] if key in self.answers else self._answer(*key)
        if answer is None:
            return None
        body = _body(answer, head.lower())
        if body == _NOT_HERE:
            return None
        found = word, len(head), body, answer.counts
        if len(head) <= _HEAD_BYTES_MAX and len(word) <= _LINE_BYTES_MAX:
            if len(self.heads) >= _HEADS_MAX:
                self.heads.clear()
            self.heads[head] = found
        return found

    def _answer(self, line: bytes, word: str) -> Answer | None:
        """What a line answers to a request of that word; None: the machine knows."""
        found = None
        whole, line = line, line.rstrip(b"\r")
        for rule in self.definition.server_table[line[0]]:
            if rule.tail or rule.tag:
                break
            if rule.pattern.match(line) and (not rule.guard or word in rule.guard):
                found = _answer(self.definition, rule)
                break
        if len(whole) <= _LINE_BYTES_MAX and len(word) <= _LINE_BYTES_MAX:
            if len(self.answers) >= _LINES_MAX:
                self.answers.clear()
            self.answers[whole, word] = found
        return found


def plan_of(definition: Definition) -> Plan | None:
    """The short way of a definition; None where it has none."""
    busy, idle = definition.pauses["busy"], definition.pauses["idle"]
    rules = (*definition.client, *definition.server)
    if (
        definition.lines or definition.greeting or definition.client_more or definition.server_more
        or busy.kind is not Kind.HOLD or busy.for_s is not None or idle.kind is not Kind.OK
        or any(rule.expect or rule.more or rule.upto for rule in rules)
    ):  # fmt: skip
        return None
    return Plan(definition)


def _simple(rule: Rule) -> bool:
    return not (
        rule.tail or rule.tag or rule.note or rule.go or rule.opaque or rule.ask or rule.waiting
        or rule.transfer or rule.size or rule.volume is not None or rule.add
    )  # fmt: skip


def _ask(definition: Definition, rules: tuple[Rule, ...]) -> Ask | None:
    if len(rules) != 1:
        return None
    rule = rules[0]
    if not _simple(rule) or rule.guard or not rule.push or rule.pop or rule.counts:
        return None
    names = {rule.awaits[0]} if rule.awaits else set()
    for choice in rule.bodies:
        if choice.kind is Body.NONE:
            break
        if not _by_field(choice):
            return None
        names.add(choice.name)
    if rule.awaits and not rule.awaits[1]:
        return None
    marks = tuple(sorted(b"\n" + definition.fields[name] for name in names))
    group = rule.pattern.groupindex[rule.push] if rule.push_group else 0
    return Ask(rule.pattern, group, rule.push, marks)


def _answer(definition: Definition, rule: Rule) -> Answer | None:
    if not _simple(rule) or not rule.pop or rule.push or rule.awaits:
        return None
    marks: list[Mark] = []
    for choice in rule.bodies:
        if choice.kind is Body.NONE:
            break
        if not _by_field(choice):
            return Answer(rule.counts, tuple(marks), False)
        name = definition.fields[choice.name]
        value = rb"([0-9]{1,18})" if choice.kind is Body.BYTES else rb"chunked"
        marks.append((b"\n" + name, re.compile(rb"\n%b:[ \t]*%b[ \t]*\r?\n" % (re.escape(name), value))))
    return Answer(rule.counts, tuple(marks), True)


def _by_field(choice: Choice) -> bool:
    return choice.kind in (Body.BYTES, Body.CHUNKED) and bool(choice.name) and not choice.group


def _body(answer: Answer, low: bytes) -> int:
    """How long an answer's body is, from its head in lower case. UNKNOWN: there is none."""
    for mark, reads in answer.marks:
        at = low.find(mark)
        if at >= 0:
            match = reads.match(low, at)
            if match is None:
                return _NOT_HERE
            return int(match[1]) if match.lastindex else CHUNKED
    return UNKNOWN if answer.ends else _NOT_HERE
