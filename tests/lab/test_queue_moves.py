"""virtgridd migrates domains away: for a sandbox that is prepared, and when the host is evacuated."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hosting import SandboxHost
from migrating import PATIENCE_S, VIRTGRID, Stage, until

from virtgrid.core import journal as journals
from virtgrid.grid.node import domain, root
from virtgrid.lab import guest

pytestmark = pytest.mark.lab

_NAMESPACE = "https://virtgrid.example/xmlns/policy/1.0"
_POLICY = """\
<policy>
  <yield to="jobs"/>
  <destination name="other"/>
  <gate policy="strict" max-wait="2m" on-timeout="abort"/>
</policy>
"""


@dataclass
class Agent:
    """virtgridd at the site where a guest is."""

    stage: Stage
    slots: int = 2
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> str:
        return f"unix:{self.stage.home}/host.sock"

    @property
    def environment(self) -> dict[str, str]:
        return self.stage.environment | {"VIRTGRID_CONFIG": str(self.stage.home / "virtgrid.toml")}

    def start(self) -> None:
        """And wait until it listens."""
        (self.stage.home / "virtgrid.toml").write_text(
            f'[queue.destination.other]\nuri = "qemu+tcp://{self.stage.there}/system"\ncopy_storage = "all"\n'
            f'link = "wan"\n[queue.link.wan]\nslots = {self.slots}\n[queue]\nname = "self"\nretry = "1s"\n'
        )
        log = self.stage.home / "virtgridd.log"
        with log.open("ab") as file:
            before = file.tell()
            self.process = subprocess.Popen(
                self.stage.source.argv([str(VIRTGRID), "serve", "host", "--socket", self.socket]),
                env=self.environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            )  # fmt: skip

        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, log.read_text()
            return b"ready at" in log.read_bytes()[before:]

        until(ready, "virtgridd")

    def end(self, number: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(30)

    def virtgrid(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.stage.source.argv([str(VIRTGRID), *words]),
            env=self.environment, capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip

    def popen(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.stage.source.argv([str(VIRTGRID), *words]), env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def queue(self) -> list[dict[str, Any]]:
        done = self.virtgrid("migration", "queue", "--all", "--json", "--host", self.socket)
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def entry(self, name: str, *states: str) -> dict[str, Any]:
        """Wait until a domain's entry is in one of these states."""

        def found() -> dict[str, Any] | None:
            entries = [one for one in self.queue() if one["domain"] == name]
            return entries[-1] if entries and entries[-1]["state"] in states else None

        entry: dict[str, Any] = until(found, f"{name} {states} in the queue")
        return entry

    def log(self) -> str:
        return (self.stage.home / "virtgridd.log").read_text()


@pytest.fixture
def agent(stage: Stage) -> Iterator[Agent]:
    agent = Agent(stage)
    (stage.home / "virtgridd.log").unlink(missing_ok=True)
    for path in (stage.home / "state/queue").glob("*.json"):
        path.unlink()
    try:
        yield agent
    finally:
        if agent.process is not None and agent.process.poll() is None:
            agent.end(signal.SIGKILL)


@pytest.fixture
def sandboxes(stage: Stage) -> Iterator[SandboxHost]:
    with SandboxHost(stage.source, template=f"q{os.getpid()}") as host:
        host.clear()
        yield host


def _sandbox_file(host: SandboxHost, tmp_path: Path) -> Path:
    account = root.Account(name="ann", uid=4101, gid=4101, home=str(host.homes / "ann"))
    file = tmp_path / "box.xml"
    uuid = "e3bfae3d-6a48-4b49-9a2f-1c8f5b5d7a12"
    file.write_text(domain.build(host.spec("box"), account, base=0x70000000, uuid=uuid))
    return file


def test_a_sandbox_that_is_prepared_makes_a_guest_leave_when_its_clients_let_it(
    stage: Stage, agent: Agent, sandboxes: SandboxHost, tmp_path: Path
) -> None:
    policy = stage.home / "policy.xml"
    policy.write_text(_POLICY)
    stage.target_image.unlink(missing_ok=True)
    agent.start()
    for words in (("set", stage.name, str(policy), "--live", "--config"), ("check", stage.name)):
        done = agent.virtgrid("domain", "policy", *words)
        assert done.returncode == 0, done.stderr
    assert "goes to   other" in done.stdout
    assert agent.virtgrid("domain", "policy", "get", stage.name).stdout.startswith("<policy>")
    # Plain virsh: libvirt runs the hook, the hook posts its notice, and virtgridd does the rest.
    sandboxes.virsh("create", str(_sandbox_file(sandboxes, tmp_path)))
    entry = agent.entry(stage.name, "running")
    assert entry["why"].startswith("sandbox box is prepared here")
    path = stage.home / "state/migrations" / f"{entry['migration']}.jsonl"

    def events(name: str) -> list[Any]:
        return [record for record in journals.read(path) if record.event == name]

    with stage.occupied():
        until(lambda: events("hold"), "the hold")
    assert agent.entry(stage.name, "done")["migration"] == path.stem
    stage.check_moved()
    assert events("started")[0]["policy"] == "strict"
    # The policy went along; and the qemu hook told what it saw.
    told = guest.virsh(stage.source, "metadata", stage.name, _NAMESPACE)
    assert "yield" in told
    for step in ("stopped", "release"):
        until(lambda step=step: f"notice: qemu {stage.name} {step}" in agent.log(), f"the notice of {step}")
    sandboxes.virsh("destroy", "box")


