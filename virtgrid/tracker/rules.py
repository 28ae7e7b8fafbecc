"""What a protocol definition says, read: frozen rules, and tables that find them by a line's first byte.

language.py makes these from text; machine.py runs them. Nothing here knows the text's syntax.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

#: The states a connection can be in; a definition gives each its verdict. See machine.py.
STATES: Final = ("new", "idle", "busy", "moving", "opaque")
#: Only where a rule says ``waiting``: the server has given leave and the client may take its time.
WAITING: Final = "waiting"
#: The word of the exchange that a server's greeting answers.
GREETING: Final = "greeting"
#: Stands for "the line is empty" where a byte is expected.
EMPTY: Final = 256


class Kind(Enum):
    """How a state is judged."""

    OK = "ok"
    HOLD = "hold"
    QUIET = "quiet"


class Body(Enum):
    """How the end of a message's body is known."""

    NONE = "none"
    BYTES = "bytes"
    CHUNKED = "chunked"
    UNTIL = "until"
    CLOSE = "close"
    LINE = "line"
    LINES = "lines"


@dataclass(frozen=True, slots=True)
class Pause:
    """A state's verdict: OK; HOLD (for ``for_s``, then ok; None: always); QUIET: ok after that silence.

    asked_s: the silence that is needed when the client spoke last (None: the same).
    """

    kind: Kind
    for_s: float | None = None
    asked_s: float | None = None


class Choice(NamedTuple):
    """One way a body may end. name: a group of the rule's pattern, or a field; end: what UNTIL looks for."""

    kind: Body
    name: str = ""
    group: bool = False
    end: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule: a message whose first line matches, and what follows from it.

    source: as it was written, behind the side.
    first: bytes a matching line may begin with. tail: must be found near the line's end as well.
    guard: only when the exchange being answered was pushed as one of these words. push: a word, or
    the name of a group of the pattern. tag: the group that tells which exchange is meant. counts: a
    reply. bodies: tried in order. ask: what the client sends once it is given leave (``go``).
    more: the message goes on behind its body; upto: it goes on to the line that begins with this group.
    size, volume, add: groups (volume: or a number) that announce how much will be transferred.
    """

    pattern: re.Pattern[bytes]
    line: int
    source: str = ""
    first: frozenset[int] = frozenset(range(EMPTY + 1))
    tail: re.Pattern[bytes] | None = None
    guard: frozenset[str] = frozenset()
    push: str | None = None
    push_group: bool = False
    tag: str | None = None
    pop: bool = False
    counts: bool = False
    note: bool = False
    go: bool = False
    opaque: str = ""
    bodies: tuple[Choice, ...] = ()
    ask: Choice | None = None
    waiting: bool = False
    more: bool = False
    upto: str | None = None
    transfer: bool = False
    size: str | None = None
    volume: str | int | None = None
    add: str | None = None
    expect: tuple[bool, tuple[str, ...]] | None = None
    awaits: tuple[str, bytes] | None = None


#: For each byte a line may begin with, and for the empty line, the rules that may match it.
Table = tuple[tuple[Rule, ...], ...]


def table(rules: Sequence[Rule]) -> Table:
    """The rules by a line's first byte, in their order: what cannot match is never tried."""
    known: dict[tuple[Rule, ...], tuple[Rule, ...]] = {}
    out = []
    for code in range(EMPTY + 1):
        some = tuple(r for r in rules if code in r.first)
        out.append(known.setdefault(some, some))
    return tuple(out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A protocol. fields: name of a field -> the header it is read from (lower case).

    lines: a message's head is one line, not lines up to an empty one. greeting: the server speaks
    first. resume: what tells the next message behind a gap, once the protocol is known. headers: matches
    a line that is one of the fields; marks: what such lines begin with, in lower case. large_bytes: a
    transfer of so many bytes is large, whatever the tracker's own limit. digest: of the text, by which
    two sides know that they read alike.
    """

    name: str
    path: str
    ports: tuple[int, ...]
    head_max: int
    pauses: dict[str, Pause]
    detect_client: tuple[re.Pattern[bytes], ...]
    detect_server: tuple[re.Pattern[bytes], ...]
    client: tuple[Rule, ...]
    server: tuple[Rule, ...]
    resume_client: tuple[re.Pattern[bytes], ...] = ()
    resume_server: tuple[re.Pattern[bytes], ...] = ()
    client_more: tuple[Rule, ...] = ()
    server_more: tuple[Rule, ...] = ()
    digest: str = ""
    lines: bool = False
    greeting: bool = False
    large_bytes: int | None = None
    fields: dict[str, bytes] = field(default_factory=dict)
    headers: re.Pattern[bytes] | None = None
    marks: tuple[bytes, ...] = ()
    client_table: Table = ()
    server_table: Table = ()
    client_more_table: Table = ()
    server_more_table: Table = ()
