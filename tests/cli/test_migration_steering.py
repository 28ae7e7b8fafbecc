"""`virtgrid migration wait|release|abort|recover`, the front door, and the words of `virtgrid migrate`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from virtgrid import __version__
from virtgrid.cli import migration_control
from virtgrid.cli.main import NOUNS, app
from virtgrid.core.clock import SystemClock
from virtgrid.core.journal import Journal

ID = "20260101T000000-web1"
UUID = "00000000-0000-0000-0000-000000000009"
SILENT = "qemu+unix:///system?socket=/nonexistent/libvirt-sock"
VERBS = ("wait", "release", "abort", "recover")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIRTGRID_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("VIRTGRID_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    return tmp_path


@pytest.fixture
def journal(state: Path) -> Journal:
    """A migration whose driver is this very process, so it counts as running."""
    made = Journal(state / "state/migrations" / f"{ID}.jsonl", SystemClock())
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    made.write(
        "started", id=ID, domain="web1", uuid=UUID, source="alice", destination="bob", policy="backoff",
        source_uri=SILENT, dest_uri=SILENT, pid=os.getpid(), pid_started=started,
    )  # fmt: skip
    return made


def virtgrid(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def test_the_version_is_printed() -> None:
    done = virtgrid("--version")
    assert done.exit_code == 0
    assert f"virtgrid {__version__}" in done.stdout


def test_the_installed_command_answers() -> None:
    program = Path(sys.executable).with_name("virtgrid")
    done = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert all(noun in done.stdout for noun in NOUNS)


def test_help_names_every_noun_and_every_verb() -> None:
    assert all(noun in virtgrid("--help").stdout for noun in NOUNS)
    told = virtgrid("migration", "--help").stdout
    assert all(verb in told for verb in (*VERBS, "list", "show", "report"))


@pytest.mark.parametrize(
    "words", [["fly"], ["--fly"], ["migration", "fly"], ["migrate"], ["migrate", "web1"]]
)
def test_words_that_are_no_command_are_usage_errors(words: list[str]) -> None:
    assert virtgrid(*words).exit_code == 2


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("reference", ["nobody", "20990101T000000-web1", "../../etc/passwd", ""])
def test_an_unknown_migration_is_not_found(verb: str, reference: str, state: Path) -> None:
    done = virtgrid("migration", verb, reference)
    assert done.exit_code == 4
    assert "no migration" in done.stderr
    assert "virtgrid migration list" in done.stderr
    as_json = virtgrid("migration", verb, reference, "--json")
    assert as_json.exit_code == 4
    assert json.loads(as_json.stdout)["error"] == "VG-NOT-FOUND"
    assert list(state.iterdir()) == [], "nothing is made by asking"


def test_waiting_for_what_cannot_be_waited_for_is_a_usage_error(journal: Journal) -> None:
    assert virtgrid("migration", "wait", ID, "--for", "christmas").exit_code == 2
    assert virtgrid("migration", "wait", ID, "--timeout", "soon").exit_code == 2


def test_waiting_longer_than_asked_for_has_its_own_status(journal: Journal) -> None:
    done = virtgrid("migration", "wait", ID, "--timeout", "0.05")
    assert done.exit_code == 5
    assert "did not come to 'finished'" in done.stderr


@pytest.mark.parametrize("reference", [ID, "web1"])
def test_waiting_ends_with_the_migration_s_own_status(journal: Journal, reference: str) -> None:
    journal.write("hold", kind="tickled", text="")
    assert virtgrid("migration", "wait", reference, "--for", "hold").exit_code == 0
    journal.write("failed", domain="web1", on="alice", exit_status=6, error="VG-ABORTED", what="aborted")
    assert virtgrid("migration", "wait", reference).exit_code == 6
    told = virtgrid("migration", "wait", reference, "--json")
    assert json.loads(told.stdout)["event"] == "failed"


def test_an_end_written_just_before_the_driver_left_is_not_missed(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> bool:
        """The driver writes its end and is gone by the time it is looked for."""
        journal.write("failed", domain="web1", on="alice", exit_status=1, error="VG-FAILED", what="no")
        return False

    monkeypatch.setattr(migration_control, "writer_alive", gone)
    done = virtgrid("migration", "wait", "web1")
    assert (done.exit_code, done.stdout) == (1, f"{ID}: failed\n")


def test_waiting_for_a_driver_that_died_says_how_to_go_on(state: Path) -> None:
    with Journal(state / "state/migrations" / f"{ID}.jsonl", SystemClock()) as dead:
        dead.write(
            "started", id=ID, domain="web1", uuid=UUID, source="alice", destination="bob", policy="backoff",
            dest_uri=SILENT, pid=os.getpid(), pid_started=1,
        )  # fmt: skip
    done = virtgrid("migration", "wait", "web1")
    assert done.exit_code == 1
    assert f"virtgrid migration recover {ID}" in done.stderr


@pytest.mark.parametrize("verb", ["release", "abort"])
def test_steering_a_migration_nobody_drives_is_not_found(journal: Journal, verb: str) -> None:
    done = virtgrid("migration", verb, ID)
    assert done.exit_code == 4
    assert "not running any more" in done.stderr


def test_recovering_a_running_migration_is_refused(journal: Journal) -> None:
    done = virtgrid("migration", "recover", ID, "--yes")
    assert done.exit_code == 3
    assert "still running" in done.stderr


def test_recovering_with_both_hosts_silent_changes_nothing_and_exits_7(state: Path) -> None:
    path = state / "state/migrations" / f"{ID}.jsonl"
    with Journal(path, SystemClock()) as dead:
        dead.write(
            "started", id=ID, domain="web1", uuid=UUID, source="alice", destination="bob", policy="backoff",
            source_uri=SILENT, dest_uri=SILENT, pid=os.getpid(), pid_started=1,
        )  # fmt: skip
    before = path.read_bytes()
    for words in ([], ["--yes"]):
        done = virtgrid("migration", "recover", ID, *words)
        assert done.exit_code == 7
        assert "no answer" in done.stdout + done.stderr
    assert path.read_bytes() == before


REFUSED = (
    "postcopy", "postcopy-after-precopy", "timeout-postcopy", "compressed", "parallel",
    "auto-converge", "p2p", "direct", "tunnelled", "suspend", "offline", "rdma-pin-all", "zerocopy",
)  # fmt: skip


@pytest.mark.parametrize("option", REFUSED)
def test_options_of_virsh_not_supported_are_refused_with_the_reason(option: str) -> None:
    done = virtgrid("migrate", "web1", "qemu+tls://bob/system", f"--{option}")
    assert done.exit_code == 2
    assert f"--{option}: " in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--max-downtime", "1ms"], ["--max-downtime", "soon"], ["--policy", "lottery"],
        ["--on-timeout", "pray"],
        ["--max-wait", "-1"], ["--max-wait", "1000d"], ["--bandwidth", "0"], ["--bandwidth", "fast"],
        ["--backoff-steps", "4,2,1"], ["--backoff-steps", ""], ["--backoff-deferrals", "0"],
        ["--backoff-start", "-1"], ["--large", "0"], ["--stall-timeout", "1s"], ["--verify-timeout", "1h"],
        ["--timeout", "0"], ["--migrate-disks", "vda"], ["--undefinesource"], ["--migrateuri", "bob"],
        ["--copy-storage-all", "--copy-storage-inc"], ["--bandwidth", "9" * 400], ["--large", "9" * 400],
    ],
)  # fmt: skip
def test_values_out_of_range_are_one_sentence_and_status_2(words: list[str], state: Path) -> None:
    done = virtgrid("migrate", "web1", "qemu+tls://bob/system", *words)
    assert done.exit_code == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "this is a bug" not in done.stderr
    assert list(state.iterdir()) == []


@pytest.mark.parametrize("uri", ["bob", "lxc:///", "http://bob/system"])
def test_a_destination_that_is_no_qemu_hypervisor_is_status_2(uri: str) -> None:
    assert virtgrid("migrate", "web1", uri).exit_code == 2


def test_a_source_that_does_not_answer_is_status_8(state: Path) -> None:
    done = virtgrid("migrate", "web1", "qemu+tls://bob/system", "-c", SILENT, "--dry-run")
    assert done.exit_code == 8
    assert not (state / "state").exists(), "no journal of what never began"
