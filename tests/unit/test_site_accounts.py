"""Whose account a job gets at a site: the same name elsewhere is another person's."""

from __future__ import annotations

import pytest

from virtgrid.core.errors import RefusedError
from virtgrid.grid.crm.site import account_of
from virtgrid.grid.messages.job import Muster

GRC = "virtgrid://beta/grc/main"
ACCOUNTS = {"virtgrid://gamma/user/mary": "guest07", "ann": "guest08"}


def muster(user: str, who: str | None) -> Muster:
    return Muster(key="key-000001", user=user, tag=1000, prefix=24, who=who)


@pytest.mark.parametrize(
    ("owner", "user", "who", "account"),
    [
        ("uid:0", "kenji", None, "kenji"),
        ("uid:0", "ann", None, "guest08"),
        (GRC, "kenji", "virtgrid://alpha/user/kenji", "kenji"),
        (GRC, "ann", "virtgrid://alpha/user/ann", "guest08"),
        (GRC, "mary", "virtgrid://gamma/user/mary", "guest07"),
    ],
)
def test_a_user_has_their_own_account_or_the_one_that_was_named(
    owner: str, user: str, who: str | None, account: str
) -> None:
    assert account_of(muster(user, who), owner=owner, site="alpha", accounts=ACCOUNTS) == account


@pytest.mark.parametrize(
    ("owner", "who", "words"),
    [
        (GRC, "virtgrid://gamma/user/kenji", "is of another site and has no account at alpha"),
        (GRC, "virtgrid://alpha/crm/kenji", "is of another site and has no account at alpha"),
        (GRC, None, "does not say who its user kenji is"),
        (GRC, "kenji", "is nobody of the grid"),
    ],
)
def test_nobody_has_the_account_of_a_namesake(owner: str, who: str | None, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        account_of(muster("kenji", who), owner=owner, site="alpha", accounts=ACCOUNTS)
