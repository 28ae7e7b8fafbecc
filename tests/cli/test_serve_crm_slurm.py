"""What a site's manager over Slurm cannot be started with is refused in one sentence, and nothing is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from virtgrid.cli import serve
from virtgrid.cli.main import app
from virtgrid.lab.slurm.cluster import Cluster
from virtgrid.wire import seal


def _refused(
    words: list[str], directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int | str | None, str]:
    monkeypatch.setattr(serve, "log", lambda: None)
    common = ["--site", "alpha", "--addresses", "10.77.1.0/24", "--backend", "slurm"]
    kept = ["--database", str(directory / "crm.db"), "--spool", str(directory / "spool")]
    before = sorted(directory.iterdir())
    with pytest.raises(SystemExit) as left:
        app(["serve", "crm", *common, *kept, *words], prog_name="virtgrid")
    assert sorted(directory.iterdir()) == before
    return left.value.code, capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="who is not root is refused before")
@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ([], 2, "--backend slurm needs a key"),
        (["--key", "KEY", "--guard", "2h"], 2, "--guard: between 0 and an hour"),
        (["--key", "KEY", "--slurm-conf", "/no/slurm.conf"], 3, "there is no /no/slurm.conf"),
        (["--key", "KEY", "--account", "kenji"], 2, "'kenji' is not USER=ACCOUNT"),
    ],
)
def test_what_is_said_wrongly(
    words: list[str],
    status: int,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seal.write_private(tmp_path / "key", seal.private_text(seal.new_key()))
    words = [str(tmp_path / "key") if word == "KEY" else word for word in words]
    code, told = _refused(["--node", "n1", *words], tmp_path, capsys, monkeypatch)
    assert (code, says in told) == (status, True), told


@pytest.mark.lab
def test_a_node_slurm_does_not_have(
    slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seal.write_private(tmp_path / "key", seal.private_text(seal.new_key()))
    words = ["--node", "n1", "--node", "n9", "--key", str(tmp_path / "key")]
    words += ["--slurm-conf", str(slurm.configuration)]
    code, told = _refused(words, tmp_path, capsys, monkeypatch)
    assert (code, "Slurm has no node n9" in told) == (3, True), told
