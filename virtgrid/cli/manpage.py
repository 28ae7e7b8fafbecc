"""Man pages and the command reference, written from the command tree itself.

``python -m virtgrid.cli.manpage`` writes them below docs/; a test keeps them current. What a
command or an option says of itself is written once, in its help text.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from typer.main import get_command

from virtgrid import __version__
from virtgrid.cli import man_text as words
from virtgrid.cli.main import NOUNS, app
from virtgrid.cli.migrate import REFUSED


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One option (``names`` begin with a dash) or argument, its metavar, and what it says of itself."""

    names: tuple[str, ...]
    metavar: str | None
    text: str
    argument: bool

    @property
    def spelled(self) -> str:
        """``-c, --connect URI`` or ``DOMAIN``."""
        names = ", ".join(self.names)
        return f"{names} {self.metavar}" if self.metavar else names


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command as a person sees it: its words, what it does, its parameters, what stands below."""

    words: tuple[str, ...]
    text: str
    parameters: tuple[Parameter, ...]
    below: tuple[Command, ...] = ()

    @property
    def name(self) -> str:
        return " ".join(self.words)

    @property
    def synopsis(self) -> str:
        given = [one.spelled for one in self.parameters if one.argument]
        options = ["[OPTIONS]"] if any(not one.argument for one in self.parameters) else []
        return " ".join([self.name, *options, *given])


def tree() -> Command:
    """The whole command line, in the order of its help."""
    root: Any = get_command(app)
    nouns = tuple(_describe(root.get_command(None, noun), ("virtgrid", noun)) for noun in NOUNS)
    return Command(
        words=("virtgrid",), text=root.help or "", parameters=_parameters(root.params), below=nouns
    )


def commands(command: Command) -> Iterator[Command]:
    """Every command that does something, depth first."""
    if not command.below:
        yield command
    for one in command.below:
        yield from commands(one)


def _describe(command: Any, path: tuple[str, ...]) -> Command:
    # typer's click classes are private to it; what is read here is click's documented interface.
    below = getattr(command, "commands", {})
    text = " ".join((command.help or "").split())
    if len(path) == 2 and not text:
        text = NOUNS[path[1]][2]
    return Command(
        words=path,
        text=text,
        parameters=_parameters(command.params),
        below=tuple(_describe(one, (*path, word)) for word, one in below.items()),
    )


def _parameters(params: Iterable[Any]) -> tuple[Parameter, ...]:
    found = []
    for param in params:
        if getattr(param, "hidden", False) or param.name == "help":
            continue
        argument = param.param_type_name == "argument"
        if argument:
            name = (param.metavar or param.name.upper()).strip("[]")
            names, metavar = (name if param.required else f"[{name}]",), None
        else:
            flag = getattr(param, "is_flag", False)
            number = isinstance(param.default, int | float)
            metavar = None if flag else param.metavar or ("N" if number else "VALUE")
            names = tuple(param.opts)
        found.append(Parameter(names=names, metavar=metavar, text=_text(param), argument=argument))
    return tuple(found)


def _text(param: Any) -> str:
    """An option's help with what its definition adds: default and environment variable."""
    parts = [" ".join((getattr(param, "help", None) or "").split())]
    default = param.default
    if param.show_default and not isinstance(default, bool | None) and default != "":
        parts.append(f"Default: {default:g}." if isinstance(default, float) else f"Default: {default}.")
    if param.envvar:
        parts.append(f"Environment: {param.envvar}.")
    return " ".join(part for part in parts if part)


# --- Markdown ---------------------------------------------------------------------------


def reference() -> str:
    """docs/reference/cli.md."""
    out = [words.REFERENCE_HEAD]
    root = tree()
    for noun in root.below:
        out += [f"## {noun.name}\n", f"{noun.text}\n"]
        for command in commands(noun):
            if command is not noun:
                out += [f"### {command.name}\n", f"{command.text}\n"]
            out.append(f"```\n{command.synopsis}\n```\n")
            rows = [f"| `{_cell(one.spelled)}` | {_cell(one.text)} |" for one in command.parameters]
            if rows:
                out.append("\n".join(["| | |", "|---|---|", *rows]) + "\n")
    out.append("## Exit status\n")
    rows = [f"| {status} | {_cell(text)} |" for status, text in words.EXIT_STATUS]
    out.append("\n".join(["| | |", "|---|---|", *rows]) + "\n")
    out.append("## Environment\n")
    rows = [f"| `{name}` | {_cell(text)} |" for name, text in words.ENVIRONMENT]
    out.append("\n".join(["| | |", "|---|---|", *rows]) + "\n")
    return "\n".join(out)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- roff -------------------------------------------------------------------------------

