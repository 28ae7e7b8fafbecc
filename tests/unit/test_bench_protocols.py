"""What bench protocols makes of its pauses: who is late, and through whose fault."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from virtgrid.bench import protocols
from virtgrid.bench.protocols import EAGER, SETTLED, Stop, felt, figures, usual_s, with_idle
from virtgrid.cli.bench import app
from virtgrid.lab.servers.clients import CONVERSATIONS, Command
from virtgrid.tracker.definition import builtin
from virtgrid.tracker.rules import Pause


def command(begin_s: float, took_s: float, *, name: str = "retr", ok: bool = True) -> Command:
    return Command(session=0, name=name, begin_s=begin_s, end_s=begin_s + took_s, ok=ok)


def stop(arm: str, begin_s: float, end_s: float, unsuitable: int = 0, waited_s: float = 0.0) -> Stop:
    return Stop(
        arm=arm, begin_s=begin_s, end_s=end_s, unsuitable=unsuitable, waited_s=waited_s, timed_out=False
    )


CALM = [command(at, 0.05) for at in (0.0, 1.0, 2.0)]


def test_what_is_usual_is_known_from_outside_the_pauses() -> None:
    commands = [*CALM, command(10.1, 0.4), command(20.1, 0.07)]
    assert usual_s(commands, [stop("plain", 10.0, 10.3), stop("none", 20.0, 20.3)]) == {
        "retr": pytest.approx(0.05)
    }


def test_a_command_is_late_when_it_took_a_tenth_of_a_second_more_than_usual() -> None:
    pause = stop("plain", 10.0, 10.3)
    commands = [
        command(9.9, 0.5),  # outstanding, and late
        command(10.1, 0.25),  # begun in the pause, and late
        command(10.25, 0.1),  # begun in the pause, in time
        command(9.0, 0.9),  # over before it
        command(10.4, 5.0),  # begun after it
    ]
    assert felt(commands, pause, {"retr": 0.05}) == protocols.Felt(late=2, outstanding=1, failed=0)


def test_a_command_that_failed_is_no_late_one() -> None:
    pause = stop("plain", 10.0, 10.3)
    assert felt([command(9.9, 0.5, ok=False)], pause, {"retr": 0.05}).failed == 1
    assert felt([command(9.9, 0.5, ok=False)], pause, {"retr": 0.05}).late == 0


def test_a_command_never_seen_in_calm_is_not_judged() -> None:
    assert felt([command(9.9, 5.0, name="quit")], stop("plain", 10.0, 10.3), {"retr": 0.05}).late == 0


def test_the_figures_are_means_over_the_pauses_beside_the_plain_ones() -> None:
    commands = [*CALM, command(9.9, 0.5), command(19.9, 0.5), command(20.1, 0.5), command(29.95, 0.2)]
    stops = [
        stop("plain", 10.0, 10.3, unsuitable=1),
        stop("plain", 20.0, 20.3, unsuitable=2),
        stop("gated", 30.0, 30.3, unsuitable=0, waited_s=1.5),
    ]
    found = {one.name: one for one in figures("pop3", commands, stops)}
    assert found["pop3_delayed_plain"].value == 1.5
    assert found["pop3_delayed_outstanding_plain"].value == 1.0
    assert found["pop3_delayed_gated"].value == 1.0
    assert found["pop3_delayed_gated"].ratio == pytest.approx(2 / 3)
    assert found["pop3_unsuitable_at_pause_plain"].value == 1.5
    assert found["pop3_waited_s_gated"].value == 1.5
    # Nothing was measured: that is said, not made up.
    assert found["pop3_delayed_settled"].value is None


@pytest.mark.parametrize("pause", [EAGER, SETTLED])
def test_an_arms_definitions_differ_in_nothing_but_idle(pause: Pause) -> None:
    for before, after in zip(builtin(), with_idle(builtin(), pause), strict=True):
        assert {n: p for n, p in after.pauses.items() if n != "idle"} == {
            n: p for n, p in before.pauses.items() if n != "idle"
        }
        assert after.pauses["idle"] is pause
        assert after.client is before.client


def test_every_protocol_has_clients() -> None:
    assert set(protocols.PROTOCOLS) == set(CONVERSATIONS)


@pytest.mark.parametrize(
    "words", [["--protocol", "gopher"], ["--pause", "1ms"], ["--rounds", "0"], ["--sessions", "0"]]
)
def test_nonsense_is_refused_before_anything_is_made(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was begun")

    monkeypatch.setattr("virtgrid.bench.protocols.measure", never)
    monkeypatch.setattr("virtgrid.cli.bench.require_servers", never)
    assert CliRunner().invoke(app, ["protocols", *words]).exit_code == 2