def test_an_evacuation_survives_virtgridd_and_takes_all_within_its_budget(stage: Stage, agent: Agent) -> None:
    spec = replace(stage.spec, name="mover1", address="10.77.0.61")
    more = replace(stage, spec=spec)
    agent.slots = 1
    with contextlib.ExitStack() as undo:
        undo.callback(more.forget)
        guest.boot(more.lab, more.here, spec)
        guest.wait_answering(more.lab, spec, deadline_s=PATIENCE_S)
        more.remember_downtime()
        for one in (stage, more):
            one.target_image.unlink(missing_ok=True)
        agent.start()
        policy = stage.home / "policy.xml"
        policy.write_text(_POLICY)
        assert agent.virtgrid("domain", "policy", "set", stage.name, str(policy)).returncode == 0
        words = ("evacuate", "--to", "other", "--json", "--host", agent.socket)
        with stage.occupied():  # so that the first is under way until the queue has been lost and found
            done = agent.virtgrid(*words, "--detach")
            assert done.returncode == 0, done.stderr
            assert {one["domain"] for one in json.loads(done.stdout)["entries"]} == {"mover", "mover1"}
            agent.entry(stage.name, "running")
            assert agent.entry(spec.name, "waiting")["note"] == "1 migration uses link wan already"
            agent.end(signal.SIGKILL)
            agent.start()
            assert agent.entry(stage.name, "running")["attempts"] == 1
            following = agent.popen(*words)
            assert following.stdout is not None
            lines = [following.stdout.readline()]
        out, err = following.communicate(timeout=180)
        assert following.returncode == 0, (out, err, agent.log())
        lines += out.splitlines()
        assert json.loads(lines[-1]) == {"event": "evacuated", "moved": 2, "stayed": 0}
        # Nothing was asked or done twice, and never two over the link at a time.
        assert [(one["state"], one["attempts"]) for one in agent.queue()] == [("done", 1)] * 2
        assert len({one["migration"] for one in agent.queue()}) == 2
        spans = []
        for one in agent.queue():
            records = journals.read(stage.home / "state/migrations" / f"{one['migration']}.jsonl")
            spans.append((records[0].mono_s, records[-1].mono_s))
        spans.sort()
        assert spans[0][1] <= spans[1][0]
        again = agent.virtgrid(*words)
        assert json.loads(again.stdout) == {"event": "evacuated", "moved": 0, "stayed": 0}
        for one in (stage, more):
            one.check_moved()


def test_when_virtgridd_and_the_worker_die_both_hosts_are_asked_and_it_is_tried_again(
    stage: Stage, agent: Agent
) -> None:
    policy = stage.home / "policy.xml"
    policy.write_text(_POLICY)
    stage.target_image.unlink(missing_ok=True)
    agent.start()
    assert agent.virtgrid("domain", "policy", "set", stage.name, str(policy)).returncode == 0
    with stage.occupied():
        asked = agent.virtgrid("evacuate", "--detach", "--json", "--host", agent.socket)
        assert asked.returncode == 0, asked.stderr
        first = agent.entry(stage.name, "running")["migration"]
        path = stage.home / "state/migrations" / f"{first}.jsonl"
        until(lambda: any(record.event == "hold" for record in journals.read(path)), "the hold")
        agent.end(signal.SIGKILL)
        os.kill(int(journals.read(path)[0]["pid"]), signal.SIGKILL)
        agent.start()
        until(lambda: agent.entry(stage.name, "running")["attempts"] == 2, "the second attempt")
        assert journals.read(path)[-1].event == "recovered"
        assert journals.read(path)[-1]["on"] == journals.read(path)[0]["source"]
    entry = agent.entry(stage.name, "done")
    assert entry["tried"] == [first, entry["migration"]]
    stage.check_moved()


def test_a_guest_that_follows_prices_goes_where_it_is_cheaper(stage: Stage, agent: Agent) -> None:
    policy = stage.home / "policy.xml"
    policy.write_text(
        '<policy><follow what="price"/><destination name="self" price="20"/>'
        '<destination name="other" price="30"><window from="00:00" until="12:00" zone="UTC" price="5"/>'
        '<window from="12:00" until="00:00" zone="UTC" price="5"/></destination>'
        '<gate policy="immediate"/></policy>'
    )
    stage.target_image.unlink(missing_ok=True)
    guest.virsh(
        stage.source, "metadata", stage.name, _NAMESPACE, "--key", "virtgrid", "--set", policy.read_text()
    )
    agent.start()
    entry = agent.entry(stage.name, "done")
    assert entry["why"] == "other, price 5, is cheaper than here, 20"
    stage.check_moved()


def test_what_arrives_gets_this_host_s_names(stage: Stage) -> None:
    images, other = "/var/lib/libvirt/images", "/var/lib/libvirt/other"
    stage.target.run(["ln", "-sfn", images, other])
    stage.target.run(["mkdir", "-p", "/etc/virtgrid"])
    lines = f'[incoming]\npaths = {{ "{images}" = "{other}" }}\n'
    stage.target.run(["sh", "-c", f"printf '%s' '{lines}' > /etc/virtgrid/virtgrid.toml"])
    try:
        ended = stage.migrate("--policy", "immediate", "--verify-timeout", "5")
        assert ended.status == 0, ended.last
        xml = guest.virsh(stage.target, "dumpxml", stage.name)
        assert f"{other}/{stage.spec.disk_name}" in xml
        stage.check_moved()
    finally:
        stage.lab.site("bob").run(["rm", "-f", "/etc/virtgrid/virtgrid.toml"])
        stage.lab.site("alice").run(["rm", "-f", "/etc/virtgrid/virtgrid.toml"])
        stage.forget()
