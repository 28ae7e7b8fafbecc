"""A sandbox's spec, its domain XML and what the hook reads from that: one thing in three shapes."""

from __future__ import annotations

import ipaddress
import itertools
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from virtgrid.core.errors import UsageError
from virtgrid.core.shipped import shipped
from virtgrid.grid.node import domain, hook, root
from virtgrid.grid.node.spec import (
    BASES,
    FIRST_BASE,
    MIB,
    SandboxLimits,
    SandboxSpec,
    base_candidates,
    id_map,
)

_NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True)
_USERS = st.from_regex(r"[a-z_][a-z0-9_-]{0,31}", fullmatch=True).filter(
    lambda name: name not in root.RESERVED_USERS
)
_ADDRESSES = st.one_of(
    st.integers(2, 254).map(lambda last: f"10.77.0.{last}/24"),
    st.integers(1, 2**64 - 1).map(lambda last: f"{ipaddress.IPv6Address((0xFD << 120) + last)}/64"),
)
_UUID = "e3bfae3d-6a48-4b49-9a2f-1c8f5b5d7a11"


@st.composite
def specs(draw: st.DrawFn) -> SandboxSpec:
    address = draw(_ADDRESSES)
    gateway = str(ipaddress.ip_interface(address).network.network_address + 1)
    return SandboxSpec(
        name=draw(_NAMES),
        user=draw(_USERS),
        account=draw(_USERS),
        address=address,
        gateway=draw(st.sampled_from([None, gateway])) if not address.startswith(f"{gateway}/") else None,
        bridge=draw(st.from_regex(r"[A-Za-z0-9_-]{1,15}", fullmatch=True)),
        mtu=draw(st.sampled_from([1500, 1450, 9000])),
        template=draw(_NAMES),
        user_namespace=draw(st.booleans()),
        limits=SandboxLimits(
            memory_bytes=draw(st.integers(64, 4096)) * MIB,
            layer_bytes=draw(st.integers(MIB, 1 << 40)),
            processes=draw(st.integers(4, 100_000)),
            cpuset=draw(st.sampled_from([None, "0", "0-3,6"])),
            walltime_s=draw(st.sampled_from([None, 1, 3600])),
        ),
    )


def _built(spec: SandboxSpec, uid: int = 1000) -> tuple[str, int]:
    account = root.Account(name=spec.host_account, uid=uid, gid=uid, home="/srv/homes/x")
    base = base_candidates(spec.name)[0] if spec.user_namespace else 0
    return domain.build(spec, account, base=base, uuid=_UUID), base


@given(specs())
def test_what_is_built_is_read_back(spec: SandboxSpec) -> None:
    text, base = _built(spec)
    made = domain.parse(text)
    assert made == domain.Made(spec=spec, uuid=_UUID, base=base, home="/srv/homes/x")
    assert SandboxSpec.from_dict(spec.as_dict()) == spec


@given(specs(), st.floats(0, 0.99))
def test_half_a_file_is_no_sandbox(spec: SandboxSpec, share: float) -> None:
    text, _ = _built(spec)
    assert domain.parse(text[: int(len(text) * share)]) is None


@given(specs())
def test_the_hook_reads_the_same_from_it(spec: SandboxSpec) -> None:
    text, base = _built(spec)
    request = hook.request_of(hook.read(text.encode()))
    assert (request.name, request.user, request.account) == (spec.name, spec.user, spec.host_account)
    assert (request.template, request.base, request.address) == (spec.template, base, spec.ip)
    assert (request.bridge, request.layer_bytes) == (spec.bridge, spec.limits.layer_bytes)
    assert request.parameters == domain.parameters(spec)


@given(specs())
def test_the_metadata_is_what_its_schema_says(spec: SandboxSpec) -> None:
    schema = etree.RelaxNG(etree.parse(shipped("xml-templates", "metadata-sandbox.rng")))
    ours = etree.fromstring(_built(spec)[0]).find(f"metadata/{domain.METADATA}")
    assert ours is not None
    schema.assertValid(etree.ElementTree(ours))


