"""A definition's picture says what its rules do, and can be shown whatever is in them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from virtgrid.cli import protocol
from virtgrid.tracker.definition import Definition, builtin, parse
from virtgrid.tracker.draw import as_svg, as_text, steps, verdict

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("definition", builtin(), ids=lambda d: d.name)
def test_every_state_and_every_rule_is_in_the_picture(definition: Definition) -> None:
    tree = ElementTree.fromstring(as_svg(definition))
    shown = [e.text for e in tree.iter(f"{SVG}text")]
    text = as_text(definition)
    for state, pause in definition.pauses.items():
        assert state in shown
        assert verdict(pause) in shown
        assert f"{state:<8} {verdict(pause)}" in text
    for rule in (*definition.client, *definition.server, *definition.client_more, *definition.server_more):
        assert str(rule.line) in shown
        assert rule.source in text
    arrows = list(tree.iter(f"{SVG}line"))
    assert len(arrows) == len(steps(definition))


def test_the_ways_between_states_are_those_of_the_rules() -> None:
    imap = next(d for d in builtin() if d.name == "imap")
    ways = {(s.before, s.after) for s in steps(imap)}
    assert ways == {
        ("new", "busy"), ("idle", "busy"), ("busy", "idle"), ("busy", "moving"), ("moving", "busy"),
        ("busy", "waiting"), ("waiting", "busy"), ("busy", "opaque"),
    }  # fmt: skip
    text = Path("virtgrid/tracker/protocols/imap.pdl")
    lines = (Path(__file__).parents[2] / text).read_text(encoding="utf-8").splitlines()
    for step in steps(imap):
        for line in step.lines:
            assert lines[line - 1].startswith(("client", "server"))


def test_what_a_definition_holds_cannot_break_out_of_the_picture() -> None:
    text = 'protocol x\nunit line\ndetect client /^A/\nclient /^<script>&"/ -> push a\nserver /^/ -> pop\n'
    text += "".join(f"pause {s} hold\n" for s in ("new", "idle", "busy", "moving", "opaque"))
    svg = as_svg(parse(text, "x.pdl"))
    assert "<script>" not in svg
    ElementTree.fromstring(svg)


def test_a_picture_is_shown_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    protocol.draw("smtp")
    assert capsys.readouterr().out == as_text(next(d for d in builtin() if d.name == "smtp"))
    protocol.draw("smtp", tmp_path / "smtp.svg")
    assert (tmp_path / "smtp.svg").read_text(encoding="utf-8").startswith("<svg ")
    own = tmp_path / "own.pdl"
    own.write_text("protocol x\nport y\n", encoding="utf-8")
    for name, status, said in (
        (str(own), 3, f"{own}:2: 'y' is not a TCP port"),
        ("nosuch", 4, "no protocol 'nosuch'"),
        (str(tmp_path / "no.pdl"), 4, "no file"),
    ):
        with pytest.raises(SystemExit) as caught:
            protocol.draw(name)
        assert caught.value.code == status
        assert said in capsys.readouterr().err
