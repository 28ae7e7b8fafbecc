"""What a network manager has promised, for tests of what becomes of it."""

from __future__ import annotations

import time
from typing import Any

from virtgrid.grid.coalloc.provider import Record
from virtgrid.grid.messages.coalloc import Grant, HoldState, Standing, Window
from virtgrid.grid.messages.coalloc import Path as Way


def standing(key: str = "key-of-a-hold", *, rate: int | None = 1_398_000, **grant: Any) -> Standing:
    """A committed hold of segment 1000 between the sites a and b, in its window."""
    paths = () if rate is None else (Way(between=("a", "b"), rate_bytes_s=rate),)
    now_s = int(time.time())
    record = Record(
        key=key,
        print="",
        owner="uid:1",
        reservation="render",
        window=Window(begins_at_s=now_s - 10, ends_at_s=now_s + 1000),
        expires_at_s=now_s,
        state=HoldState.COMMITTED,
        grant=Grant(**{"segment": 1000, "sites": ("a", "b"), "paths": paths, **grant}),
    )
    return record.standing(now_s)
