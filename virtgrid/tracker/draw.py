"""A picture of a definition: its states with their verdicts, and which rules lead from one to the next.

Made from the definition alone, as text or as SVG; so a picture cannot say what the rules do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Final

from virtgrid.core.units import format_size
from virtgrid.tracker.rules import STATES, WAITING, Body, Definition, Kind, Pause, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """From one state to another. why: in words; lines: of the rules that do it, in the definition's file."""

    before: str
    after: str
    why: str
    lines: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        if not self.lines:
            return self.why
        return f"{self.why} ({', '.join(map(str, self.lines))})"


def steps(definition: Definition) -> tuple[Step, ...]:
    """The ways between a definition's states."""

    def lines(rules: tuple[Rule, ...], wanted: str) -> tuple[int, ...]:
        return tuple(r.line for r in rules if getattr(r, wanted))

    client, server = definition.client, definition.server
    rules = (*client, *server, *definition.client_more, *definition.server_more)
    asks, answers = lines(client, "push"), lines(server, "pop")
    out = [Step(before="new", after="busy", why="asks", lines=asks)]
    out.append(Step(before="idle", after="busy", why="asks", lines=asks))
    out.append(Step(before="busy", after="idle", why="answered", lines=answers))
    if moving := _movers(rules):
        limit = "large" if definition.large_bytes is None else format_size(definition.large_bytes)
        out.append(Step(before="busy", after="moving", why=limit, lines=moving))
        out.append(Step(before="moving", after="busy", why="its end"))
    if waits := lines(client, "waiting"):
        out.append(
            Step(before="busy", after=WAITING, why="leave given", lines=(*waits, *lines(server, "go")))
        )
        out.append(Step(before=WAITING, after="busy", why="goes on"))
    if opaque := lines(rules, "opaque"):
        out.append(Step(before="busy", after="opaque", why="becomes opaque", lines=opaque))
    return tuple(out)


def _movers(rules: tuple[Rule, ...]) -> tuple[int, ...]:
    """Rules that begin what can be a large transfer."""
    found = []
    for rule in rules:
        choices = [*rule.bodies, *([rule.ask] if rule.ask else [])]
        sized = any(c.kind in (Body.BYTES, Body.CHUNKED, Body.UNTIL, Body.CLOSE) for c in choices)
        if sized or rule.transfer:
            found.append(rule.line)
    return tuple(sorted(found))


def verdict(pause: Pause) -> str:
    """``quiet 2 s, 10 s when the client spoke last``."""
    if pause.for_s is None:
        return pause.kind.value
    text = f"{pause.kind.value} {pause.for_s:g} s"
    return text if pause.asked_s is None else f"{text}, {pause.asked_s:g} s if the client spoke last"


def _states(definition: Definition) -> list[str]:
    return [s for s in (*STATES, WAITING) if s in definition.pauses]


def _rules(definition: Definition) -> list[tuple[int, str]]:
    sides = (
        ("client", definition.client),
        ("server", definition.server),
        ("client more", definition.client_more),
        ("server more", definition.server_more),
    )
    return sorted((r.line, f"{side} {r.source}") for side, rules in sides for r in rules)


def as_text(definition: Definition) -> str:
    """The picture in words: states, ways, rules."""
    unit = "lines" if definition.lines else "heads"
    first = "; the server speaks first" if definition.greeting else ""
    out = [f"{definition.name}: {unit}, ports {' '.join(map(str, definition.ports)) or 'any'}{first}", ""]
    out += [f"  {state:<8} {verdict(definition.pauses[state])}" for state in _states(definition)]
    out.append("")
    out += [f"  {s.before:<8} -> {s.after:<8} {s.label}" for s in steps(definition)]
    out.append("")
    out += [f"  {line:>3}  {text}" for line, text in _rules(definition)]
    return "\n".join(out) + "\n"


# -- SVG -----------------------------------------------------------------------------------

_WIDTH: Final = 1080
_BOX: Final = (230, 56)
_PLACES: Final = {
    "new": (130, 90), "busy": (540, 90), "moving": (950, 90),
    "opaque": (130, 260), "idle": (540, 260), WAITING: (950, 260),
}  # fmt: skip
_FILL: Final = {Kind.OK: "#d8f0d8", Kind.HOLD: "#f8d8d4", Kind.QUIET: "#fbeec8"}
_RULES_TOP: Final = 350
_LINE_HEIGHT: Final = 18
_LABEL_MAX: Final = 44
_ROW_MAX: Final = 150


def as_svg(definition: Definition) -> str:
    """The picture: green is suitable, red unsuitable, yellow decided by silence."""
    rows = _rules(definition)
    height = _RULES_TOP + _LINE_HEIGHT * (len(rows) + 1)
    states = _states(definition)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f"<title>{escape(definition.name)}: states and rules</title>",
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0 0L10 5L0 10z" fill="#444"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="20" y="30" font-size="17" font-weight="bold">{escape(definition.name)}</text>',
    ]
    out += [_arrow(step) for step in steps(definition)]
    out += [_box(state, definition.pauses[state]) for state in states]
    for number, (line, text) in enumerate(rows):
        y = _RULES_TOP + _LINE_HEIGHT * number
        shown = text if len(text) <= _ROW_MAX else text[: _ROW_MAX - 3] + "..."
        out.append(
            f'<text x="50" y="{y}" text-anchor="end" fill="#777">{line}</text>'
            f'<text x="60" y="{y}" font-family="monospace" font-size="11">{escape(shown)}</text>'
        )
    return "\n".join([*out, "</svg>"]) + "\n"


def _box(state: str, pause: Pause) -> str:
    x, y = _PLACES[state]
    width, height = _BOX
    return (
        f'<rect x="{x - width // 2}" y="{y - height // 2}" width="{width}" height="{height}" rx="9" '
        f'fill="{_FILL[pause.kind]}" stroke="#444"/>'
        f'<text x="{x}" y="{y - 4}" text-anchor="middle" font-weight="bold">{state}</text>'
        f'<text x="{x}" y="{y + 15}" text-anchor="middle" font-size="11">{escape(verdict(pause))}</text>'
    )


def _arrow(step: Step) -> str:
    """A line from box to box, a little to the right of the way, with its label."""
    (x1, y1), (x2, y2) = _PLACES[step.before], _PLACES[step.after]
    half_width, half_height = _BOX[0] // 2, _BOX[1] // 2
    if y1 == y2:
        right = 1 if x2 > x1 else -1
        y1 = y2 = y1 + 12 * -right
        x1, x2 = x1 + right * half_width, x2 - right * half_width
        label = (x1 + x2) // 2, y1 + (-6 if right > 0 else 16), "middle"
    else:
        down = 1 if y2 > y1 else -1
        y1, y2 = y1 + down * half_height, y2 - down * half_height
        if x1 == x2:
            x1 = x2 = x1 + 20 * -down
            label = x1 - 8 * down, (y1 + y2) // 2 + 5, "end" if down > 0 else "start"
        else:
            side = 1 if x2 > x1 else -1
            x1, x2 = x1 + side * 90, x2 - side * 60
            x, y = (3 * x1 + x2) // 4, (3 * y1 + y2) // 4
            label = x + side * 14, y + 4, "start" if side > 0 else "end"
    shown = step.label if len(step.label) <= _LABEL_MAX else step.label[: _LABEL_MAX - 4] + "...)"
    x, y, anchor = label
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#444" marker-end="url(#tip)"/>'
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="11" fill="#333">{escape(shown)}</text>'
    )
