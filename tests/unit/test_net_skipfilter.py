"""The eBPF filter drops what lies inside a skipped range and nothing else that matters (interpreted)."""

from __future__ import annotations

import platform
import struct
import sys

import pytest
from ebpf_machine import run
from hypothesis import example, given
from hypothesis import strategies as st
from test_tracker_capture_filter import run as classic
from tracker_wire import Talk, get

from virtgrid.net import ebpf, skipfilter
from virtgrid.tracker.decode import ACK, FIN, RST, SYN, decode
from virtgrid.tracker.tracker import Tracker

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the interpreter is for little-endian code")

MASK = 0xFFFFFFFF
V4, V6 = 7, 9
PROGRAM = b"".join(one.encoded() for one in skipfilter.skip_program(V4, V6))
DROP = 0
ADDRESSES = [("10.0.0.9", "10.0.0.1"), ("2001:db8::9", "2001:db8::1")]


def maps(key: bytes = b"", begin: int = 0, end: int = 0) -> dict[int, dict[bytes, bytearray]]:
    value = bytearray(struct.pack("<III", begin, end, begin))
    return {V4: {key: value} if len(key) == 12 else {}, V6: {key: value} if len(key) == 36 else {}}


def frame(
    pair: tuple[str, str],
    seq: int,
    length: int,
    flags: int = ACK,
    *,
    offload: bool = False,
    last: bytes = b"",
) -> bytes:
    talk = Talk(Tracker(), client=pair[0], server=pair[1], offload=offload)
    return talk.frame(False, seq, 1, flags, (b"x" * length)[: length - len(last)] + last)[0]


def key_of(one: bytes) -> bytes:
    segment = decode(one, len(one))
    assert segment is not None
    return segment.key


# -- the assembler -------------------------------------------------------------------------


def test_instructions_are_encoded_as_the_kernel_documents_them() -> None:
    a = ebpf.Assembler()
    a.copy(ebpf.R6, ebpf.R1)
    a.load_packet(2, 12)
    a.if_not_equal(ebpf.R0, 0x0800, "end")
    a.set_map(ebpf.R1, 5)
    a.add(ebpf.R2, -40)
    a.store(4, ebpf.R0, 8, ebpf.R9)
    a.if_above32(ebpf.R3, ebpf.R2, "end")
    a.call(1)
    a.label("end")
    a.set(ebpf.R0, 0)
    a.exit()
    assert b"".join(one.encoded() for one in a.program()).hex(" ", 8).split() == [
        "bf16000000000000",
        "280000000c000000",
        "5500060000080000",
        "1811000005000000",
        "0000000000000000",
        "07020000d8ffffff",
        "6390080000000000",
        "2e23010000000000",
        "8500000001000000",
        "b700000000000000",
        "9500000000000000",
    ]


def test_a_jump_to_nowhere_is_an_error_when_it_is_assembled() -> None:
    a = ebpf.Assembler()
    a.go("nowhere")
    with pytest.raises(KeyError):
        a.program()


def test_every_jump_of_the_filter_stays_inside_it() -> None:
    program = skipfilter.skip_program(V4, V6)
    for at, one in enumerate(program):
        if one.code & 7 in (5, 6) and one.code not in (0x85, 0x95):
            assert 0 <= at + 1 + one.offset < len(program)


# -- what it drops -------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ADDRESSES)
@given(
    begin=st.integers(0, MASK),
    size=st.integers(1, 1 << 30),
    at=st.integers(-(1 << 30), 1 << 30),
    near=st.sampled_from(["begin", "end"]),
    length=st.integers(1, 3000),
    flags=st.sampled_from([ACK, ACK | 8, ACK | FIN, RST, ACK | RST, SYN, SYN | ACK]),
    offload=st.booleans(),
)
@example(begin=MASK - 99, size=200, at=-100, near="end", length=100, flags=ACK, offload=False)
@example(begin=MASK - 99, size=200, at=-99, near="end", length=100, flags=ACK, offload=False)
@example(begin=0, size=1 << 30, at=0, near="begin", length=1, flags=ACK, offload=True)
def test_a_segment_is_dropped_when_it_ends_inside_the_range_and_brings_no_flag(
    pair: tuple[str, str], begin: int, size: int, at: int, near: str, length: int, flags: int, offload: bool
) -> None:
    start = (begin + at + (size if near == "end" else 0)) & MASK
    one = frame(pair, start, length, flags, offload=offload)
    end = (begin + size) & MASK
    entries = maps(key_of(one), begin, end)
    # A model in whole numbers: where the segment ends, counted from the range's beginning.
    ends_at = (at if near == "begin" else at + size) + length
    inside = 0 <= ends_at <= size and not flags & (SYN | FIN | RST)
    assert (run(PROGRAM, one, entries) == DROP) == inside
    (value,) = entries[V4 if len(key_of(one)) == 12 else V6].values()
    reached = struct.unpack("<III", value)
    assert reached == (begin, end, (start + length) & MASK if inside else begin)


