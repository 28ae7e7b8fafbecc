"""Whatever QEMU or libvirt says is understood, or is an error of ours; never a traceback."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtgrid.core.errors import VirtgridError
from virtgrid.virt import domxml
from virtgrid.virt.jobstats import parse_block_jobs, parse_migration

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
RAM_KEYS = (
    "remaining", "total", "transferred", "dirty-pages-rate", "page-size", "mbps", "dirty-sync-count",
    "normal-bytes",
)  # fmt: skip
JOB_KEYS = ("type", "device", "offset", "len", "ready", "status")


def some(keys: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=dict.fromkeys(keys, JSON))


MIGRATION = st.fixed_dictionaries(
    {},
    optional={
        "status": JSON, "ram": some(RAM_KEYS) | JSON, "total-time": JSON, "downtime": JSON,
        "error-desc": JSON,
    },
)  # fmt: skip


@given(MIGRATION)
@settings(max_examples=400)
def test_any_answer_to_query_migrate_is_parsed_or_an_error_of_ours(answer: dict[str, Any]) -> None:
    with contextlib.suppress(VirtgridError):
        parse_migration(answer)


@given(st.lists(some(JOB_KEYS) | st.just({"type": "mirror"}), max_size=4))
@settings(max_examples=200)
def test_any_answer_to_query_block_jobs_is_parsed_or_an_error_of_ours(answer: list[dict[str, Any]]) -> None:
    with contextlib.suppress(VirtgridError):
        parse_block_jobs(answer)


ANSWERS = st.one_of(JSON, st.lists(JSON, max_size=3))


@given(ANSWERS)
def test_an_answer_of_another_shape_is_an_error_of_ours(answer: Any) -> None:
    for parse in (parse_migration, parse_block_jobs):
        with contextlib.suppress(VirtgridError):
            parse(answer)


TAGS = st.sampled_from(
    ["domain", "name", "uuid", "memory", "cpu", "os", "type", "devices", "disk", "interface", "source",
     "target", "driver", "alias", "mac", "backingStore", "format", "hostdev", "emulator", "readonly"]
)  # fmt: skip
ATTRIBUTES = st.dictionaries(
    st.sampled_from(["type", "dev", "file", "name", "unit", "mode", "address", "device", "machine", "arch"]),
    st.sampled_from(["", "file", "vda", "KiB", "parsec", "qcow2", "custom", "52:54:00:AA:BB:CC"]),
    max_size=3,
)
TEXTS = st.sampled_from(["", "web1", "17", "-3", "1e9", "many", "１２"])
ELEMENTS = st.recursive(
    st.tuples(TAGS, ATTRIBUTES, TEXTS, st.just([])),
    lambda inner: st.tuples(TAGS, ATTRIBUTES, TEXTS, st.lists(inner, max_size=4)),
    max_leaves=12,
)


def xml_of(element: tuple[str, dict[str, str], str, list[Any]]) -> str:
    tag, attributes, text, children = element
    inside = text + "".join(map(xml_of, children))
    return f"<{tag} {' '.join(f'{k}={json.dumps(v)}' for k, v in attributes.items())}>{inside}</{tag}>"


@given(st.lists(ELEMENTS, max_size=5))
@settings(max_examples=300)
def test_any_domain_xml_is_read_or_an_error_of_ours(children: list[Any]) -> None:
    with contextlib.suppress(VirtgridError):
        domxml.parse(f"<domain>{''.join(map(xml_of, children))}</domain>")


@given(st.text(max_size=200))
@settings(max_examples=200)
def test_any_text_is_no_domain_xml(text: str) -> None:
    with pytest.raises(VirtgridError):
        domxml.parse(text)
    with contextlib.suppress(VirtgridError):
        domxml.volume_format(text)
