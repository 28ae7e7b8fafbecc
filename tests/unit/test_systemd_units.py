"""The systemd units name what there is, and stand in the order that a host goes down in."""

from __future__ import annotations

import configparser

import pytest

from virtgrid.cli import manpage
from virtgrid.core.shipped import shipped
from virtgrid.core.units import parse_duration


def _unit(name: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[method-assign,assignment]
    unit.read_string(shipped("systemd", name).read_text(encoding="utf-8"))
    return unit


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("virtgridd.service", "ExecStart"),
        ("virtgrid-evacuate.service", "ExecStop"),
        ("virtgrid-web.service", "ExecStart"),
    ],
)
def test_a_unit_runs_a_command_there_is(name: str, key: str) -> None:
    program, *words = _unit(name)["Service"][key].split()
    assert program == "/usr/bin/virtgrid"
    node = manpage.tree()
    while words and not words[0].startswith("-"):
        node = next(below for below in node.below if below.words[-1] == words[0])
        words = words[1:]
    known = {option for one in node.parameters if not one.argument for option in one.names}
    assert {word for word in words if word.startswith("--")} <= known


def test_migrations_outlive_virtgridd() -> None:
    assert _unit("virtgridd.service")["Service"]["KillMode"] == "process"


def test_a_host_is_evacuated_before_its_guests_are_shut_down_and_while_virtgridd_runs() -> None:
    unit = _unit("virtgrid-evacuate.service")
    # Stopped in the reverse order of the start.
    before_it = unit["Unit"]["After"].split()
    assert {"virtgridd.service", "libvirt-guests.service", "libvirtd.service"} <= set(before_it)
    assert unit["Service"]["RemainAfterExit"] == "yes"
    limit_s = parse_duration(unit["Service"]["TimeoutStopSec"])
    words = unit["Service"]["ExecStop"].split()
    assert parse_duration(words[words.index("--timeout") + 1]) < limit_s
