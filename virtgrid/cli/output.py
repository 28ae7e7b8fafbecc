"""What every command needs to speak: tables, JSON, errors with their exit status, colours or none."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, ParamSpec, TextIO, TypeVar

from rich.cells import cell_len, set_cell_size
from rich.console import Console

from virtgrid.core.errors import VirtgridError
from virtgrid.report.model import clean

P = ParamSpec("P")
T = TypeVar("T")

_GAP = 2


def console(*, stderr: bool = False) -> Console:
    """A console that obeys NO_COLOR and a pipe, and takes no text for markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def interactive(stream: TextIO | None = None) -> bool:
    """Whether a person at a terminal reads this; decoration and live views are for them only."""
    stream = stream or sys.stdout
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def plain(value: Any) -> Any:
    """Anything of ours as what JSON knows: dataclasses by field, times as ISO 8601, enums by value."""
    if isinstance(value, Enum):
        return plain(value.value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None  # JSON has no infinity
    return value


def print_json(value: Any, *, line: bool = False) -> None:
    """One JSON value on standard output: indented for a document, one line for a stream of events."""
    text = json.dumps(plain(value), ensure_ascii=True, indent=None if line else 2)
    print(text, flush=line)


def print_error(error: VirtgridError, as_json: bool = False) -> None:
    """Tell an error: sentences on standard error, or with ``--json`` one object on standard output."""
    if as_json:
        print_json(error.as_dict(), line=True)
        return
    out = console(stderr=True)
    for number, line in enumerate(error.lines()):
        # Keep the indentation: clean() does not touch spaces; causes may span lines.
        for part in line.splitlines() or [""]:
            style = "bold red" if number == 0 and not out.no_color else None
            out.print(clean(part, 4000), style=style, soft_wrap=True)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    shrink: str | None = None,
    width: int | None = None,
) -> list[str]:
    """Lines of an aligned table without rules. In a terminal too narrow, column ``shrink`` gives way.

    Piped, nothing is cut: programs like cut and awk get every character.
    """
    cells = [[clean(cell) if cell not in (None, "") else "-" for cell in row] for row in rows]
    widths = [max(cell_len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    if width is None:
        width = console().width if interactive() else None
    if width is not None and shrink in columns:
        victim = columns.index(shrink)
        excess = sum(widths) + _GAP * (len(widths) - 1) - width
        widths[victim] = max(len(columns[victim]), 8, widths[victim] - max(0, excess))
    lines = []
    for row in [list(columns), *cells]:
        fitted = [
            set_cell_size(text, size - 1) + "…" if cell_len(text) > size else set_cell_size(text, size)
            for text, size in zip(row, widths, strict=True)
        ]
        lines.append((" " * _GAP).join(fitted).rstrip())
    return lines


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, shrink: str | None = None
) -> None:
    """The table on standard output, its head bold on a terminal."""
    out = console()
    for number, line in enumerate(table(columns, rows, shrink=shrink)):
        out.print(line, style="bold" if number == 0 else None, soft_wrap=True)


def run(command: Callable[P, T]) -> Callable[P, T]:
    """Decorate a command: our errors become their message and exit status, Ctrl-C becomes 130.

    A parameter named ``as_json`` makes errors JSON as well. Anything else that escapes is a bug
    of ours and says so in a sentence (exit 1); VIRTGRID_DEBUG=1 shows where.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        as_json = bool(kwargs.get("as_json"))
        try:
            return command(*args, **kwargs)
        except VirtgridError as error:
            print_error(error, as_json)
            raise SystemExit(error.exit_status) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except BrokenPipeError:
            # The reader (head, less) has gone; say nothing, and let nothing be flushed at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        except Exception as error:
            # typer.Exit, Abort and usage errors are click's own and pass through.
            if type(error).__module__.split(".")[0] in {"click", "typer"}:
                raise
            if os.environ.get("VIRTGRID_DEBUG") == "1":
                traceback.print_exc()
            first = clean(str(error).partition("\n")[0])
            print(f"error: {type(error).__name__}: {first}; this is a bug", file=sys.stderr)
            print("  hint: VIRTGRID_DEBUG=1 shows where it happened", file=sys.stderr)
            raise SystemExit(1) from error

    return wrapped
