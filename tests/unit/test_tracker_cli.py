"""`virtgrid track --read` and `virtgrid protocol`: what is printed, and one sentence for bad input."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from tracker_wire import Talk, get, response

from virtgrid.cli import protocol
from virtgrid.cli.track import track
from virtgrid.tracker.pcap import read_frames
from virtgrid.tracker.tracker import Tracker

KEYS = [
    "client", "server", "protocol", "requests", "responses", "state", "suitable", "reason",
    "large_transfers", "gaps", "bytes_to_client", "bytes_to_server",
]  # fmt: skip


def pcap(frames: list[tuple[bytes, int]], order: str = "<") -> bytes:
    out = struct.pack(order + "IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
    for number, (data, length) in enumerate(frames):
        out += struct.pack(order + "IIII", 1000, 500_000 + number * 10_000, len(data), length) + data
    return out


def pcapng(frames: list[tuple[bytes, int]]) -> bytes:
    def block(kind: int, body: bytes) -> bytes:
        body += bytes(-len(body) % 4)
        size = len(body) + 12
        return struct.pack("<II", kind, size) + body + struct.pack("<I", size)

    out = block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    out += block(1, struct.pack("<HHI", 1, 0, 0) + struct.pack("<HHB3x", 9, 1, 9) + struct.pack("<HH", 0, 0))
    for number, (data, length) in enumerate(frames):
        at = round((1000.5 + number / 100) * 1e9)
        out += block(6, struct.pack("<IIIII", 0, at >> 32, at & 0xFFFFFFFF, len(data), length) + data)
    return out


def frames() -> list[tuple[bytes, int]]:
    tracker = Tracker()
    waiting = Talk(tracker).open().ask(get("/waiting"))
    over = Talk(tracker, client_port=40023).open().ask(get()).answer(response(3) + b"abc")
    over.fin(to_server=False).fin(to_server=True)
    return waiting.sent + over.sent


@pytest.fixture(params=["little", "big", "pcapng"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "x.pcap"
    makers = {"little": pcap, "big": lambda f: pcap(f, ">"), "pcapng": pcapng}
    path.write_bytes(makers[request.param](frames()))
    return path


def test_every_format_is_read_with_its_times_and_lengths(file: Path) -> None:
    with file.open("rb") as opened:
        read = list(read_frames(opened, "x"))
    assert [(f.data, f.wire_len) for f in read] == frames()
    assert [round(f.at_s, 6) for f in read] == [round(1000.5 + n / 100, 6) for n in range(len(read))]


def test_one_object_per_connection(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track(read=file, as_json=True)
    over, waiting = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert list(over) == KEYS
    assert (over["state"], over["suitable"], over["requests"], over["responses"]) == ("closed", True, 1, 1)
    assert (waiting["suitable"], waiting["reason"]) == (False, "waiting for the response to GET /waiting")
    assert waiting["client"] == "10.0.0.9:40022"


def test_the_timeline_has_every_change(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track(read=file, as_json=True, timeline=True)
    over = json.loads(capsys.readouterr().out.splitlines()[0])
    assert [c["verdict"] for c in over["timeline"]] == ["unsuitable", "suitable", "closed"]


def test_people_get_a_table(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track(read=file, timeline=True)
    protocol.replay_(file)
    text = capsys.readouterr().out
    assert text.count("waiting for the response to GET /waiting") == 2
    assert "0.000 s  unsuitable" in text


def test_a_torn_file_is_read_as_far_as_it_goes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = file.read_bytes()
    for size in range(28, len(whole), 7):
        file.write_bytes(whole[:size])
        track(read=file, as_json=True)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("content", "status"), [(b"not a capture at all", 3), (b"", 3), (b"\xd4\xc3\xb2\xa1", 3), (None, 4)]
)
def test_what_is_no_capture_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, status: int
) -> None:
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        track(read=path)
    assert caught.value.code == status
    assert capsys.readouterr().err.startswith("error: ")


def test_nothing_to_read_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as caught:
        track()
    assert caught.value.code == 2


def test_definitions_are_listed_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    protocol.list_(as_json=True)
    names = [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()]
    assert names == ["ftp", "http", "imap", "pop3", "smtp"]
    path = tmp_path / "bad.pdl"
    path.write_text("protocol bad\nport x\n")
    with pytest.raises(SystemExit) as caught:
        protocol.check(path)
    assert caught.value.code == 3
    assert f"{path}:2: 'x' is not a TCP port" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["known", "keep"])
def test_a_state_or_a_directory_that_is_not_there_is_said_before_anybody_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        track("web1", **{option: tmp_path / "none" / "state.json"})  # type: ignore[arg-type]
    assert caught.value.code == 4
    assert "none" in capsys.readouterr().err


def test_a_state_goes_with_a_running_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        track(read=tmp_path / "x.pcap", keep=tmp_path / "y")
    assert caught.value.code == 2
    assert "--export goes with a running domain, not with --read" in capsys.readouterr().err
