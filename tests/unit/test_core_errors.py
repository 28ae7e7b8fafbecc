"""Errors say what, where, cause and hint, and their class decides the exit status of the design."""

from __future__ import annotations

import pytest

from virtgrid.core import errors
from virtgrid.core.errors import VirtgridError

#: The table of the command line's exit statuses.
STATUSES = {
    VirtgridError: 1,
    errors.MigrationFailedError: 1,
    errors.LabError: 1,
    errors.UsageError: 2,
    errors.RefusedError: 3,
    errors.NotHeardError: 3,
    errors.NotFoundError: 4,
    errors.HoldTimeoutError: 5,
    errors.AbortedError: 6,
    errors.PositionUnknownError: 7,
    errors.OutcomeUnknownError: 7,
    errors.PeerUnreachableError: 8,
    errors.NotAdmittedError: 8,
    errors.DeadlineError: 8,
    errors.InterruptedByUserError: 130,
}


def test_every_class_of_error_is_in_the_table() -> None:
    defined = {
        thing
        for thing in vars(errors).values()
        if isinstance(thing, type) and issubclass(thing, VirtgridError)
    }
    assert defined == set(STATUSES)


@pytest.mark.parametrize(("kind", "status"), STATUSES.items())
def test_the_class_decides_the_exit_status(kind: type[VirtgridError], status: int) -> None:
    error = kind("it happened")
    assert error.exit_status == status
    assert error.as_dict() == {
        "error": kind.code, "what": "it happened", "where": None, "cause": None, "hint": None,
        "exit_status": status,
    }  # fmt: skip


def test_codes_are_unique_so_that_a_worker_s_error_can_be_rebuilt() -> None:
    codes = [kind.code for kind in STATUSES]
    assert len(set(codes)) == len(codes)
    assert all(code.startswith("VG-") for code in codes)


def test_a_message_tells_what_where_cause_and_hint_in_this_order() -> None:
    error = errors.MigrationFailedError(
        "The migration failed.", where="web1 runs on alice", cause="disk full", hint="make room"
    )
    assert error.lines() == [
        "error: The migration failed; web1 runs on alice.  [VG-MIGRATION-FAILED]",
        "  cause: disk full",
        "  hint: make room",
    ]
    assert str(error) == "The migration failed."


def test_what_is_not_known_is_left_out() -> None:
    assert VirtgridError("it happened").lines() == ["error: it happened  [VG-FAILED]"]
