"""Real programs, without a host that makes sandboxes: what is refused, what is told, what is left."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from grid_parts import end_programs, until

from virtgrid.cli.main import app
from virtgrid.wire import seal

VIRTGRID = (sys.executable, "-m", "virtgrid.cli.main")


@dataclass
class Grid:
    """alpha runs jobs, though nobody makes sandboxes on its host; beta only promises."""

    home: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def grc(self) -> str:
        return f"unix:{self.home}/grc.sock"

    def words(self, name: str) -> list[str]:
        here = f"unix:{self.home}"
        common = ["--socket", f"{here}/{name}.sock", "--database", f"{self.home}/{name}.db"]
        match name:
            case "alpha":
                more = ["--key", f"{self.home}/key", "--pilots", f"{here}/pilots.sock"]
                more += ["--host", f"{here}/no-virtgridd.sock"]
                return ["crm", "--site", name, "--node", "a1", "--addresses", "10.1.0.0/24", *more, *common]
            case "beta":
                return ["crm", "--site", name, "--node", "b1", "--addresses", "10.2.0.0/24", *common]
            case "net":
                return ["nrm", "--name", "net", "--link", "alpha:beta=1gbit", *common]
            case _:
                crms = [
                    word for site in ("alpha", "beta") for word in ("--crm", f"{site}={here}/{site}.sock")
                ]
                return ["grc", *crms, "--nrm", f"net={here}/net.sock", *common]

    def start(self, name: str) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen([*VIRTGRID, "serve", *self.words(name)], stderr=log)

    def say(self, *words: str, as_root: bool = False) -> subprocess.CompletedProcess[str]:
        """As an ordinary user."""
        me: dict[str, Any] = {}
        if os.geteuid() == 0 and not as_root:
            nobody = pwd.getpwnam("nobody")
            me = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        env = {"PATH": os.environ["PATH"], "HOME": "/", "VIRTGRID_GRC": self.grc}
        return subprocess.run(
            [*VIRTGRID, *words],
            env=env,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            cwd="/",
            **me,
        )

    def free(self) -> list[int]:
        sites = json.loads(self.say("site", "list", "--json").stdout)
        return [one["nodes_free"] for one in sites if one["kind"] == "crm"]

    def state(self, id_: str) -> str:
        return str(json.loads(self.say("job", "show", id_, "--json").stdout)["state"])

    def end(self) -> None:
        end_programs(self.running.values())


@pytest.fixture(scope="module")
def grid() -> Iterator[Grid]:
    home = Path(tempfile.mkdtemp(prefix=f"vg{os.getpid()}-"))
    home.chmod(0o755)
    seal.write_private(home / "key", seal.private_text(seal.new_key()))
    made = Grid(home)
    try:
        for name in ("alpha", "beta", "net", "grc"):
            made.start(name)
        logs = [home / f"{name}.log" for name in made.running]
        asyncio.run(until(lambda: all("ready at" in log.read_text() for log in logs), timeout_s=120))
        yield made
    finally:
        made.end()
        shutil.rmtree(home)


ONE = ("--nodes", "alpha:1", "--walltime", "1h")


def test_what_cannot_be_reserved_is_refused_with_everybody_s_reason(grid: Grid) -> None:
    many = ("--nodes", "alpha:2,beta:3", "--walltime", "1h", "--id", "much")
    ran = grid.say("job", "run", *many, "--", "true")
    assert ran.returncode == 3, ran.stderr
    assert "job much was not run" in ran.stderr
    assert "alpha: 2 nodes were asked for, and there are 1" in ran.stderr
    assert "beta: 3 nodes were asked for, and there are 1" in ran.stderr
    shown = json.loads(grid.say("job", "show", "much", "--json").stdout)
    assert (shown["state"], shown["verdict"], shown["status"]) == ("OVER", "REFUSED", None)
    again = grid.say("job", "submit", *many, "--", "true")  # the same words: the same job
    assert again.returncode == 3
    other = grid.say("job", "submit", *many, "--", "false")
    assert other.returncode == 3
    assert "the id much was used for another job" in other.stderr


def test_a_site_that_only_promises_breaks_the_job_and_nothing_is_kept(grid: Grid) -> None:
    both = ("--nodes", "alpha:1,beta:1", "--walltime", "1h", "--id", "mixed")
    ran = grid.say("job", "run", *both, "--", "true")
    assert ran.returncode == 1, ran.stderr
    assert "job mixed broke: beta: this site runs no jobs, it only promises" in ran.stderr
    # A pilot that is on the line waits for its virtgridd, which is not there, before it is ended.
    asyncio.run(until(lambda: grid.free() == [1, 1], timeout_s=120))
    asyncio.run(until(lambda: grid.state("mixed") == "OVER", timeout_s=120))


def test_a_job_that_waits_is_shown_to_its_user_alone_and_can_be_cancelled(grid: Grid) -> None:
    later = ("--begin", "2126-01-01T00:00Z", "--id", "later")
    said = grid.say("job", "submit", *ONE, *later, "--", "echo", "hello")
    assert said.returncode == 0, said.stderr
    listed = {one["id"]: one for one in json.loads(grid.say("job", "list", "--json").stdout)}
    assert (listed["later"]["state"], listed["later"]["argv"]) == ("WAITING", ["echo", "hello"])
    if os.geteuid() == 0:
        assert "later" in grid.say("job", "list", as_root=True).stdout
    assert grid.say("job", "logs", "later").stdout == ""
    assert grid.say("job", "cancel", "later").returncode == 0
    assert "cancelled by its user" in grid.say("job", "show", "later").stdout
    assert grid.say("job", "show", "nobodys").returncode == 4


def test_root_has_no_jobs(grid: Grid) -> None:
    if os.geteuid() != 0:
        pytest.skip("this is not root")
    ran = grid.say("job", "run", *ONE, "--", "true", as_root=True)
    assert ran.returncode == 3
    assert "root has no sandboxes" in ran.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([*ONE], "Missing argument 'COMMAND...'"),
        ([*ONE, "--env", "PATH", "--", "true"], "is not NAME=VALUE"),
        ([*ONE, "--env", "9=1", "--", "true"], "such a program cannot be run: env.9"),
        ([*ONE, "--", "x" * 100_000], "such a program cannot be run"),
        (["--nodes", "alpha", "--walltime", "1h", "--", "true"], "is not SITE:"),
        (["--nodes", "alpha:1", "--walltime", "0s", "--", "true"], "the window ends before it begins"),
        ([*ONE, "--bandwidth", "nan", "--", "true"], "is not a rate"),
    ],
)
def test_bad_input_is_one_sentence_and_no_job(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        app(["job", "run", "--grc", "unix:/nowhere/grc.sock", *words], prog_name="virtgrid")
    assert left.value.code == 2
    assert text in capsys.readouterr().err


def test_a_coordinator_that_is_not_there_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        app(["job", "run", "--grc", "unix:/nowhere/grc.sock", *ONE, "--", "true"], prog_name="virtgrid")
    assert left.value.code == 8
