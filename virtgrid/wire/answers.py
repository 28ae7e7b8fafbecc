"""Idempotency keys: a question asked again gets the first answer again, and nothing is done twice. Pure.

Who asks makes up a key per question and uses it again only for the same question, for instance when the
line dropped before the answer came. Answers are kept for the last ``LIMIT`` keys, refusals too.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from virtgrid.core.errors import RefusedError

LIMIT: Final = 256


def fingerprint(method: str, params: Mapping[str, Any]) -> str:
    """What makes two questions the same one."""
    text = json.dumps([method, params], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer that was given: what JSON knows, or a fault's members."""

    fingerprint: str
    result: Any = None
    fault: Mapping[str, Any] | None = None


@dataclass(slots=True)
class Answers:
    """The answers given, by key, the oldest forgotten first."""

    limit: int = LIMIT
    _kept: OrderedDict[str, Answer] = field(default_factory=OrderedDict)

    def find(self, key: str, print_: str) -> Answer | None:
        """The answer this question got. Errors: RefusedError when the key was used for another question."""
        known = self._kept.get(key)
        if known is not None and known.fingerprint != print_:
            raise RefusedError(
                "this idempotency key was used for another question", hint="make a new key for each question"
            )
        return known

    def keep(self, key: str, answer: Answer) -> None:
        self._kept[key] = answer
        while len(self._kept) > self.limit:
            self._kept.popitem(last=False)

    def items(self) -> list[tuple[str, Answer]]:
        """All of them, the oldest first: for writing down."""
        return list(self._kept.items())
