"""Capture files are read in pieces: where a piece ends is nobody's business."""

from __future__ import annotations

import contextlib
import io
import os
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest

from virtgrid.core.mapped import mapped
from virtgrid.tracker import pcap as pcap_module
from virtgrid.tracker.pcap import Frame, read_blocks, read_frames

ORDERS = {"<": "little", ">": "big"}


def frames(count: int = 40) -> list[Frame]:
    rng = Random(5)
    return [Frame(1000.0 + n, 2000 + n, rng.randbytes(rng.choice([20, 60, 150, 700]))) for n in range(count)]


def pcap(rows: list[Frame], order: str, nanoseconds: bool) -> bytes:
    magic = 0xA1B23C4D if nanoseconds else 0xA1B2C3D4
    out = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, 1)
    for row in rows:
        half = 500_000_000 if nanoseconds else 500_000
        out += struct.pack(order + "IIII", int(row.at_s), half, len(row.data), row.wire_len) + row.data
    return out


def pcapng(rows: list[Frame], order: str) -> bytes:
    def block(kind: int, body: bytes) -> bytes:
        body += bytes(-len(body) % 4)
        size = len(body) + 12
        return struct.pack(order + "II", kind, size) + body + struct.pack(order + "I", size)

    def packet(row: Frame, interface: int) -> bytes:
        at = round((row.at_s + 0.5) * 1e6)
        head = struct.pack(order + "IIIII", interface, at >> 32, at & 0xFFFFFFFF, len(row.data), row.wire_len)
        return block(6, head + row.data)

    section = block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))
    interface = block(1, struct.pack(order + "HHI", 1, 0, 0))
    half = len(rows) // 2
    out = section + interface
    for number, row in enumerate(rows[:half]):
        # In between, what is no packet, and a packet of an interface that nobody described.
        out += packet(row, 0) + (block(5, bytes(8)) if number % 3 == 0 else b"")
        out += packet(row, 9) if number % 5 == 0 else b""
    out += section + interface + interface
    return out + b"".join(packet(row, number & 1) for number, row in enumerate(rows[half:]))


FILES = {
    f"{kind} {name}": maker
    for order, name in ORDERS.items()
    for kind, maker in {
        "pcap": pcap(frames(), order, nanoseconds=False),
        "pcap in nanoseconds": pcap(frames(), order, nanoseconds=True),
        "pcapng": pcapng(frames(), order),
    }.items()
}


@pytest.fixture(params=sorted(FILES))
def data(request: pytest.FixtureRequest) -> bytes:
    return FILES[request.param]


@pytest.mark.parametrize("piece", [64, 300, 1000, 1 << 20])
def test_every_frame_is_read_however_large_the_pieces_are(
    data: bytes, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtgrid.tracker.pcap._PIECE_BYTES", piece)
    expected = [Frame(row.at_s + 0.5, row.wire_len, row.data) for row in frames()]
    assert list(read_frames(io.BytesIO(data), "x")) == expected


@pytest.fixture
def on_disk(data: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "x.pcap"
    path.write_bytes(data)
    with path.open("rb") as file:
        if mapped(file) is None:
            pytest.skip("the file system gives no leases: files are read")
    return path


@pytest.mark.parametrize("piece", [64, 300, 1000, 1 << 20])
def test_a_file_that_is_mapped_reads_the_same(
    on_disk: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtgrid.tracker.pcap._PIECE_BYTES", piece)
    with on_disk.open("rb") as file, io.BytesIO(on_disk.read_bytes()) as same:
        assert list(read_frames(file, "x")) == list(read_frames(same, "x"))


def test_a_file_that_somebody_waits_to_change_is_read_on(
    on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtgrid.tracker.pcap._PIECE_BYTES", 4000)
    with io.BytesIO(on_disk.read_bytes()) as same, on_disk.open("rb") as file:
        expected = list(read_frames(same, "x"))
        frames = read_frames(file, "x")
        found = [next(frames)]
        with pytest.raises(BlockingIOError):  # kept away, for now
            _open_to_write(on_disk)
        for frame in frames:
            found.append(frame)
            with contextlib.suppress(BlockingIOError):
                _open_to_write(on_disk)
                break
        assert len(found) < len(expected), "it was let in while there was more to read"
        assert found + list(frames) == expected


def _open_to_write(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def test_a_file_that_is_being_written_is_not_mapped(on_disk: Path) -> None:
    with on_disk.open("ab"), on_disk.open("rb") as file:
        assert mapped(file) is None
        assert list(read_frames(file, "x"))


def test_what_is_no_file_is_read() -> None:
    with io.BytesIO(b"abc") as file:
        assert mapped(file) is None
    read_end, write_end = os.pipe()
    os.close(write_end)
    with os.fdopen(read_end, "rb") as file:
        assert mapped(file) is None


def test_a_torn_file_is_read_as_far_as_it_is_whole(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtgrid.tracker.pcap._PIECE_BYTES", 400)
    whole = list(read_frames(io.BytesIO(data), "x"))
    counts = []
    for end in range(28, len(data), 37):
        found = list(read_frames(io.BytesIO(data[:end]), "x"))
        assert found == whole[: len(found)]
        counts.append(len(found))
    assert counts == sorted(counts)
    assert counts[-1] >= len(whole) - 1


def test_what_stands_before_a_damaged_record_is_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtgrid.tracker.pcap._PIECE_BYTES", 1000)
    good = pcap(frames(), "<", nanoseconds=False)
    said: list[str] = []
    found = list(read_frames(io.BytesIO(good + b"\xff" * 16), "x", said.append))
    assert len(found) == len(frames())
    assert said == ["x is damaged, only what comes before was read: a frame of 4294967295 bytes"]


def test_memory_does_not_grow_with_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtgrid.tracker.pcap._PIECE_BYTES", 4096)
    data = pcap(frames(2000), "<", nanoseconds=False)
    blocks = [(len(block.buffer), len(block)) for block in read_blocks(io.BytesIO(data), "x")]
    assert {size for size, _ in blocks} == {4096}
    assert sum(count for _, count in blocks) == 2000


@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize("decoys", [False, True])
def test_records_are_found_from_many_places_at_once(
    order: str, decoys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a frame's bytes look like a record's beginning, and where the time's high bytes change."""
    rng = Random(7)
    rows = []
    for number in range(3000):
        data = rng.randbytes(rng.choice([60, 100, 600]))
        if decoys and not rng.randrange(20):
            data = struct.pack(order + "IIII", 1000 + number // 4, 5, 60, 60) * 3 + data
        rows.append(Frame(1000.5 + number // 4, 2000, data))
    tried: list[bool] = []

    def lanes(*given: Any) -> Any:
        found = along(*given)
        tried.append(found is not None)
        return found

    along = pcap_module._lanes
    monkeypatch.setattr(pcap_module, "_lanes", lanes)
    monkeypatch.setattr(pcap_module, "_LANE_BYTES", 1000)
    monkeypatch.setattr(pcap_module, "_PIECE_BYTES", 20_000)
    file = io.BytesIO(pcap([row._replace(at_s=row.at_s - 0.5) for row in rows], order, nanoseconds=False))
    assert list(read_frames(file, "x")) == rows
    assert any(tried)
    assert all(tried) or decoys or tried.count(False) < 5
