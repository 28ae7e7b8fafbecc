"""Who may ask what is a table, and how far a clock is off is arithmetic: nothing else decides."""

from __future__ import annotations

import contextlib
import logging
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire_grid import CRM, Grid
from virtgrid.core.clock import FakeClock
from virtgrid.core.errors import RefusedError
from virtgrid.wire.certificates import read_certificates
from virtgrid.wire.identity import Identity, LocalUser, Peer, Right, Role, authorise, called, member
from virtgrid.wire.message import BadMessageError
from virtgrid.wire.skew import LIMIT_S, require_agreement, skew_s
from virtgrid.wire.tls import Tls

RIGHTS = {
    "HOLD": Right(anybodys=frozenset({Role.GRC})),
    "SUBMIT": Right(ours=frozenset({Role.USER})),
    "HELLO": Right(ours=frozenset({Role.PILOT})),
}


def of_role(role: Role, site: str = "a") -> Identity:
    return Identity(role=role, site=site, name="x")


ROOT, KENJI = LocalUser(uid=0, trusted=True), LocalUser(uid=5001, trusted=False)


@pytest.mark.parametrize(
    ("peer", "allowed"),
    [
        (of_role(Role.GRC), {"HOLD"}),
        (of_role(Role.GRC, "b"), {"HOLD"}),
        (of_role(Role.USER), {"SUBMIT"}),
        (of_role(Role.USER, "b"), set()),
        (of_role(Role.PILOT), {"HELLO"}),
        (of_role(Role.PILOT, "b"), set()),
        (of_role(Role.HOST), set()),
        (of_role(Role.CRM), set()),
        (of_role(Role.NRM), set()),
        (ROOT, {"HOLD", "SUBMIT", "HELLO"}),
        (KENJI, {"SUBMIT", "HELLO"}),
    ],
    ids=str,
)
def test_everybody_may_ask_what_the_table_says_and_nothing_else(peer: Peer, allowed: set[str]) -> None:
    found = set()
    for method in RIGHTS:
        try:
            authorise(peer, method, rights=RIGHTS, site="a")
            found.add(method)
        except RefusedError:
            pass
    assert found == allowed
    with pytest.raises(BadMessageError):
        authorise(peer, "ELSE", rights=RIGHTS, site="a")


def test_a_user_is_the_same_by_certificate_and_on_a_host_of_the_site() -> None:
    kenji = Identity.parse("virtgrid://a/user/kenji")
    assert member(LocalUser(uid=5001, trusted=False, name="kenji"), site="a") == kenji
    assert member(kenji, site="a") == kenji
    assert member(kenji, site="b") == kenji
    assert member(LocalUser(uid=5001, trusted=False, name="kenji"), site="b") != kenji
    for name in (None, "EXAMPLE\\kenji", "Kenji", "kenji/x", "uid-0"):
        found = member(LocalUser(uid=5001, trusted=False, name=name), site="a")
        assert str(found) == "virtgrid://a/user/uid-5001"


def test_who_was_named_may_ask_and_others_of_the_role_may_not() -> None:
    told = frozenset({"virtgrid://b/grc/x", "uid:5001"})
    rights = {"HOLD": Right(named=told)}
    for peer in (of_role(Role.GRC, "b"), KENJI, ROOT):
        authorise(peer, "HOLD", rights=rights, site="a")
    for stranger in (of_role(Role.GRC), of_role(Role.USER, "b"), LocalUser(uid=5002, trusted=False)):
        with pytest.raises(RefusedError, match="may not ask HOLD") as refused:
            authorise(stranger, "HOLD", rights=rights, site="a")
        if stranger == of_role(Role.GRC):
            assert "--grc virtgrid://a/grc/x" in (refused.value.hint or "")


def test_a_caller_is_written_down_in_one_word() -> None:
    kenji = LocalUser(uid=5001, trusted=False, name="kenji")
    assert called(kenji) == "uid:5001"
    assert called(kenji, site="a") == "virtgrid://a/user/kenji" == called(member(kenji, site="a"))
    assert called(ROOT) == called(LocalUser(uid=0, trusted=True, name="root"), site="a") == "uid:0"


@pytest.mark.parametrize(
    "uri",
    [
        "", "virtgrid://a/crm", "virtgrid://a/crm/", "virtgrid:///crm/x", "virtgrid://a/king/x", "http://a/crm/x",
        "virtgrid://A/crm/x", "virtgrid://a/crm/x/y", "virtgrid://a/crm/x\n", "virtgrid://a/crm/-x",
        f"virtgrid://{'a' * 64}/crm/x", f"virtgrid://a/crm/{'x' * 64}", "virtgrid://a.b/crm/x", "virtgrid://a/crm/ü",
    ],
)  # fmt: skip
def test_what_is_no_identity_is_refused(uri: str) -> None:
    with pytest.raises(RefusedError):
        Identity.parse(uri)


@given(st.text(max_size=80))
def test_any_text_is_an_identity_or_refused(text: str) -> None:
    with contextlib.suppress(RefusedError):
        assert str(Identity.parse(text)) == text


@given(
    ahead_s=st.floats(-1e6, 1e6),
    there_s=st.floats(0, 1e4),
    back_s=st.floats(0, 1e4),
    sent_s=st.floats(1e9, 2e9),
)
def test_a_slow_line_never_makes_a_good_clock_look_wrong(
    ahead_s: float, there_s: float, back_s: float, sent_s: float
) -> None:
    at_s = sent_s + there_s + ahead_s
    found = skew_s(sent_s=sent_s, at_s=at_s, received_s=sent_s + there_s + back_s)
    assert abs(found) <= abs(ahead_s) + 1e-3
    assert found == 0 or (found > 0) == (ahead_s > 0)
    assert abs(found) >= abs(ahead_s) - there_s - back_s - 1e-3


def test_two_minutes_are_refused_and_a_little_is_borne() -> None:
    require_agreement("x", LIMIT_S)
    require_agreement("x", -LIMIT_S)
    with pytest.raises(RefusedError, match="the clock of x is 120 s ahead of ours"):
        require_agreement("x", 120)
    with pytest.raises(RefusedError, match="the clock of x is 120 s behind ours"):
        require_agreement("x", -120)


def test_a_fresh_certificate_is_good_for_a_clock_two_minutes_behind(tmp_path: Path) -> None:
    grid = Grid(tmp_path)
    certificate = grid.tls(CRM)._files.certificate
    own = read_certificates(certificate)[0]
    for one in (own, *grid.authority.certificates):
        assert one.not_valid_before_utc < grid.now - timedelta(minutes=4)


def test_a_service_is_reminded_once_a_day_of_a_certificate_that_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    grid = Grid(tmp_path, clock)
    tls = Tls(grid.enrol(CRM).files(Role.CRM), clock=clock)
    days_reminded = []
    with caplog.at_level(logging.WARNING):
        for day in range(370):
            caplog.clear()
            for _ in range(3):
                tls.server_context()
            assert len(caplog.records) <= 1
            if caplog.records:
                days_reminded.append(day)
            clock.advance(86400)
    assert days_reminded == list(range(336, 370))
