"""Protocol definitions, loaded: those that come with virtgrid, and a user's own.

The words are in rules.py, the text's syntax in language.py; docs/reference/protocol-definitions.md
is the language's reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final

from virtgrid.core.errors import RefusedError
from virtgrid.tracker.language import FILE_BYTES_MAX, parse
from virtgrid.tracker.rules import STATES, Body, Definition, Kind, Pause, Rule

__all__ = [
    "STATES",
    "USER_DIRECTORY",
    "Body",
    "Definition",
    "Kind",
    "Pause",
    "Rule",
    "builtin",
    "load_all",
    "load_file",
    "parse",
]

USER_DIRECTORY: Final = Path("/etc/virtgrid/protocols.d")


def load_file(path: Path) -> Definition:
    """The definition in a file. Errors: RefusedError."""
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise RefusedError(f"{path} cannot be read", cause=error.strerror) from error
    try:
        return parse(raw.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path} is not text", cause=str(error), hint="a definition is UTF-8") from error


@cache
def builtin() -> tuple[Definition, ...]:
    """The definitions that come with virtgrid, by name."""
    directory = resources.files("virtgrid.tracker") / "protocols"
    files = sorted((f for f in directory.iterdir() if f.name.endswith(".pdl")), key=lambda f: f.name)
    return tuple(parse(f.read_text(encoding="utf-8"), f.name) for f in files)


def load_all(directory: Path = USER_DIRECTORY) -> tuple[Definition, ...]:
    """The built-in definitions and those in ``directory``; one there replaces a built-in of its name.

    Errors: RefusedError for a malformed file, or for two files with the same protocol's name.
    """
    own: dict[str, Definition] = {}
    for path in _user_files(directory):
        definition = load_file(path)
        if other := own.get(definition.name):
            raise RefusedError(f"{path}: protocol '{definition.name}' is already defined in {other.path}")
        own[definition.name] = definition
    kept: Sequence[Definition] = [d for d in builtin() if d.name not in own]
    return (*own.values(), *kept)


def _user_files(directory: Path) -> Iterator[Path]:
    try:
        found: Iterable[Path] = sorted(directory.glob("*.pdl"))
    except OSError:
        return
    yield from found
