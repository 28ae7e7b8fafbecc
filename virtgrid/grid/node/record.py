"""What a NodeManager must not forget when it is killed: one file, replaced as a whole.

It is written before anything is done about it (``states``). No private key is ever in it; the session is what
proves to the CRM that this is still the same pilot, so the file is for its owner's eyes only.
"""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from virtgrid.core.errors import RefusedError
from virtgrid.core.files import replace_file
from virtgrid.grid.messages.common import Key, Model, first_fault
from virtgrid.grid.messages.node import Init, Keys, State
from virtgrid.wire.answers import Answer, Answers
from virtgrid.wire.outbox import Note


class KeptNote(Model):
    """A notification nobody has acknowledged yet."""

    number: int
    kind: str
    body: dict[str, Any]


class KeptAnswer(Model):
    """An answer, by its idempotency key."""

    key: str
    fingerprint: str
    result: Any = None
    fault: dict[str, Any] | None = None


class Record(Model):
    """ticket_id: whose record this is. reserved: notifications' numbers up to here may have been used.

    execs: programs that were running. next_exec: the number of the next one.
    """

    v: Literal[1] = 1
    ticket_id: str
    session: Key
    incarnation: int = 1
    state: State = State.INITIAL
    reason: str = "just started"
    since: str
    init: Init | None = None
    keys: Keys | None = None
    reserved: int = 0
    acknowledged: int = 0
    notes: tuple[KeptNote, ...] = ()
    answers: tuple[KeptAnswer, ...] = ()
    execs: tuple[str, ...] = ()
    next_exec: int = 1


def fresh(ticket_id: str, now: str) -> Record:
    """Of a pilot that has never run."""
    return Record(ticket_id=ticket_id, session=secrets.token_urlsafe(24), since=now)


def kept_notes(notes: list[Note]) -> tuple[KeptNote, ...]:
    return tuple(KeptNote(number=note.number, kind=note.kind, body=dict(note.body)) for note in notes)


def kept_answers(answers: Answers) -> tuple[KeptAnswer, ...]:
    return tuple(
        KeptAnswer(
            key=key,
            fingerprint=answer.fingerprint,
            result=answer.result,
            fault=None if answer.fault is None else dict(answer.fault),
        )
        for key, answer in answers.items()
    )


def answers_of(record: Record) -> Answers:
    found = Answers()
    for kept in record.answers:
        answer = Answer(fingerprint=kept.fingerprint, result=kept.result, fault=kept.fault)
        found.keep(kept.key, answer)
    return found


class Store:
    """The record's file in the pilot's own directory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "nodemanager.json"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RefusedError(f"{directory} cannot be made", cause=error.strerror) from error

    def load(self) -> Record | None:
        """None when there is none. Errors: RefusedError for a file nobody of us wrote."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise RefusedError(f"{self.path} cannot be read", cause=str(error)) from error
        try:
            return Record.model_validate_json(text)
        except ValidationError as error:
            raise RefusedError(
                f"{self.path} is not the record of a NodeManager: {first_fault(error)}",
                hint="each pilot has a directory of its own",
            ) from None

    def save(self, record: Record) -> None:
        """On the disk when this returns. Errors: OSError (disk full): nothing has changed then."""
        replace_file(self.path, record.model_dump_json().encode())

    def remove(self) -> None:
        """The pilot is over and everybody knows."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
