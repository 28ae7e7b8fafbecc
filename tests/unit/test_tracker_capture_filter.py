"""The kernel's filter keeps what the tracker needs and drops what says nothing (interpreted here)."""

from __future__ import annotations

import pytest
from tracker_wire import Talk, get

from virtgrid.net.addresses import parse_mac, sender_address
from virtgrid.net.filters import tcp_filter
from virtgrid.tracker.decode import ACK, FIN, RST, SYN
from virtgrid.tracker.tracker import Tracker

DROP = 0


def run(frame: bytes) -> int:
    """Classic BPF as the kernel runs it, for the instructions we use; a load out of bounds drops."""
    program = tcp_filter()
    a = x = at = 0
    memory = [0] * 16

    def load(offset: int, size: int) -> int:
        if offset < 0 or offset + size > len(frame):
            raise IndexError
        return int.from_bytes(frame[offset : offset + size], "big")

    try:
        while True:
            code, yes, no, k = program[at]
            at += 1
            match code:
                case 0x28 | 0x30:
                    a = load(k, 2 if code == 0x28 else 1)
                case 0x50:
                    a = load(x + k, 1)
                case 0x60:
                    a = memory[k]
                case 0x02:
                    memory[k] = a
                case 0xB1:
                    x = 4 * (load(k, 1) & 15)
                case 0x07:
                    x = a
                case 0x1C:
                    a = (a - x) & 0xFFFFFFFF
                case 0x54:
                    a &= k
                case 0x74:
                    a >>= k
                case 0x15:
                    at += yes if a == k else no
                case 0x45:
                    at += yes if a & k else no
                case 0x06:
                    return k
                case _:
                    raise AssertionError(f"instruction {code:#x}")
    except IndexError:
        return DROP


ADDRESSES = [("10.0.0.9", "10.0.0.1"), ("2001:db8::9", "2001:db8::1")]


@pytest.mark.parametrize("addresses", ADDRESSES)
def test_pure_acknowledgements_are_dropped_and_all_else_of_tcp_is_kept(addresses: tuple[str, str]) -> None:
    talk = Talk(Tracker(), client=addresses[0], server=addresses[1])
    assert run(talk.frame(True, 1, 1, ACK, b"")[0]) == DROP
    for flags in (SYN, SYN | ACK, FIN | ACK, RST, RST | ACK):
        assert run(talk.frame(True, 1, 1, flags, b"")[0])
    assert run(talk.frame(True, 1, 1, ACK, b"x")[0])
    assert run(talk.frame(True, 1, 1, ACK, get())[0])


@pytest.mark.parametrize("addresses", ADDRESSES)
def test_padding_is_not_payload(addresses: tuple[str, str]) -> None:
    talk = Talk(Tracker(), client=addresses[0], server=addresses[1])
    assert run(talk.frame(True, 1, 1, ACK, b"")[0] + bytes(6)) == DROP


@pytest.mark.parametrize("addresses", ADDRESSES)
def test_offloaded_and_tagged_frames_are_kept(addresses: tuple[str, str]) -> None:
    for kind in ({"offload": True}, {"vlan": 7}):
        talk = Talk(Tracker(), client=addresses[0], server=addresses[1], **kind)  # type: ignore[arg-type]
        assert run(talk.frame(True, 1, 1, ACK, b"x" * 100)[0])


def test_other_protocols_are_dropped_but_for_those_that_tell_addresses() -> None:
    frame = Talk(Tracker()).frame(True, 1, 1, ACK, b"x")[0]
    udp = frame[:23] + b"\x11" + frame[24:]
    assert run(udp) == DROP
    assert run(bytes(12) + b"\x08\x06" + bytes(28))
    assert run(bytes(12) + b"\x88\xcc" + bytes(28)) == DROP
    assert run(frame[:20]) == DROP
    fragment = frame[:20] + b"\x20\x10" + frame[22:]
    assert run(fragment) == DROP


def test_the_senders_address_is_read_from_arp_and_ip() -> None:
    arp = bytes(12) + bytes.fromhex("0806 0001 0800 0604 0001") + b"\2" * 6 + bytes([10, 0, 0, 7]) + bytes(10)
    assert sender_address(arp) == "10.0.0.7"
    assert sender_address(Talk(Tracker()).frame(True, 1, 1, ACK, b"x")[0]) == "10.0.0.9"
    six = Talk(Tracker(), client="2001:db8::9", server="2001:db8::1").frame(True, 1, 1, ACK, b"x")[0]
    assert sender_address(six) == "2001:db8::9"
    assert sender_address(arp[:30]) is None
    probe = arp[:28] + bytes(4) + arp[32:]
    assert sender_address(probe) is None


def test_a_malformed_hardware_address_is_refused() -> None:
    assert parse_mac("52:54:00:00:00:01") == b"\x52\x54\0\0\0\1"
    for text in ("", "52:54", "52:54:00:00:00:0g", "5254.0000.0001", "52:54:00:00:00:1"):
        with pytest.raises(ValueError):  # noqa: PT011
            parse_mac(text)
