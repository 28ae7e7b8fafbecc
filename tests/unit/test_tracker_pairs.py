"""Segments by connection: hashed as columns it is what looking up one after the other finds."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from virtgrid.tracker import pairs as pairs_module
from virtgrid.tracker.pairs import Pairs, pairs_of


def _keys(rng: Random, hosts: int, count: int) -> list[bytes]:
    ends = [(rng.randbytes(4), rng.randbytes(2)) for _ in range(hosts)]
    found = []
    for _ in range(count):
        (one, port), (other, to) = rng.choice(ends), rng.choice(ends)
        found.append(one + other + port + to)
    return found


def _grouped(found: Pairs) -> dict[bytes, tuple[list[int], list[bool]]]:
    """By the key of a connection's first segment: which segments, and which of them go against it."""
    assert found.ordered.tolist() == sorted(found.ordered.tolist())
    out = {}
    for number, (key, reverse) in enumerate(found.keys):
        where = np.flatnonzero(found.ordered == number)
        assert len(where)
        assert reverse == key[4:8] + key[:4] + key[10:] + key[8:10]
        out[key] = (found.order[where].tolist(), found.second[where].tolist())
    return out


@pytest.mark.parametrize("hosts", [1, 2, 5, 300])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 4000])
def test_columns_and_dictionary_agree(hosts: int, count: int) -> None:
    keys = _keys(Random(hosts * count), hosts, count)
    records = np.array(keys, "V12")
    assert pairs_module._by_hash(records) is not None
    assert _grouped(pairs_of(records)) == _grouped(pairs_of(keys))


def test_equal_hashes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = _keys(Random(4), 20, 500)
    for name in ("_MIX_LOW", "_MIX_HIGH"):
        monkeypatch.setattr(pairs_module, name, np.uint64(0))
    records = np.array(keys, "V12")
    assert pairs_module._by_hash(records) is None
    assert _grouped(pairs_of(records)) == _grouped(pairs_of(keys))


def test_nothing_is_nobody() -> None:
    assert pairs_of([]).keys == []
    assert pairs_of(np.empty(0, "V12")).keys == []
