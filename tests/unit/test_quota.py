"""What one user may have at a time: counted as it is said, and told in the refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
from grid_parts import soon, wish
from hypothesis import given
from hypothesis import strategies as st

from virtgrid.config import Config
from virtgrid.core.errors import RefusedError
from virtgrid.grid.coalloc.quota import Limits, Use, most, require_within, use_of
from virtgrid.grid.grc.ledger import EVERYBODY, Ledger, Quotas, quotas_of
from virtgrid.grid.messages.coalloc import SiteWish

KENJI, MARY = "virtgrid://a/user/kenji", "virtgrid://a/user/mary"


def use(begins: int, ends: int, nodes: int = 1, rate: int = 0) -> Use:
    return Use(begins_at_s=begins, ends_at_s=ends, nodes=nodes, rate_bytes_s=rate)


def test_what_a_reservation_takes_is_summed_over_its_sites_and_paths() -> None:
    sites = tuple(SiteWish(site=name, nodes=2) for name in ("a", "b", "c"))
    window = soon(1, 1)
    found = use_of(wish(sites=sites, bandwidth_bytes_s=10, window=window))
    assert (found.nodes, found.rate_bytes_s) == (6, 30)
    assert found.node_time_s(window.begins_at_s - 5) == 6 * 3600
    assert found.node_time_s(window.begins_at_s + 3000) == 6 * 600
    assert found.node_time_s(window.ends_at_s + 5) == 0


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"reservations": 2}, "kenji has 2 reservations open, and 2 may be"),
        ({"node_time_s": 12_599}, "would have 3h30m of node time ahead, and 3h29m are allowed"),
        (
            {"bandwidth_bytes_s": 29},
            r"would have 0.00024 Mbit/s at 1970-01-01T01:00:00Z, and 0.000232 Mbit/s",
        ),
    ],
)
def test_one_too_many_is_refused_with_the_limit_and_where_it_is_said(
    limits: dict[str, int], words: str
) -> None:
    before = [use(0, 7200, rate=10), use(3600, 7200, rate=10)]
    more = use(1800, 5400, rate=10)
    exactly = {key: value + 1 for key, value in limits.items()}
    require_within(Limits(**exactly), before, more, who="kenji", now_s=1800)
    with pytest.raises(RefusedError, match=words) as refused:
        require_within(Limits(**limits, said="/x.toml"), before, more, who="kenji", now_s=1800)
    assert (refused.value.hint or "").endswith("of [quota] in /x.toml")


uses = st.builds(
    lambda begins, lasts, rate: use(begins, begins + lasts, rate=rate),
    st.integers(0, 30),
    st.integers(1, 20),
    st.integers(0, 5),
)


@given(st.lists(uses, max_size=8), uses)
def test_the_most_at_any_moment_is_what_looking_at_every_moment_finds(before: list[Use], more: Use) -> None:
    def at(moment: int) -> int:
        return sum(one.rate_bytes_s for one in before if one.begins_at_s <= moment < one.ends_at_s)

    found, when_s = most(before, more)
    moments = range(more.begins_at_s, more.ends_at_s)
    assert found == max(map(at, moments)) + more.rate_bytes_s
    assert when_s in moments
    assert at(when_s) + more.rate_bytes_s == found


def test_what_is_given_back_can_be_had_again_and_root_has_no_limits() -> None:
    ledger = Ledger(Quotas(everybodys=Limits(reservations=1), of={MARY: Limits(reservations=2)}))
    now_s = soon().begins_at_s - 60
    assert ledger.charge(KENJI, wish("one"), now_s=now_s)
    assert not ledger.charge(KENJI, wish("one"), now_s=now_s)
    with pytest.raises(RefusedError, match="1 reservation open"):
        ledger.charge(KENJI, wish("two"), now_s=now_s)
    for id_ in ("three", "four"):
        assert ledger.charge(MARY, wish(id_), now_s=now_s)
    for number in range(9):
        assert ledger.charge(EVERYBODY, wish(f"r{number}"), now_s=now_s)
    assert ledger.at("alpha") == 12
    ledger.give_back(KENJI, "one")
    ledger.give_back(KENJI, "one")
    assert ledger.at("alpha") == 11
    assert ledger.charge(KENJI, wish("two"), now_s=now_s)


def test_limits_are_those_of_the_configuration() -> None:
    said = {
        "reservations": 7,
        "node_time": "100h",
        "bandwidth": "1gbit",
        "of": {KENJI: {"reservations": 9, "bandwidth": "unlimited"}, "uid:1000": {"node_time": "1h"}},
    }
    quotas = quotas_of(Config.model_validate({"quota": said}).quota, Path("/x.toml"))
    assert quotas.limits(MARY) == Limits(
        reservations=7, node_time_s=360_000, bandwidth_bytes_s=125_000_000, said="/x.toml"
    )
    assert quotas.limits(KENJI) == Limits(reservations=9, node_time_s=360_000, said="/x.toml")
    assert quotas.limits("uid:1000").node_time_s == 3600
    assert quotas_of(Config().quota, None).limits(KENJI).reservations == 100


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"node_time": "many"}, "quota: 'many' is not a duration"),
        ({"bandwidth": "nan"}, "quota: 'nan' is not a rate"),
        ({"reservations": -1}, "quota: reservations: -1 is less than none"),
        ({"of": {"kenji": {}}}, "quota: 'kenji' is nobody of the grid"),
        ({"of": {KENJI: {"bandwidth": "-1mbit"}}}, "quota: '-1mbit' is not a rate"),
    ],
)
def test_limits_that_cannot_be_are_refused_by_name(said: dict[str, object], words: str) -> None:
    section = Config.model_validate({"quota": said}).quota
    with pytest.raises(RefusedError, match=f"/x.toml: {words}"):
        quotas_of(section, Path("/x.toml"))
