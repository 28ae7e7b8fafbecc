"""What every bench prints: figures with their spread, peer and goal. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number.

    spread: lowest and highest of the n samples behind it. peer: the same of what it is compared
    with; ratio: value / peer. goal: what was asked for, in words; ok: whether it was met, None
    where nothing was asked or nothing could be measured.
    """

    name: str
    value: float | None
    unit: str = ""
    spread: tuple[float, float] | None = None
    n: int = 0
    peer: float | None = None
    ratio: float | None = None
    goal: str | None = None
    ok: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": _rounded(self.value),
            "unit": self.unit,
            "spread": None if self.spread is None else [_rounded(value) for value in self.spread],
            "n": self.n,
            "peer": _rounded(self.peer),
            "ratio": _rounded(self.ratio),
            "goal": self.goal,
            "ok": self.ok,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What was asked of a figure: the words, and whether a value meets it."""

    text: str
    met: Callable[[float], bool]


def at_most(limit: float, unit: str = "") -> Goal:
    """Met by values up to ``limit``."""
    return Goal(text=f"≤ {limit:g}{f' {unit}' if unit else ''}", met=lambda value: value <= limit)


def at_least(limit: float, unit: str = "") -> Goal:
    """Met by values from ``limit`` up."""
    return Goal(text=f"≥ {limit:g}{f' {unit}' if unit else ''}", met=lambda value: value >= limit)


def figure(
    name: str,
    samples: Sequence[float | None],
    unit: str = "",
    *,
    of: Callable[[Sequence[float]], float] = statistics.fmean,
    peer: float | None = None,
    goal: Goal | None = None,
) -> Figure:
    """A figure from its samples; those that are None were not measured and do not count.

    of: mean, median, max …  A goal on ``value``; nothing measured fails a goal, it never meets it.
    """
    known = [value for value in samples if value is not None and math.isfinite(value)]
    value = of(known) if known else None
    return Figure(
        name=name,
        value=value,
        unit=unit,
        spread=(min(known), max(known)) if known else None,
        n=len(known),
        peer=peer,
        ratio=value / peer if value is not None and peer else None,
        goal=goal.text if goal else None,
        ok=(value is not None and goal.met(value)) if goal else None,
    )


def ratio(name: str, value: Figure, peer: Figure, *, goal: Goal | None = None) -> Figure:
    """How one figure compares with another, as a figure of its own."""
    found = value.value / peer.value if value.value is not None and peer.value else None
    return Figure(
        name=name,
        value=found,
        n=min(value.n, peer.n),
        peer=peer.value,
        ratio=found,
        goal=goal.text if goal else None,
        ok=(found is not None and goal.met(found)) if goal else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One bench: its figures and everything they were made from."""

    bench: str
    environment: Mapping[str, Any]
    figures: tuple[Figure, ...]
    raw: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The object of ``--json``."""
        return {
            "bench": self.bench,
            "environment": dict(self.environment),
            "figures": [one.as_dict() for one in self.figures],
            "raw": dict(self.raw),
        }

    @property
    def missed(self) -> tuple[Figure, ...]:
        """Figures that were asked for more than was found."""
        return tuple(one for one in self.figures if one.ok is False)


COLUMNS: Final = ("FIGURE", "VALUE", "UNIT", "SPREAD", "N", "PEER", "RATIO", "GOAL", "OK")


def rows(result: Result) -> list[tuple[str, ...]]:
    """The figures as the cells of a table, in the order of COLUMNS."""
    return [
        (
            one.name,
            shown(one.value),
            one.unit,
            "" if one.spread is None or one.n < 2 else f"{shown(one.spread[0])} … {shown(one.spread[1])}",
            str(one.n),
            shown(one.peer),
            shown(one.ratio),
            one.goal or "",
            {None: "", True: "yes", False: "NO"}[one.ok],
        )
        for one in result.figures
    ]


def shown(value: float | None) -> str:
    """A number with the digits that mean something: ``0.123``, ``12.3``, ``45,678``."""
    if value is None:
        return ""
    if value == round(value) and abs(value) < 1e15:
        return f"{round(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)
