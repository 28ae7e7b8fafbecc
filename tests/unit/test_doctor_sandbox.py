"""What a host lacks for sandboxes is told with the command that mends it; other hosts hear nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from virtgrid.grid.node.spec import FIRST_BASE
from virtgrid.host import doctor_sandbox
from virtgrid.host.doctor_sandbox import SandboxFacts, judge
from virtgrid.host.hooks import Hook, HookState
from virtgrid.migration.preflight import Check, CheckVerdict


def _hook(state: HookState, *, restart_needed: bool = False) -> Hook:
    path = Path("/etc/libvirt/hooks/lxc.d/50-virtgrid")
    return Hook(driver="lxc", path=path, state=state, target=None, others=(), restart_needed=restart_needed)


def _good() -> SandboxFacts:
    return SandboxFacts(hooks=(_hook(HookState.INSTALLED),), templates=("default",), descriptors=8192)


def _warnings(facts: SandboxFacts) -> list[Check]:
    return [check for check in judge(facts) if check.verdict is not CheckVerdict.PASS]


def test_a_host_that_has_everything_lacks_nothing() -> None:
    assert _warnings(_good()) == []


def test_a_host_nobody_has_prepared_is_told_how_in_one_line() -> None:
    (found,) = judge(SandboxFacts(hooks=(_hook(HookState.ABSENT),), no_virtgridd="it is not there"))
    assert found.verdict is CheckVerdict.PASS
    assert "virtgrid hooks install" in found.text


@pytest.mark.parametrize(
    ("facts", "hint"),
    [
        (replace(_good(), hooks=(_hook(HookState.ABSENT),)), "virtgrid hooks install"),
        (replace(_good(), hooks=(_hook(HookState.OLD),)), "virtgrid hooks install"),
        (replace(_good(), hooks=(_hook(HookState.FOREIGN),)), "another name"),
        (
            replace(_good(), hooks=(_hook(HookState.INSTALLED, restart_needed=True),)),
            "systemctl restart libvirtd",
        ),
        (replace(_good(), templates=()), "virtgrid template build"),
        (replace(_good(), stale=("default",)), "virtgrid template build"),
        (replace(_good(), templates=("mpi",), stale=("mpi",)), "virtgrid template build mpi"),
        (replace(_good(), no_virtgridd="virtgridd cannot be reached"), "virtgrid serve host"),
        (replace(_good(), no_driver="no connection driver"), "libvirt-daemon-driver-lxc"),
        (replace(_good(), no_root="shift the owners of the template: Invalid argument"), "5.19"),
        (replace(_good(), no_programs=("openssh-server",)), "apt-get install openssh-server"),
        (replace(_good(), subordinate=("ann:1879048192:65536 in /etc/subuid",)), "usermod"),
        (replace(_good(), descriptors=524288), "LimitNOFILE=1024:8192"),
    ],
)
def test_what_is_missing_comes_with_the_command_that_mends_it(facts: SandboxFacts, hint: str) -> None:
    (found,) = _warnings(facts)
    assert found.hint is not None
    assert hint in found.hint


def test_subordinate_ids_that_meet_those_of_sandboxes_are_found(tmp_path: Path) -> None:
    file = tmp_path / "subuid"
    inside, before, around = FIRST_BASE + 65536, FIRST_BASE - 65536, 100000
    file.write_text(
        f"# a comment\nann:{inside}:65536\nbea:{before}:65536\ncat:{around}:2000000000\nhalf:12\nodd:x:y\n"
    )
    found = doctor_sandbox.subordinate((file, tmp_path / "absent"))
    assert [line.split(":")[0] for line in found] == ["ann", "cat"]
