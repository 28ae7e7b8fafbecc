"""A pilot's place is its account's, who may put there what they like: nobody is led by it to another file."""

from __future__ import annotations

import os
import pwd
import time
from dataclasses import replace
from pathlib import Path

import pytest

from virtgrid.core.errors import RefusedError
from virtgrid.grid.crm import place as places
from virtgrid.grid.crm.backend import PilotOrder
from virtgrid.grid.messages.coalloc import Window
from virtgrid.wire.endpoint import Endpoint

ME = pwd.getpwuid(os.geteuid())


@pytest.fixture
def order() -> PilotOrder:
    now_s = int(time.time())
    return PilotOrder(
        hold="key-0001",
        reservation="r1",
        node="n1",
        sandbox="n1-box",
        account=ME.pw_name,
        ticket="the words of the ticket",
        crm=Endpoint(Path("/crm.sock")),
        window=Window(begins_at_s=now_s, ends_at_s=now_s + 600),
    )


def test_a_ticket_is_its_accounts_alone_and_never_an_argument(tmp_path: Path, order: PilotOrder) -> None:
    place = places.furnish(tmp_path, order, ME)
    ticket = places.ticket_of(place)
    assert (ticket.read_text(), ticket.stat().st_mode & 0o777) == (order.ticket, 0o600)
    assert place.stat().st_mode & 0o777 == 0o700
    words = places.command(["virtgrid"], order, place, Endpoint(Path("/host.sock")))
    assert words[:3] == ["virtgrid", "serve", "node"]
    assert not any("words" in word for word in words)
    # Started again it has the ticket it had, and nothing is left beside it.
    places.furnish(tmp_path, replace(order, ticket="another"), ME)
    assert ticket.read_text() == order.ticket
    assert places.names_below(place.parent) == ["n1-box"]
    assert [path.name for path in place.parent.iterdir()] == ["n1-box"]


def test_a_log_that_leads_elsewhere_is_not_written_to(tmp_path: Path, order: PilotOrder) -> None:
    place = places.furnish(tmp_path, order, ME)
    elsewhere = tmp_path / "elsewhere"
    for there in (True, False):
        if there:
            elsewhere.touch()
        places.log_of(place).symlink_to(elsewhere)
        with pytest.raises(OSError, match="symbolic links"):
            places.open_log(place, ME)
        places.log_of(place).unlink()
        elsewhere.unlink(missing_ok=True)
    for _ in range(2):
        descriptor = places.open_log(place, ME)
        os.write(descriptor, b"said\n")
        os.close(descriptor)
    assert places.log_of(place).read_text() == "said\nsaid\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_log_that_is_somebody_elses_file_is_not_written_to(tmp_path: Path, order: PilotOrder) -> None:
    nobody = places.account_of("nobody")
    place = places.furnish(tmp_path, order, nobody)
    assert place.stat().st_uid == places.ticket_of(place).stat().st_uid == nobody.pw_uid
    (tmp_path / "roots").touch()
    places.log_of(place).hardlink_to(tmp_path / "roots")
    with pytest.raises(RefusedError, match="is not its account's"):
        places.open_log(place, nobody)


@pytest.mark.parametrize(
    ("name", "says"), [("root", "root is none"), ("vg-no-such", "no account 'vg-no-such'")]
)
def test_who_can_have_no_pilot(name: str, says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        places.account_of(name)
