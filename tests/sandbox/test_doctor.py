"""``virtgrid doctor`` at a host of sandboxes, whole and with something taken away."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hosting import SandboxHost

from virtgrid.host import hooks

pytestmark = pytest.mark.lab


def _found(host: SandboxHost) -> dict[str, dict[str, Any]]:
    call = [sys.executable, "-c", "from virtgrid.cli.main import main; main()", "doctor", "--json"]
    return {one["name"]: one for one in json.loads(host.site.run(call, check=False).stdout)}


def test_a_host_of_sandboxes_has_what_they_need_and_a_missing_hook_is_told(host: SandboxHost) -> None:
    whole = _found(host)
    for name in ("lxc", "overlay", "sandbox programs", "ids", "open files"):
        assert whole[name]["verdict"] == "PASS", whole[name]
    # Other tests may have put it there anew, or built templates that are older.
    assert whole["lxc hook"]["hint"] in (None, "systemctl restart libvirtd")
    assert "no template" not in whole["template"]["text"]
    # Nobody serves pilots at this site.
    assert (whole["virtgridd"]["verdict"], whole["virtgridd"]["hint"]) == ("WARN", "virtgrid serve host")
    directory = host.site.plan.root / "libvirt/hooks"
    hooks.remove(directory)
    try:
        assert _found(host)["lxc hook"]["hint"].startswith("virtgrid hooks install")
    finally:
        hooks.install(directory)


def test_asking_changes_nothing(host: SandboxHost) -> None:
    before = host.site.run(["cat", "/proc/self/mountinfo"]).stdout
    _found(host)
    assert host.site.run(["cat", "/proc/self/mountinfo"]).stdout == before
    host.wait_clean()
