"""What a domain's metadata says of its migrations: ``<policy>`` of our namespace. Pure.

Whoever may define a domain writes it, so it *names* things and never places: destinations are those that the
host's configuration describes. Read hardened (no document type, no entities, no network, a limit of size) and
validated by ``xml-templates/metadata-policy.rng``; a fault is told with its line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from lxml import etree

from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.core.shipped import shipped
from virtgrid.core.units import parse_duration, parse_rate

NAMESPACE: Final = "https://virtgrid.example/xmlns/policy/1.0"
#: How libvirt shall write the namespace in a domain's XML.
PREFIX: Final = "virtgrid"
LIMIT_BYTES: Final = 16 << 10
_LONGEST_WAIT_S: Final = 7 * 86400.0
_DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_HINT: Final = "docs/reference/domain-policy.md says what may stand there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """From ``begins_min`` until before ``ends_min`` (minutes of the day in ``zone``) another price counts.

    days: on which it begins, 0 is Monday; one that ends before it begins goes on into the next day.
    """

    begins_min: int
    ends_min: int
    zone: str
    days: frozenset[int]
    price: float

    def open_at(self, now: datetime) -> bool:
        """now: with a zone, any."""
        local = now.astimezone(ZoneInfo(self.zone))
        minute = local.hour * 60 + local.minute
        if self.begins_min < self.ends_min:
            return self.begins_min <= minute < self.ends_min and local.weekday() in self.days
        if minute >= self.begins_min:
            return local.weekday() in self.days
        return minute < self.ends_min and (local - timedelta(days=1)).weekday() in self.days


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Somewhere it may go: a destination's name, or all those of a site."""

    name: str | None
    site: str | None
    price: float
    windows: tuple[Window, ...]

    def price_at(self, now: datetime) -> float:
        """Of several open windows the first counts."""
        return next((window.price for window in self.windows if window.open_at(now)), self.price)

    @property
    def text(self) -> str:
        return self.name or f"site {self.site}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainPolicy:
    """yields: makes way for jobs. follows: goes where it is cheaper. wishes: in their order.

    Of the gate, None is what the configuration says. gate_foreign: hold migrations that others began, too.
    """

    yields: bool = False
    follows: bool = False
    wishes: tuple[Wish, ...] = ()
    gate: str | None = None
    max_wait_s: float | None = None
    on_timeout: str | None = None
    bandwidth_bytes_s: float | None = None
    gate_foreign: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Where to go, or None; and why."""

    to: str | None
    reason: str


def choose(policy: DomainPolicy, sites: Mapping[str, str | None], now: datetime) -> Choice:
    """The destination with the lowest price now; of equal ones the first. sites: destination -> its site."""
    found = _prices(policy, sites, now)
    if not policy.wishes:
        return Choice(to=None, reason="its policy names no destination")
    if not found:
        named = ", ".join(wish.text for wish in policy.wishes)
        return Choice(to=None, reason=f"the configuration has no destination {named}")
    price, name = min(found, key=lambda one: one[0])
    others = len({name for _, name in found}) - 1
    text = f"{name}, price {price:g}" if others else f"{name}, the only one"
    return Choice(to=name, reason=f"{text}{f', the lowest of {others + 1}' if others else ''}")


def cheaper(
    policy: DomainPolicy, sites: Mapping[str, str | None], here: tuple[str, str | None], now: datetime
) -> Choice:
    """Where it is cheaper now than here, if its policy follows prices. here: this host's name and site."""
    if not policy.follows:
        return Choice(to=None, reason="its policy does not follow prices")
    own = _prices(policy, dict([here]), now)
    if not own:
        return Choice(to=None, reason=f"its policy has no price for {here[0]}, where it is")
    elsewhere = _prices(policy, {name: site for name, site in sites.items() if name != here[0]}, now)
    (price, name), (paid, _) = min([*elsewhere, own[0]], key=lambda one: one[0]), min(own)
    if price >= paid:
        return Choice(to=None, reason=f"nowhere is cheaper than here, price {paid:g}")
    return Choice(to=name, reason=f"{name}, price {price:g}, is cheaper than here, {paid:g}")


def _prices(policy: DomainPolicy, sites: Mapping[str, str | None], now: datetime) -> list[tuple[float, str]]:
    """(price, name) of all wishes that can be fulfilled, in their order."""
    found: list[tuple[float, str]] = []
    for wish in policy.wishes:
        names = [wish.name] if wish.name else [name for name, site in sites.items() if site == wish.site]
        found += [(wish.price_at(now), name) for name in names if name in sites]
    return found


