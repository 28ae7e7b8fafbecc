"""Nova's own package with our driver, between two real libvirtd: its live migrations held and let go.

Nova lives in an environment of its own (``make nova``), our wheel installed as operators do.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from migrating import PATIENCE_S, Stage, until

from virtgrid.core import journal as journals
from virtgrid.core.events import TERMINAL, Record

pytestmark = pytest.mark.lab

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-nova/bin/python"
PROGRAM = Path(__file__).with_name("nova_compute.py")
#: Nova's ramp would be at its end, 800 ms, within the hold, if it reached the guest.
LIBVIRT = {
    "virt_type": "qemu",
    "live_migration_scheme": "tcp",
    "live_migration_downtime": "800",
    "live_migration_downtime_steps": "3",
    "live_migration_downtime_delay": "3",
    "live_migration_monitor_interval": "1",
}


STRICT = {"policy": "strict", "max_wait": "600"}


class Compute:
    """A nova-compute at the source with one live migration, and the journal of its gatekeeper."""

    def __init__(self, stage: Stage, sections: dict[str, dict[str, str]]) -> None:
        self.stage = stage
        self.said: list[dict[str, Any]] = []
        self.errors = ""
        self._lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        state = stage.home / "nova"
        state.mkdir(exist_ok=True)
        (state / "nova.db").unlink(missing_ok=True)
        self._before = set(self._journals())
        self._records: list[Record] = []
        self._follower: journals.Follower | None = None
        make_target(stage)
        asked = {
            "uuid": stage.uuid,
            "source": stage.here,
            "dest": stage.there,
            "memory_mib": stage.spec.memory_mib,
            "state": str(state),
            "options": {
                "DEFAULT": {
                    "compute_driver": "virtgrid.VirtgridDriver",
                    "state_path": str(state),
                    "my_ip": "127.0.0.1",
                    "debug": "true",
                    "use_stderr": "true",
                },
                "database": {"connection": f"sqlite:///{state}/nova.db"},
                "libvirt": LIBVIRT | sections.get("libvirt", {}),
                # The guest was not booted by Nova: its first device is libvirt's vnet.
                "virtgrid": {"capture_interface": "*[a-z]*"} | sections.get("virtgrid", {}),
            },
        }
        self.process = subprocess.Popen(
            stage.source.argv([str(PYTHON), "-W", "ignore", str(PROGRAM)]),
            env=stage.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(state / "log").open("wb"),
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.say(json.dumps(asked))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put({"event": "eof"})

    def _journals(self) -> list[Path]:
        return list((self.stage.home / "state" / "migrations").glob("*.jsonl"))

    @property
    def log(self) -> str:
        return (self.stage.home / "nova" / "log").read_text(encoding="utf-8", errors="replace")

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _drain(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.said.append(self._lines.get_nowait())

    def wait_for(self, event: str) -> dict[str, Any]:
        """A line it says, or has said. It is a failure that it ends without."""

        def found() -> dict[str, Any] | None:
            self._drain()
            for told in self.said:
                if told["event"] == event:
                    return told
            self._go_on(f"{event} was said")
            return None

        told: dict[str, Any] = until(found, f"nova-compute to say {event}")
        return told

    def _go_on(self, until_what: str) -> None:
        over = [told for told in self.said if told["event"] in ("end", "eof")]
        assert not over, f"ended before {until_what}: {self.said}\n{self.log[-6000:]}"

    def events(self) -> list[str]:
        return [told["event"] for told in self.said]

    def records(self) -> list[Record]:
        if self._follower is None:
            new = [path for path in self._journals() if path not in self._before and path.stat().st_size]
            if not new:
                return []
            self._follower = journals.Follower(new[0])
        self._records += self._follower.poll()
        return self._records

    def journal(self, event: str, **fields: Any) -> Record:
        def found() -> Record | None:
            for record in self.records():
                if record.event == event and all(record.get(key) == value for key, value in fields.items()):
                    return record
            self._drain()
            if event not in TERMINAL:
                self._go_on(f"{event} stood in the journal")
            return None

        return until(found, f"{event} {fields} in the journal")

    def bury(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self._follower is not None:
            self._follower.close()


def make_target(stage: Stage) -> None:
    """The disk at the destination, as Nova's pre_live_migration leaves it."""
    stage.target_image.unlink(missing_ok=True)
    source = stage.source.images / stage.spec.disk_name
    told = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", str(source)], capture_output=True, check=True
    )
    info = json.loads(told.stdout)
    argv = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        info["format"],
        str(stage.target_image),
        str(info["virtual-size"]),
    ]
    subprocess.run(argv, check=True)


@contextlib.contextmanager
def computing(stage: Stage, **sections: dict[str, str]) -> Iterator[Compute]:
    """sections: of nova.conf, beyond what all have."""
    compute = Compute(stage, sections)
    try:
        yield compute
    finally:
        compute.bury()


@pytest.fixture(autouse=True)
def nova_there() -> None:
    if not os.access(PYTHON, os.X_OK):
        pytest.skip("no Nova here: make nova installs it in .venv-nova")