@pytest.mark.parametrize("pair", ADDRESSES)
def test_the_other_direction_and_other_connections_are_not_skipped(pair: tuple[str, str]) -> None:
    talk = Talk(Tracker(), client=pair[0], server=pair[1])
    one = talk.frame(False, 1000, 1, ACK, b"x" * 100)[0]
    entries = maps(key_of(one), 1000, 5000)
    assert run(PROGRAM, one, entries) == DROP
    assert run(PROGRAM, talk.frame(True, 1000, 1, ACK, b"x" * 100)[0], entries)
    talk.client_port += 1
    assert run(PROGRAM, talk.frame(False, 1000, 1, ACK, b"x" * 100)[0], entries)


# -- the classic one beside it -------------------------------------------------------------


def _frames() -> st.SearchStrategy[bytes]:
    made = st.builds(
        lambda pair, length, flags, offload, vlan, last: Talk(
            Tracker(), client=pair[0], server=pair[1], offload=offload, vlan=vlan
        ).frame(True, 1, 1, flags, b"x" * length + last)[0],
        st.sampled_from(ADDRESSES),
        st.sampled_from([0, 1, 100, 1448, 1840, 1841, 5000]),
        st.sampled_from([ACK, SYN, FIN | ACK, RST]),
        st.booleans(),
        st.sampled_from([None, 7]),
        st.sampled_from([b"", b"\r\n0\r\n\r\n", b"\n0\r\n\r\n", get()]),
    )

    def spoilt(data: bytes, changes: list[tuple[int, int]], cut: int | None) -> bytes:
        out = bytearray(data)
        for place, value in changes:
            if place < len(out):
                out[place] = value
        return bytes(out[:cut])

    return st.builds(
        spoilt,
        made,
        st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=2),
        st.none() | st.integers(14, 80),
    )


@given(one=_frames())
def test_with_nothing_to_skip_it_keeps_what_the_classic_filter_keeps(one: bytes) -> None:
    ours, theirs = run(PROGRAM, one, maps()), classic(one)
    segment = decode(one, len(one))
    if segment is None or (one[14] & 0x0F != 5 and one[12:14] == b"\x08\x00"):
        # Not TCP as the decoder reads it, or IPv4 options: kept or dropped, nobody is hurt.
        return
    if segment.length or segment.flags & (SYN | FIN | RST):
        assert ours
    # The classic one takes an IP length of 0 for payload without looking.
    if ours or (one[16:18] != b"\0\0" and one[18:20] != b"\0\0"):
        assert ours == theirs


def test_other_protocols_are_dropped_but_for_those_that_tell_addresses() -> None:
    one = frame(ADDRESSES[0], 1, 1)
    assert run(PROGRAM, bytes(12) + b"\x08\x06" + bytes(28), maps())
    assert run(PROGRAM, bytes(12) + b"\x88\xcc" + bytes(28), maps()) == DROP
    assert run(PROGRAM, one[:23] + b"\x11" + one[24:], maps()) == DROP
    assert run(PROGRAM, one[:20] + b"\x20\x10" + one[22:], maps()) == DROP
    assert run(PROGRAM, one[:20], maps()) == DROP
    options = one[:14] + b"\x46" + one[15:]
    assert run(PROGRAM, options, maps())
    solicitation = bytes(12) + b"\x86\xdd" + bytes([0x60, 0, 0, 0, 0, 8, 58, 255]) + bytes(40)
    assert run(PROGRAM, solicitation, maps())


def test_a_machine_whose_number_is_not_known_is_refused_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    with pytest.raises(OSError, match="vax"):
        skipfilter.SkipFilter()