def read(text: bytes, *, what: str) -> etree._Element:
    """``<policy>`` as an element that fits the schema. what: the file or domain, for errors.

    Elements without a namespace are ours: so libvirt gives metadata, and wants it. Errors: RefusedError.
    """
    if len(text) > LIMIT_BYTES:
        raise _refuse(what, 1, f"it is larger than {LIMIT_BYTES >> 10} KiB")
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        root = etree.fromstring(text, parser)
    except etree.XMLSyntaxError as error:
        raise _refuse(what, error.lineno or 1, error.msg or "it is not XML") from None
    except ValueError as error:  # an encoding nobody knows
        raise _refuse(what, 1, str(error)) from None
    if root.getroottree().docinfo.internalDTD is not None:
        raise _refuse(what, 1, "it has a document type declaration")
    for element in root.iter():
        if isinstance(element.tag, str) and not element.tag.startswith("{"):
            element.tag = f"{{{NAMESPACE}}}{element.tag}"
    schema = _schema()
    if not schema.validate(root):
        raise _refuse(what, *_first(schema.error_log))
    return root


def parse(text: bytes, *, what: str) -> DomainPolicy:
    """``<policy>`` -> what it says. Errors: RefusedError with the line."""
    root = read(text, what=what)
    gate, foreign = root.find(f"{{{NAMESPACE}}}gate"), root.find(f"{{{NAMESPACE}}}foreign")
    max_wait_s = bandwidth = None
    if gate is not None:
        line = _line(gate)
        try:
            if (word := gate.get("max-wait")) is not None:
                max_wait_s = parse_duration(word)
            if (word := gate.get("bandwidth")) is not None:
                bandwidth = parse_rate(word)
        except UsageError as error:
            raise _refuse(what, line, error.what, error.hint) from None
        if max_wait_s is not None and max_wait_s > _LONGEST_WAIT_S:
            raise _refuse(what, line, "max-wait is longer than a week")
        if bandwidth is not None and bandwidth < 2**20:
            raise _refuse(what, line, "bandwidth is less than 1 MiB/s (8.4mbit): no migration ends with that")
    return DomainPolicy(
        yields=root.find(f"{{{NAMESPACE}}}yield") is not None,
        follows=root.find(f"{{{NAMESPACE}}}follow") is not None,
        wishes=tuple(_wish(one, what) for one in root.iterfind(f"{{{NAMESPACE}}}destination")),
        gate=None if gate is None else gate.get("policy"),
        max_wait_s=max_wait_s,
        on_timeout=None if gate is None else gate.get("on-timeout"),
        bandwidth_bytes_s=bandwidth,
        gate_foreign=foreign is not None and foreign.get("gate") == "yes",
    )


def bare(root: etree._Element) -> str:
    """As libvirt wants it, which puts the namespace in itself."""
    for element in root.iter():
        if isinstance(element.tag, str):
            element.tag = etree.QName(element).localname
    etree.cleanup_namespaces(root)
    return etree.tostring(root, encoding="unicode", with_tail=False)


def _wish(element: etree._Element, what: str) -> Wish:
    windows = tuple(_window(one, what) for one in element.iterfind(f"{{{NAMESPACE}}}window"))
    return Wish(
        name=element.get("name"),
        site=element.get("site"),
        price=float(element.get("price", "0")),
        windows=windows,
    )


def _window(element: etree._Element, what: str) -> Window:
    zone, begins, ends = element.get("zone", ""), _minutes(element, "from"), _minutes(element, "until")
    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise _refuse(what, _line(element), f"there is no time zone '{zone}'", "Europe/Berlin") from None
    if begins == ends:
        raise _refuse(what, _line(element), "the window ends when it begins")
    days = element.get("days", ",".join(_DAYS)).split(",")
    return Window(
        begins_min=begins,
        ends_min=ends,
        zone=zone,
        days=frozenset(_DAYS.index(day) for day in days),
        price=float(element.get("price", "0")),
    )


def _minutes(element: etree._Element, name: str) -> int:
    hours, minutes = element.get(name, "00:00").split(":")
    return int(hours) * 60 + int(minutes)


@cache
def _schema() -> etree.RelaxNG:
    return etree.RelaxNG(etree.parse(str(shipped("xml-templates", "metadata-policy.rng"))))


def _line(element: etree._Element) -> int:
    line: Any = element.sourceline
    return int(line or 1)


_CONSEQUENCES: Final = ("failed to validate content", "interleave", "Expecting an element")


def _first(log: Iterable[object]) -> tuple[int, str]:
    """The fault a person can do something about: libxml2 tells consequences beside it."""
    told = [(int(getattr(one, "line", 1)), str(getattr(one, "message", ""))) for one in log]
    plain = [one for one in told if not any(words in one[1] for words in _CONSEQUENCES)]
    line, text = (plain or told or [(1, "it does not fit the schema")])[0]
    if line < 1:  # of an element too many it knows only what it stands in
        line = max([1, *(other for other, _ in told)])
    return line, text.replace(f"{{{NAMESPACE}}}", "")[:300]


def _refuse(what: str, line: int, text: str, hint: str | None = None) -> RefusedError:
    return RefusedError(f"{what}:{line}: {text}", hint=hint or _HINT)
