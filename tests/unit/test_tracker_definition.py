"""Definitions: the good are read, the bad are refused with file, line and hint, the hostile hang nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tracker_wire import Talk

from virtgrid.core.errors import RefusedError
from virtgrid.tracker.definition import builtin, load_all, load_file, parse
from virtgrid.tracker.patterns import PatternError, compile_pattern
from virtgrid.tracker.tracker import Tracker

GOOD = """\
protocol sum
# a protocol of our own
port 7777
unit head max 1KiB
case ignore
field size x-size
detect client /^SUM [0-9]+/
detect server /^DONE/
pause new hold 2s
pause idle ok
pause busy hold
pause moving ok
pause opaque quiet 1s
client /^SUM / -> push sum ; body bytes size | none
client /^BYE/ -> note
server /^WAIT/ -> note
server /^DONE/ if sum -> pop ; body bytes size | close
"""


LINES = """\
protocol chat
port 7778
unit line max 4KiB
greeting
large 10KiB
detect client /^SAY/
detect server /^HELLO/
pause new hold 2s
pause idle ok
pause busy hold
pause moving ok
pause waiting ok
pause opaque quiet 1s 5s
client /^SAY (?P<tag>[0-9]+)/ .. /\\{(?P<n>[0-9]+)\\}$/ -> push say tag ; ask bytes n ; more
client /^STAY/ -> push stay ; ask line ; waiting
client /^FETCH/ -> push fetch ; transfer
client more /^;/ -> body none ; more
server /^HELLO/ if greeting -> drop
server /^GO/ -> reply ; go
server /^(?P<code>[0-9]{3})-/ -> note ; upto code
server /^DATA (?P<port>[0-9]+) (?P<size>[0-9]+)/ if fetch -> reply ; expect passive port ; size size
server /^SUM (?P<n>[0-9]+)/ -> note ; volume n ; add n
server /^TAG (?P<tag>[0-9]+)/ -> pop tag
server /^TEXT/ -> pop ; body until \\r\\n.\\r\\n
server /^/ -> pop
"""


def test_lines_tags_literals_and_waiting_are_in_the_language() -> None:
    talk = Talk(Tracker([parse(LINES, "chat.pdl")]), server_port=7778).open().answer(b"HELLO\n")
    talk.ask(b"SAY 7 {3}\nSTAY\n")
    assert talk.view.reason == "waiting for the response to SAY 7"
    talk.answer(b"GO\n").ask(b";\n;\nSTAY\n").answer(b"TAG 8\nTAG 7\n")
    assert (talk.view.suitable, talk.view.requests) == (True, 1)
    talk.ask(b"STAY\n").answer(b"GO\n")
    assert (talk.view.state, talk.view.suitable) == ("waiting", True)
    talk.ask(b"x\n").answer(b"TEXT\n")
    assert talk.view.reason == "response, 0 B so far"
    talk.answer(b"x" * 10_240)
    assert talk.view.state == "moving"
    talk.answer(b"\r\n.\r\n").ask(b"FETCH\n").answer(b"DATA 99 20000\n")
    data = Talk(talk.tracker, server_port=99, client_port=98).open().answer(b"x")
    assert (data.view.protocol, data.view.suitable, talk.view.suitable) == ("chat-data", True, True)


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        (3, "unit line max 1", "limit must lie between"),
        (4, "greeting server", "'greeting' stands alone"),
        (5, "large", "is not a size"),
        (5, "large 0", "at least a byte"),
        (7, "# no detect server", "'greeting' needs 'detect server'"),
        (9, "pause idle quiet 1s 2s", "only 'opaque' can have two times"),
        (12, "# no waiting", "no verdict for waiting"),
        (14, "client /^SAY/ -> push greeting", "is the server's greeting"),
        (14, "client /^SAY/ -> push say nosuch", "no group 'nosuch'"),
        (14, "client /^SAY/ -> note ; ask line", "'ask' needs 'push'"),
        (14, "client /^SAY/ -> push say ; ask none", "cannot be asked for"),
        (14, "client /^SAY/ -> push say ; ask bytes nosuch", "cannot be asked for"),
        (14, "client /^SAY/ -> push say ; ask line ; body none", "'ask' cannot stand with 'body'"),
        (14, "client /^SAY/ -> push say ; waiting", "'waiting' needs 'ask'"),
        (14, "client /^SAY/ -> note ; transfer", "'transfer' needs 'push'"),
        (14, "client /^SAY/ -> push say ; size nosuch", "no group 'nosuch'"),
        (14, "client /^SAY/ -> push say ; upto say", "is no action of a client's rule"),
        (14, "client /^(?P<n>A)/ .. /(?P<n>B)/ -> push say", "group 'n' is named twice"),
        (17, "client more /^;/ -> push say", "a 'more' rule cannot push"),
        (17, "# no more", "'more', and no 'more' rule for the client"),
        (18, "# nothing answers", "no client's rule pushes 'greeting'"),
        (19, "server /^GO/ if nosuch -> go", "no client's rule pushes 'nosuch'"),
        (19, "server more /^GO/ if say -> body none", "'if' needs words"),
        (20, "server /^X/ -> note ; reply", "'note' cannot stand with"),
        (21, "server /^X/ -> note ; expect sideways n", "is no action"),
        (21, "server /^(?P<n>X)/ -> note ; expect passive n n n", "is no action"),
        (24, "server /^X/ -> pop ; body until", "is no body"),
        (24, "server /^X/ -> pop ; body until \\x00", "printable ASCII"),
        (24, "server /^X/ -> pop ; body until " + "x" * 17, "1 to 16 bytes"),
        (24, "server /^X/ -> pop ; body until x | none", "nothing can follow"),
    ],
)
def test_a_malformed_line_of_a_line_protocol_is_named(line: int, instead: str, message: str) -> None:
    lines = LINES.splitlines()
    lines[line - 1] = instead
    if instead == "# nothing answers":
        lines[3] = "# no greeting"
        lines[17] = "server /^HELLO/ if greeting -> drop"
    with pytest.raises(RefusedError) as caught:
        parse("\n".join(lines), "chat.pdl")
    assert message in caught.value.what
    assert caught.value.what.startswith("chat.pdl:")


def test_what_is_for_line_protocols_is_refused_in_others() -> None:
    for action in ("push say ; more", "push say ; ask line"):
        text = GOOD.replace("push sum ; body bytes size | none", action.replace("say", "sum"))
        with pytest.raises(RefusedError, match="are for line protocols"):
            parse(text, "x.pdl")


def test_the_cost_of_a_line_does_not_grow_with_rules_that_begin_otherwise() -> None:
    # Counted, not timed: how many rules are tried for a line.
    rules = "".join(f"client /^{chr(97 + i % 25)}{i}/ -> push a\n" for i in range(300))
    definition = parse(LINES.replace("client /^STAY/", rules + "client /^STAY/"), "big.pdl")
    assert len(definition.client) > 300
    assert max(len(rules) for rules in definition.client_table) <= 13


def test_a_users_own_protocol_is_followed_without_a_line_of_code() -> None:
    talk = Talk(Tracker([parse(GOOD, "sum.pdl")], large_bytes=1000), server_port=7777)
    talk.open().ask(b"sum 5\r\nX-Size: 3\r\n\r\nab")
    assert talk.view.reason == "request body, 1 B left"
    talk.ask(b"c").answer(b"WAIT\r\n\r\n")
    assert not talk.view.suitable
    talk.answer(b"DONE\nX-Size: 2000\n\nx")
    assert (talk.view.state, talk.view.protocol) == ("moving", "sum")
    talk.answer(b"x" * 1999)
    assert talk.view.state == "idle"


def test_the_examples_in_the_reference_are_definitions() -> None:
    page = Path(__file__).parents[2] / "docs/reference/protocol-definitions.md"
    examples = re.findall(r"^```\n(protocol .*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert [parse(text, "page").name for text in examples] == ["sum", "post"]


def test_the_built_in_definitions_can_be_read() -> None:
    assert [d.name for d in builtin()] == ["ftp", "http", "imap", "pop3", "smtp"]
    assert builtin()[1].pauses["new"].for_s == 5.0


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        (1, "protocol Sum!", "'protocol' needs a name"),
        (1, "port 80", "the first line must be 'protocol NAME'"),
        (3, "port 0", "'0' is not a TCP port"),
        (3, "port 99999999999999999999", "is not a TCP port"),
        (3, "port", "'' is not a TCP port"),
        (3, "eval os.system", "unknown word 'eval'"),
        (4, "unit head max 1GiB", "limit must lie between"),
        (4, "unit frame", "'unit' must be"),
        (4, "unit head max -1", "is not a size"),
        (6, "field size", "'field' needs a name and a header"),
        (7, "detect client ^SUM", "'detect' needs a side and a pattern"),
        (8, "resume nobody /^SUM/", "'resume' needs a side and a pattern"),
        (7, "detect client /(a+)+/", "only a single character or class may be repeated"),
        (9, "pause new hold 5 weeks", "a verdict is"),
        (9, "pause new hold 5y", "is not a duration"),
        (9, "pause new hold 0s", "must be more than 0"),
        (9, "pause nowhere ok", "'pause' needs one of the states"),
        (10, "pause idle hold 5s", "only 'new' can be 'hold TIME'"),
        (12, "pause moving quiet 5s", "'moving' cannot be 'quiet'"),
        (10, "pause new ok", "the verdict of 'new' is given twice"),
        (11, "pause busy ok", "'busy' can only be 'hold'"),
        (11, "pause busy quiet 1s", "'busy' can only be 'hold'"),
        (14, "client /^SUM / -> push sum ; body bytes nosuch", "no field 'nosuch'"),
        (14, "client /^SUM / -> pop", "'pop' is no action of a client's rule"),
        (14, "client /^SUM / -> body none", "a rule needs"),
        (14, "client /^SUM / -> push sum ; push sum", "comes twice"),
        (14, "client /^SUM / -> push sum ; note", "'note' cannot stand with"),
        (14, "client /^SUM / -> push sum ; body close", "'close' is no body"),
        (14, "client /^SUM / if sum -> push sum", "'if' needs words"),
        (14, "client /^SUM /", "a rule is"),
        (17, "server /^DONE/ if product -> pop", "no client's rule pushes 'product'"),
        (17, "server /^DONE/ -> pop ; body none | close", "nothing can follow"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(line: int, instead: str, message: str) -> None:
    lines = GOOD.splitlines()
    lines[line - 1] = instead
    with pytest.raises(RefusedError) as caught:
        parse("\n".join(lines), "/etc/virtgrid/protocols.d/sum.pdl")
    assert message in caught.value.what
    assert caught.value.what.startswith(f"/etc/virtgrid/protocols.d/sum.pdl:{line}")
    assert caught.value.exit_status == 3


@pytest.mark.parametrize("missing", ["unit", "detect client", "pause idle", "client", "server"])
def test_what_is_missing_is_named(missing: str) -> None:
    text = "\n".join(line for line in GOOD.splitlines() if not line.startswith(missing))
    with pytest.raises(RefusedError):
        parse(text, "sum.pdl")


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a*)*",
        r"(?:a|b)+",
        r"(a+)+$",
        r"a*a*",
        r".*.*x",
        r"\S+\S+\S+!",
        r"(?:a*b?)a",
        r"[a-z]*\w",
        r"(a)\1",
        r"(?P<x>a)(?P=x)",
        r"(?=a)",
        r"(?!a)",
        r"(?<=a)b",
        r"(?<!a)b",
        r"(?i)a",
        r"(?>a)",
        r"a{2000}",
        r"a{3,2}",
        r"a**",
        r"a*?b",
        r"*",
        r"(",
        r")",
        r"[",
        r"[z-a]",
        r"\x41",
        "\\",
        "é",
        "(" * 50 + ")" * 50,
        "(?:a|a)" * 20,
        "a?" * 50,
        "a" * 1000,
        r"(?P<n>a)(?P<n>b)",
    ],
)
def test_a_hostile_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        compile_pattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"^GET [^ ]+ HTTP\/1\.[01]", b"GET /x HTTP/1.1"),
        (r"^\d{3}(?: |$)", b"250 ok"),
        (r"^(?:RETR|STOR|LIST)\b", b"LIST"),
        (r"^(?P<tag>\S+)\s+[A-Z]{1,10}", b"a1 NOOP"),
        (r"[]x-]+y", b"]-xy"),
        (r"^\+OK(?: [0-9]+ octets)?", b"+OK 12 octets"),
        (r"a+b*$", b"aab"),
    ],
)
def test_a_useful_pattern_is_accepted(pattern: str, text: bytes) -> None:
    assert compile_pattern(pattern).match(text)


def test_an_accepted_pattern_is_quick_on_the_worst_text() -> None:
    # Steps, not seconds: were this not linear it would not end within the test's time limit.
    pattern = compile_pattern(r"^[a-z]*[0-9]*[A-Z]*(?: [a-z]+)?!")
    assert not pattern.match(b"a" * 200_000 + b"1" * 200_000 + b"?")


def test_a_users_definition_replaces_the_built_in_one(tmp_path: Path) -> None:
    (tmp_path / "mine.pdl").write_text(GOOD.replace("protocol sum", "protocol http"))
    (tmp_path / "README").write_text("not a definition")
    assert [(d.name, d.path) for d in load_all(tmp_path)][:1] == [("http", str(tmp_path / "mine.pdl"))]
    assert [d.path for d in load_all(tmp_path) if d.name == "http"] == [str(tmp_path / "mine.pdl")]
    (tmp_path / "twice.pdl").write_text(GOOD.replace("protocol sum", "protocol http"))
    with pytest.raises(RefusedError, match="already defined"):
        load_all(tmp_path)


def test_no_directory_means_no_definitions_of_ones_own(tmp_path: Path) -> None:
    assert load_all(tmp_path / "nosuch") == builtin()


def test_what_is_no_text_or_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pdl"
    for content in (b"protocol x\n\xff\xfe", b"", b"#\n" * 1000, b"a" * 100_000):
        path.write_bytes(content)
        with pytest.raises(RefusedError) as caught:
            load_file(path)
        assert str(path) in caught.value.what
    with pytest.raises(RefusedError, match="cannot be read"):
        load_file(tmp_path)
