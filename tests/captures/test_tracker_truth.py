"""Public captures with known contents: what the tracker counts is what happened in them.

The index tells, per file and protocol, how many requests and responses there were; it was made with
tshark, whose words map to the tracker's ``requests`` and ``responses`` like this:

HTTP   ``http.req``: a request's head. ``http.resp``: an answer's head, interim ones (1xx) included;
       the tracker counts these not, for they answer nothing, except 101, which does.
FTP    ``ftp.req``: a command line. ``ftp.resp``: a reply; the greeting and preliminary replies (150)
       count. A reply of several lines is one for the tracker; for the index it is one for each frame.
SMTP   ``smtp.req``: a command line, neither the text behind DATA or BDAT nor the lines that AUTH asks
       for; of several commands in one frame the index sometimes sees none. ``smtp.resp``: a reply;
       the greeting, 354 and 334 count, and one of several lines is one.
POP3   ``pop.req``: a command line. ``pop.resp``: ``+OK`` and ``-ERR``, the greeting among them, not
       ``+ `` that asks for a line and not the lines that follow.
IMAP   ``imap.req``: a tagged command, not its literals nor DONE. ``imap.resp``: a tagged answer; the
       greeting, ``*`` and ``+`` do not count.

After STARTTLS, STLS, AUTH TLS, CONNECT and 101 both stop counting. known_differences.json lists every
high-confidence file where the tracker's count differs from the index: what the tracker counts there,
which of the two is right ("index": the index is wrong, shown by the bytes; "ours": the tracker is),
and why. Anything else is a failure.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import public
import pytest
from checker_flows import INF, clocked, talks
from checker_readers import read

KNOWN = {
    (entry["protocol"], entry["file"]): entry
    for entry in json.loads((Path(__file__).parent / "known_differences.json").read_text())
}
#: The tracker's names of the protocols, by the index's; with how many files at least there must be.
PROTOCOLS = {
    "http": ("http", 97),
    "ftp": ("ftp", 24),
    "smtp": ("smtp", 53),
    "pop": ("pop3", 4),
    "imap": ("imap", 2),
}

pytestmark = public.needed


def rows(app: str) -> list[dict[str, Any]]:
    """The high-confidence files with this protocol."""
    return [r for r in public.index() if app in r["apps"] and r["truth_confidence"] == "high"]


ALL = [(app, row) for app in PROTOCOLS for row in rows(app)]


def counts(name: str) -> list[int]:
    connections = public.run(name)
    return [sum(c.view.requests for c in connections), sum(c.view.responses for c in connections)]


def truth(row: dict[str, Any], app: str) -> list[int]:
    totals = row["totals"]
    interim = sum(
        1
        for stream in row["streams"].values()
        for event in stream["events"]
        if event[2] == "http.resp" and str(event[3]).startswith("1") and str(event[3]) != "101"
    )
    return [totals.get(f"{app}.req", 0), totals.get(f"{app}.resp", 0) - interim * (app == "http")]


@pytest.mark.parametrize(("app", "row"), ALL, ids=[f"{app}-{row['file']}" for app, row in ALL])
def test_requests_and_answers_are_counted_as_they_happened(app: str, row: dict[str, Any]) -> None:
    got = counts(row["file"])
    known = KNOWN.get((app, row["file"]))
    if known is None:
        assert got == truth(row, app)
    else:
        assert got == known["got"], known["why"]
        assert got != truth(row, app), "no longer different: take it off the list"


@pytest.mark.parametrize("app", PROTOCOLS)
def test_nearly_all_files_of_each_protocol_agree_with_the_index(app: str) -> None:
    _, at_least = PROTOCOLS[app]
    files = {row["file"] for row in rows(app)}
    listed = [entry for (of, _), entry in KNOWN.items() if of == app]
    assert len(files) >= at_least
    assert {entry["file"] for entry in listed} <= files
    wrong_index = [e for e in listed if e["wrong"] == "index"]
    ours = [e for e in listed if e["wrong"] == "ours"]
    assert len(wrong_index) + len(ours) == len(listed)
    # Of the files whose index is right.
    assert len(ours) <= 0.03 * (len(files) - len(wrong_index))


@pytest.mark.parametrize("key", [k for k, entry in KNOWN.items() if entry["wrong"] == "index"], ids="-".join)
def test_where_the_index_is_called_wrong_a_second_reader_counts_as_the_tracker_does(
    key: tuple[str, str],
) -> None:
    asked, certain = 0, True
    for talk in talks(clocked(public.frames(key[1]))):
        book = read(talk.up, talk.down, int(talk.server.rpartition(":")[2]))
        asked += sum(not what.what.endswith("a line of it") for what in book.asked)
        certain &= book.protocol != "" and book.certain_until_s == INF
    # Where that reader is not certain to the end, it can only have counted less.
    assert asked == KNOWN[key]["got"][0] if certain else asked <= KNOWN[key]["got"][0]


def test_every_difference_is_explained_in_one_line() -> None:
    for (app, _), entry in KNOWN.items():
        assert app in PROTOCOLS
        assert set(entry) == {"protocol", "file", "got", "wrong", "why"}
        assert entry["why"].endswith(".")
        assert "\n" not in entry["why"]
        assert 30 <= len(entry["why"]) <= 300


@pytest.mark.parametrize("row", public.index(), ids=lambda row: row["file"])
def test_no_capture_makes_the_tracker_fail_or_contradict_itself(row: dict[str, Any]) -> None:
    for connection in public.run(row["file"]):
        times = [c.at_s for c in connection.timeline]
        assert times == sorted(times)
        verdicts = [c.verdict for c in connection.timeline]
        assert all(a != b for a, b in pairwise(verdicts))
        assert "closed" not in verdicts[:-1]
        assert all(c.reason.isprintable() for c in connection.timeline)
        if connection.end is None and connection.timeline:
            assert connection.view.verdict.value == verdicts[-1]