def check_stayed(stage: Stage, compute: Compute) -> None:
    """Nova has rolled back; what its rollback at the destination removes is the test's to remove."""
    assert "post" not in compute.events()
    assert "recover" in compute.events()
    stage.target_image.unlink(missing_ok=True)
    stage.check_safe_at_source()


def test_nova_switches_over_when_the_gate_permits_it(stage: Stage) -> None:
    with computing(stage, virtgrid=STRICT) as compute:
        with stage.occupied():
            assert compute.wait_for("loaded")["driver"] == "virtgrid.openstack.driver.VirtgridDriver"
            began = compute.journal("hold")
            # Longer than Nova's whole ramp takes.
            held = until(
                lambda: [r for r in compute.records() if r.event == "gate" and r["waited_s"] > 11], "held on"
            )[-1]
            assert (held["decision"], held["unsuitable"]) == ("hold", 1)
            assert stage.downtime_ms() == 1
        released = compute.journal("released")
        assert (released["by"], released["unsuitable"]) == ("gate", 0)
        compute.wait_for("post")
        end = compute.wait_for("end")
        assert end["error"] is None
        assert "recover" not in compute.events()
        assert end["memory_total"] >= stage.spec.memory_mib << 20
        assert end["memory_processed"] > 0
        assert end["disk_total"] > 0
        finished = compute.journal("finished")
        assert (finished["hold"], finished["unsuitable_at_pause"]) == (began["kind"], 0)
        assert finished["downtime_s"] > 0
        assert "Increasing downtime" in compute.log
        assert "is not set: the switchover is held" in compute.log
    stage.check_moved()


@pytest.mark.parametrize(
    ("section", "option", "value", "said"),
    [
        ("libvirt", "live_migration_permit_auto_converge", "true", "would throttle a guest"),
        ("libvirt", "live_migration_permit_post_copy", "true", "hold = false"),
        ("libvirt", "live_migration_parallel_connections", "4", "changes what a held QEMU lets out"),
        ("virtgrid", "policy", "whenever", "whenever"),
        ("virtgrid", "backoff_steps", "4,2", "[virtgrid]"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_at_the_start(
    stage: Stage, section: str, option: str, value: str, said: str
) -> None:
    with computing(stage, **{section: {option: value}}) as compute:
        compute.process.wait(PATIENCE_S)
        assert compute.process.returncode != 0
        told = [line for line in compute.log.splitlines() if said in line]
        assert any(option.removeprefix("backoff_") in line for line in told), compute.log[-3000:]
    stage.target_image.unlink(missing_ok=True)
    stage.check_safe_at_source()


def test_without_a_hold_it_is_novas_own_driver(stage: Stage) -> None:
    with computing(stage, virtgrid={"hold": "false"}) as compute:
        compute.wait_for("post")
        assert compute.wait_for("end")["error"] is None
        assert compute.records() == [], "no gatekeeper, no journal"
    stage.check_moved()


def test_force_complete_lets_a_held_one_go_at_once(stage: Stage) -> None:
    with computing(stage, virtgrid=STRICT) as compute, stage.occupied():
        compute.journal("hold")
        compute.say("force-complete")
        compute.wait_for("done")
        released = compute.journal("released")
        assert released["by"] == "user"
        compute.wait_for("post")
        assert compute.wait_for("end")["error"] is None
        assert compute.journal("finished")["unsuitable_at_pause"] == 1
    stage.check_moved()


def test_an_abort_of_novas_leaves_the_guest_where_it_is(stage: Stage) -> None:
    with computing(stage, virtgrid=STRICT) as compute, stage.occupied():
        compute.journal("hold")
        compute.say("abort")
        compute.wait_for("done")
        # Which of the two depends on whether Nova's monitor looks before libvirt has put the job away.
        assert compute.wait_for("recover")["status"] in ("cancelled", "error")
        compute.wait_for("end")
        assert compute.journal("failed")["on"] is not None
        check_stayed(stage, compute)


def test_a_wait_that_is_over_ends_as_configured(stage: Stage) -> None:
    with (
        computing(stage, virtgrid=STRICT | {"max_wait": "3", "on_timeout": "abort"}) as compute,
        stage.occupied(),
    ):
        compute.wait_for("recover")
        compute.wait_for("end")
        assert compute.journal("failed")["error"] == "VG-HOLD-TIMEOUT"
        check_stayed(stage, compute)


def test_a_gatekeeper_that_is_killed_takes_its_migration_along(stage: Stage) -> None:
    with computing(stage, virtgrid=STRICT) as compute, stage.occupied():
        compute.journal("hold")
        started = compute.journal("started")
        os.kill(started["pid"], signal.SIGKILL)
        compute.wait_for("recover")
        compute.wait_for("end")
        assert "nobody would let go" in compute.log
        stage.virtgrid("migration", "recover", started["id"], "--yes")
        check_stayed(stage, compute)


def test_a_nova_compute_that_is_killed_leaves_the_guest_where_it_is(stage: Stage) -> None:
    with computing(stage, virtgrid=STRICT) as compute, stage.occupied():
        compute.journal("hold")
        compute.process.kill()
        failed = compute.journal("failed")
        assert failed["on"] is not None
        stage.target_image.unlink(missing_ok=True)
        stage.check_safe_at_source()
