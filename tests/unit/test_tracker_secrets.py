"""A password gets into no reason, and not into the state that travels with the guest."""

from __future__ import annotations

import pytest
from tracker_wire import GUEST_MAC, Talk

from virtgrid.tracker.tracker import Tracker


@pytest.mark.parametrize(
    ("port", "greeting", "before", "line", "reason"),
    [
        (21, b"220 ready", b"USER a", b"PASS s3cret word", "PASS"),
        (21, b"220 ready", b"USER a", b"ACCT s3cret", "ACCT"),
        (110, b"+OK ready", b"USER a", b"pass s3cret", "pass"),
        (110, b"+OK ready", b"CAPA", b"APOP user s3cret", "APOP"),
        (110, b"+OK ready", b"CAPA", b"AUTH PLAIN s3cret", "AUTH PLAIN"),
        (143, b"* OK ready", b"a CAPABILITY", b"b LOGIN user s3cret", "b LOGIN"),
        (143, b"* OK ready", b"a CAPABILITY", b'b login "us er" "s3cret"', "b login"),
        (143, b"* OK ready", b"a CAPABILITY", b"b AUTHENTICATE PLAIN s3cret", "b AUTHENTICATE"),
        (25, b"220 ready ESMTP", b"EHLO a", b"AUTH PLAIN s3cret", "AUTH PLAIN"),
    ],
)
def test_a_password_is_not_kept(port: int, greeting: bytes, before: bytes, line: bytes, reason: str) -> None:
    talk = Talk(Tracker(guest_macs=[GUEST_MAC]), server_port=port).open()
    talk.answer(greeting + b"\r\n").ask(before + b"\r\n").ask(line + b"\r\n")
    view = talk.view
    assert view.requests == 2
    assert b"s3cret" not in talk.tracker.export_state(talk.at_s)
    assert all("s3cret" not in change.reason for change in talk.tracker.changes())
    # Its turn comes: now it is what is waited for.
    answer = {21: b"331 go on", 110: b"+OK", 143: b"a OK", 25: b"250 hello"}[port]
    talk.answer(answer + b"\r\n" + (b".\r\n" if before == b"CAPA" else b""))
    assert talk.view.reason.endswith(reason), talk.view.reason
    assert b"s3cret" not in talk.tracker.export_state(talk.at_s)
