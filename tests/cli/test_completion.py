"""The Tab key: our nouns, their words, migrate's options, names of domains, and never a hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from virtgrid.cli import complete
from virtgrid.cli.main import NOUNS

_CALL = (sys.executable, "-c", "from virtgrid.cli.main import main; main()")


def _offered(line: str, **environment: str) -> list[str]:
    """What bash would be offered at the end of a line."""
    words = line.split(" ")
    ran = subprocess.run(
        _CALL,
        env={
            **os.environ,
            **environment,
            "_VIRTGRID_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        },
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert "Traceback" not in ran.stderr
    return ran.stdout.split()


def test_the_nouns_are_offered() -> None:
    assert _offered("virtgrid ") == list(NOUNS)
    assert _offered("virtgrid mig") == ["migrate", "migration"]


def test_words_below_a_noun_are_offered() -> None:
    assert _offered("virtgrid migration re") == ["report", "release", "recover"]
    assert "certificate" in _offered("virtgrid lab break ")
    assert "boot" in _offered("virtgrid lab guest ")


def test_options_of_migrate_are_offered_but_not_the_refused_ones() -> None:
    assert _offered("virtgrid migrate --co") == ["--connect", "--copy-storage-all", "--copy-storage-inc"]
    offered = _offered("virtgrid migrate --")
    assert {"--policy", "--max-wait", "--dry-run"} <= set(offered)
    assert not {"--p2p", "--parallel", "--postcopy"} & set(offered)


def test_migrations_are_offered_by_domain_and_by_id(tmp_path: Path) -> None:
    journals = tmp_path / "migrations"
    journals.mkdir()
    for name in ("20261122T010203-web1", "20261122T010204-db", "20261121T000000-web1"):
        (journals / f"{name}.jsonl").touch()
    state = {"VIRTGRID_STATE_DIR": str(tmp_path)}
    assert _offered("virtgrid migration show w", **state) == ["web1"]
    assert _offered("virtgrid migration report 20261122", **state) == [
        "20261122T010204-db",
        "20261122T010203-web1",
    ]


@pytest.fixture
def virsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virsh of our own, first in PATH; the test writes it."""
    program = tmp_path / "virsh"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return program


def _write(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_running_domains_are_offered(virsh: Path) -> None:
    _write(virsh, 'printf "%s\\n" web1 web2 "$LIBVIRT_DEFAULT_URI" "" db')
    assert complete.domains("web") == ["web1", "web2"]
    assert _offered("virtgrid migrate w") == ["web1", "web2"]


def test_the_uri_of_the_environment_is_asked(virsh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(virsh, 'echo "$4"')
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu:///session")
    assert complete.domains("") == ["qemu:///session"]


def test_a_libvirt_that_does_not_answer_offers_nothing(virsh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(virsh, "exec sleep 60")
    monkeypatch.setattr(complete, "_DEADLINE_S", 0.1)
    began_s = time.monotonic()
    assert complete.domains("") == []
    assert time.monotonic() - began_s < 30


def test_a_host_without_virsh_offers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert complete.domains("") == []


@pytest.mark.parametrize(
    ("shell", "sign"), [("bash", "complete -o"), ("zsh", "#compdef virtgrid"), ("fish", "complete --command")]
)
def test_a_script_for_each_shell(shell: str, sign: str) -> None:
    ran = subprocess.run(
        _CALL,
        env={**os.environ, "_VIRTGRID_COMPLETE": f"source_{shell}"},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert sign in ran.stdout
    assert "_VIRTGRID_COMPLETE" in ran.stdout
