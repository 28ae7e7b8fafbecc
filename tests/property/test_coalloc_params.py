"""Whatever parameters come over the wire: a model, or one sentence; never another exception."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtgrid.grid.messages.coalloc import COORDINATOR_PARAMS, PROVIDER_PARAMS
from virtgrid.grid.messages.common import Model, parse
from virtgrid.wire.message import BadMessageError

WORDS = (
    "key",
    "id",
    "reservation",
    "window",
    "begins_at_s",
    "ends_at_s",
    "ttl_s",
    "asked_at_s",
    "wanted",
    "kind",
    "nodes",
    "paths",
    "addresses",
    "sites",
    "site",
    "between",
    "rate_bytes_s",
    "segment",
    "near_s",
    "lasts_s",
    "prefix",
    "spread",
    "bandwidth_bytes_s",
    "after",
)
TEXTS = (
    "nodes",
    "paths",
    "alpha",
    "beta",
    "key-000001",
    "10.1.0.0/28",
    "0.0.0.0/0",
    "10.1.0.0/32",
    "::/0",
    "\ud800",
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**54)
    | st.sampled_from((0, 1, 2, 20, 30, 600, 1000, 2000))
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(TEXTS)
    | st.text(max_size=70),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=6),
    max_leaves=20,
)


@pytest.mark.parametrize(("method", "model"), sorted({**PROVIDER_PARAMS, **COORDINATOR_PARAMS}.items()))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(params=st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=8))
def test_any_parameters_are_a_model_or_one_sentence(
    method: str, model: type[Model], params: dict[str, Any]
) -> None:
    said = ""
    try:
        parse(model, method, params)
    except BadMessageError as error:
        said = error.fault.message
    assert not said or said.startswith(f"{method}: ")
    assert "\n" not in said
    assert len(said) < 1000
