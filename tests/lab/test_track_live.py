"""``virtgrid track DOMAIN`` on a real guest: its connections as they come, until it or the person goes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from migrating import Stage, until

from virtgrid.lab import guest

pytestmark = pytest.mark.lab


@contextlib.contextmanager
def tracking(stage: Stage, *options: str, reference: str | None = None) -> Iterator[subprocess.Popen[str]]:
    """The command, and once it follows, its process."""
    words = ["track", reference or stage.name, "--json", *options]
    process = subprocess.Popen(
        stage.source.argv(["env", "--default-signal=INT", str(stage.program), *words]),
        env=stage.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 30)[0], "no line within 30 s"
    text = process.stdout.readline()
    assert text, f"it ended: {process.communicate()}"
    return dict(json.loads(text))


def lines_to_the_end(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    out, _ = process.communicate(timeout=30)
    return [json.loads(text) for text in out.splitlines()]


@pytest.mark.parametrize("by", ["name", "uuid", "id"])
def test_a_guests_changes_come_as_json_lines_and_a_snapshot_at_the_end(stage: Stage, by: str) -> None:
    number = guest.virsh(stage.source, "domid", stage.name).strip()
    reference = {"name": stage.name, "uuid": stage.uuid, "id": number}[by]
    with tracking(stage, reference=reference) as process:
        began = line(process)
        assert (began["event"], began["domain"], began["uuid"]) == ("began", stage.name, stage.uuid)
        assert began["capture"] == "ebpf"
        with stage.occupied():
            change = line(process)
            assert change["event"] == "change"
            assert change["verdict"] == "unsuitable"
            assert change["server"] == f"{stage.spec.address}:80"
            # The command itself, not the one that runs it: Ctrl-C goes to all of a terminal's group.
            process.send_signal(signal.SIGINT)
            *_, last = lines_to_the_end(process)
        assert process.returncode == 0
        assert (last["event"], last["ended"], last["unsuitable"]) == ("snapshot", "ended by Ctrl-C", 1)
        (one,) = last["connections"]
        assert one["server"] == f"{stage.spec.address}:80"
        assert (one["verdict"], one["suitable"], one["state"]) == ("unsuitable", False, "busy")
        assert one["client"] == change["client"]


def test_it_ends_when_its_time_is_over_and_shows_what_was_asked_for(stage: Stage) -> None:
    with stage.occupied():
        ended = stage.virtgrid("track", stage.name, "--json", "--for", "2s", "--verdict", "suitable")
    assert ended.status == 0, ended.err
    assert ended.last["ended"] == "the time is over"
    assert ended.last["connections"] == []
    # Seen mid-stream: half a request, whose beginning was before the capture.
    assert ended.last["total"] == 1
    assert not [one for one in ended.lines if one.get("verdict") in ("unsuitable", "unknown")]


def test_plain_lines_go_to_a_pipe(stage: Stage) -> None:
    ended = stage.virtgrid("track", stage.name, "--for", "500ms")
    assert ended.status == 0, ended.err
    first, *_, counts, why = ended.out.splitlines()
    assert first.startswith(f"following {stage.name} on vnet")
    assert first.endswith(", capture ebpf")
    assert counts.startswith(f"{stage.name} on vnet")
    assert why == "the time is over"


def test_on_a_terminal_it_is_a_screen_that_q_ends(stage: Stage) -> None:
    master, slave = pty.openpty()
    words = stage.source.argv([str(stage.program), "track", stage.name])
    environment = {**stage.environment, "TERM": "xterm", "COLUMNS": "120", "LINES": "20"}
    process = subprocess.Popen(words, env=environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    text = ""

    def told(wanted: str) -> bool:
        nonlocal text
        if select.select([master], [], [], 0.05)[0]:
            with contextlib.suppress(OSError):
                text += os.read(master, 65536).decode("utf-8", "replace")
        return wanted in text

    try:
        until(lambda: told("no TCP connection seen yet"), "the empty screen")
        with stage.occupied():
            until(lambda: told("1 connection, 1 unsuitable"), "the occupied connection on the screen")
            assert f"{stage.spec.address}:80" in text
            os.write(master, b"q")
            until(lambda: told("ended by q"), "the end")
        assert process.wait(20) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(master)


def test_a_guest_that_goes_away_ends_it_with_a_sentence(stage: Stage) -> None:
    with tracking(stage) as process:
        assert line(process)["event"] == "began"
        moved_s = time.monotonic()
        stage.virsh(stage.here, "destroy", stage.name)
        *_, last = lines_to_the_end(process)
        assert process.returncode == 0
        assert time.monotonic() - moved_s < 20
        assert last["ended"].endswith(f" has gone: {stage.name} stopped or moved away")
    ended = stage.virtgrid("track", stage.name, "--json")
    assert ended.status != 0
    assert ended.last["cause"] == "the domain has no tap device"


def test_what_one_knew_at_its_end_another_begins_with(stage: Stage, tmp_path: Path) -> None:
    known = tmp_path / "known.json"
    with tracking(stage, "--export", str(known)) as process:
        assert line(process)["event"] == "began"
        with stage.occupied():
            assert line(process)["verdict"] == "unsuitable"
            process.send_signal(signal.SIGINT)
            *_, last = lines_to_the_end(process)
            assert known.stat().st_mode & 0o777 == 0o600
            ended = stage.virtgrid("track", stage.name, "--json", "--for", "200ms", "--import", str(known))
    (before,), (after,) = last["connections"], ended.last["connections"]
    assert (after["client"], after["protocol"], after["verdict"]) == (before["client"], "http", "unknown")
    # The client goes on with its request, a byte at a time: it may have been seen to have moved on.
    assert "nobody" in after["reason"]
    assert after["bytes_to_server"] >= before["bytes_to_server"]
    known.write_text("{")
    ended = stage.virtgrid("track", stage.name, "--json", "--import", str(known))
    assert (ended.status, ended.last["what"]) == (3, "the tracker's state cannot be read")


def test_what_is_not_there_is_said(stage: Stage) -> None:
    ended = stage.virtgrid("track", "nosuch", "--json")
    assert ended.last["error"] == "VG-NOT-FOUND"
    ended = stage.virtgrid("track", stage.name, "--tap", "nosuch0", "--json")
    assert ended.last["what"].endswith("has no interface with the device 'nosuch0'")