@pytest.mark.parametrize(
    "change",
    [
        {"user": "root"},
        {"user": "../x"},
        {"user": "a:b"},
        {"template": "a/b"},
        {"layer-bytes": "1,x=2"},
        {"extra": "1"},
    ],
)
def test_the_schema_refuses_what_the_hook_refuses(change: dict[str, str]) -> None:
    schema = etree.RelaxNG(etree.parse(shipped("xml-templates", "metadata-sandbox.rng")))
    spec = SandboxSpec(name="a", user="grid", address="10.0.0.2/24", bridge="br0")
    tree = etree.fromstring(_built(spec)[0])
    ours = tree.find(f"metadata/{domain.METADATA}")
    assert ours is not None
    ours.attrib.update(change)
    assert not schema.validate(etree.ElementTree(ours))
    with pytest.raises(root.RootError):
        hook.request_of(hook.read(etree.tostring(tree)))


@given(st.binary(max_size=400))
def test_the_hook_survives_any_bytes(text: bytes) -> None:
    try:
        facts = hook.read(text)
    except root.RootError:
        return
    assert facts.ours is None


def test_the_hook_takes_no_document_type() -> None:
    text = b'<!DOCTYPE d [<!ENTITY a "aaaa">]><domain type="lxc"><name>&a;</name></domain>'
    with pytest.raises(root.RootError, match="document type"):
        hook.read(text)


@given(st.integers(1, 4_000_000))
def test_every_id_up_to_65535_has_a_place_and_the_users_is_its_own(kept: int) -> None:
    parts = id_map(FIRST_BASE, kept)
    mapped = {}
    for first, target, count in parts:
        assert count > 0
        for inside in (first, first + count - 1):
            mapped[inside] = target + inside - first
    assert mapped[kept] == kept
    assert sum(count for _, _, count in parts) == 65536 + (kept > 65535)
    spans = sorted((target, target + count) for _, target, count in parts)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))


@given(_NAMES)
def test_ranges_of_ids_do_not_overlap_and_stay_below_2_to_the_31(name: str) -> None:
    bases = base_candidates(name)
    assert len(set(bases)) == BASES
    assert all((base - FIRST_BASE) % 65536 == 0 for base in bases)
    assert max(bases) + 65536 <= 2**31


@pytest.mark.parametrize(
    "wrong",
    [
        *({"address": one} for one in ("10.77.0.1", "10.77.0.0/24", "10.77.0.255/24", "127.0.0.1/8")),
        *({"address": one} for one in ("224.0.0.1/24", "::/64", "fe80::1%eth0/64", "300.1.1.1/24")),
        *({"address": "10.77.0.1/33"}, {"gateway": "10.78.0.1"}, {"gateway": "10.77.0.5"}),
        *({"bridge": one} for one in ("../br0", "x" * 16, "")),
        *({"mtu": 60}, {"mtu": 70000}, {"account": ""}, {"account": "a\0b"}),
    ],
)
def test_specs_that_cannot_be(wrong: dict[str, object]) -> None:
    words = {"name": "a", "user": "grid", "address": "10.77.0.5/24", "bridge": "br0", **wrong}
    with pytest.raises(UsageError):
        SandboxSpec(**words)


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_bytes": 1},
        {"layer_bytes": 0},
        {"processes": 0},
        {"walltime_s": 0},
        {"cpuset": "all"},
        {"cpuset": "1;2"},
    ],
)
def test_limits_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        SandboxLimits(**wrong)


def test_what_the_hook_loads_is_little() -> None:
    """Every module costs libvirtd's caller a fraction of a millisecond, some of them ten."""
    script = "import sys; sys.path.insert(0, sys.argv[1])\n"
    script += "from virtgrid.grid.node import hook\nprint(*sys.modules)"
    place = str(shipped("hooks", "50-virtgrid").parents[1])
    loaded = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-c", script, place], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"re", "pathlib", "dataclasses", "typing", "subprocess", "socket", "json", "asyncio", "inspect"}
    assert not heavy & set(loaded)
    assert not {name for name in loaded if name.startswith("virtgrid.")} - {
        "virtgrid.grid", "virtgrid.grid.node", "virtgrid.grid.node.hook", "virtgrid.grid.node.root",
        "virtgrid.grid.node.mounts",
    }  # fmt: skip