_GLYPHS: Final = {"\\": "\\e", "-": "\\-", "→": "\\(->", "…": "...", "’": "\\(cq", "'": "\\(aq", "`": "\\(ga"}


def escape(text: str) -> str:
    """Text that roff prints as it stands: no request, no escape, hyphens that can be copied."""
    line = "".join(_GLYPHS.get(character, character) for character in " ".join(text.split()))
    return f"\\&{line}" if line.startswith(".") else line


def _head(name: str, text: str) -> list[str]:
    return [
        '.\\" Written by virtgrid.cli.manpage; do not edit.',
        f'.TH {name.upper()} 1 "" "virtgrid {__version__}" "virtgrid"',
        ".nh",
        ".ad l",
        ".SH NAME",
        f"{escape(name)} \\- {escape(text)}",
    ]


def _paragraphs(title: str, texts: Sequence[str]) -> list[str]:
    out = [f".SH {title}"]
    for number, text in enumerate(texts):
        out += [".PP"] * (number > 0) + [escape(text)]
    return out


def _terms(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [
        line for term, text in pairs for line in (".TP", f"\\fB{escape(term)}\\fR", escape(text) or "\\&")
    ]


def _examples(pairs: Iterable[tuple[str, str]]) -> list[str]:
    out = [".SH EXAMPLES"]
    for line, text in pairs:
        out += [".PP", escape(text), ".PP", ".RS 4", ".nf", escape(line), ".fi", ".RE"]
    return out


def _ending(see: str) -> list[str]:
    return [
        ".SH EXIT STATUS",
        *_terms(words.EXIT_STATUS),
        ".SH ENVIRONMENT",
        *_terms(words.ENVIRONMENT),
        ".SH FILES",
        *_terms(words.FILES),
        ".SH SEE ALSO",
        escape(see),
    ]


def man_virtgrid() -> str:
    """docs/man/virtgrid.1: every command with its options."""
    root = tree()
    out = _head("virtgrid", words.BRIEF)
    out += [".SH SYNOPSIS", "\\fBvirtgrid\\fR [\\-\\-version] [\\-\\-help] \\fICOMMAND\\fR ..."]
    out += _paragraphs("DESCRIPTION", words.DESCRIPTION)
    out.append(".SH COMMANDS")
    for noun in root.below:
        for command in commands(noun):
            out += [f".SS {escape(command.name)}", escape(command.text)]
            if command.words == ("virtgrid", "migrate"):
                out += [".PP", "Its options are in \\fBvirtgrid\\-migrate\\fR(1)."]
                continue
            if command.parameters:
                out += [".PP", f"\\fB{escape(command.synopsis)}\\fR"]
            out += _terms((one.spelled, one.text) for one in command.parameters)
    out += _examples(words.EXAMPLES)
    out += _ending("virtgrid-migrate(1), virsh(1)")
    return "\n".join(out) + "\n"


def man_migrate() -> str:
    """docs/man/virtgrid-migrate.1."""
    (command,) = (noun for noun in tree().below if noun.words[1] == "migrate")
    out = _head("virtgrid-migrate", command.text.rstrip(".").lower())
    out += [".SH SYNOPSIS", f"\\fB{escape(command.synopsis)}\\fR"]
    out += _paragraphs("DESCRIPTION", words.MIGRATE_DESCRIPTION)
    out += [".SH OPTIONS", *_terms((one.spelled, one.text) for one in command.parameters)]
    out += [".SH KEYS", escape(words.KEYS_HEAD), *_terms(words.KEYS)]
    refused = [(f"--{name.replace('_', '-')}", f"{why}.") for name, why in REFUSED.items()]
    out += [".SH REFUSED OPTIONS", escape(words.REFUSED_HEAD), *_terms(refused)]
    out += _examples(words.MIGRATE_EXAMPLES)
    out += _ending("virtgrid(1), virsh(1)")
    return "\n".join(out) + "\n"


def pages() -> dict[str, str]:
    """Everything generated: path below docs/ -> text."""
    return {
        "reference/cli.md": reference(),
        "man/virtgrid.1": man_virtgrid(),
        "man/virtgrid-migrate.1": man_migrate(),
    }


def main() -> None:
    """Write the pages below the directory given, docs/ by default."""
    docs = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "docs"
    for name, text in pages().items():
        (docs / name).parent.mkdir(parents=True, exist_ok=True)
        (docs / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
