"""Hooks are installed beside what is there, never over it."""

from __future__ import annotations

from pathlib import Path

import pytest

from virtgrid.core.errors import RefusedError
from virtgrid.host import hooks
from virtgrid.host.hooks import HookState


def test_installed_twice_is_installed_once_and_removed_it_is_gone(tmp_path: Path) -> None:
    assert [hook.state for hook in hooks.status(tmp_path)] == [HookState.ABSENT] * 2
    for _ in range(2):
        lxc, qemu = hooks.install(tmp_path)
        for found in (lxc, qemu):
            assert (found.state, found.path.resolve()) == (HookState.INSTALLED, hooks.program())
        assert (lxc.path.parent.name, qemu.path.parent.name) == ("lxc.d", "qemu.d")
    hooks.remove(tmp_path)
    hooks.remove(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_hooks_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "lxc").write_text("#!/bin/sh\n")
    (tmp_path / "lxc.d").mkdir()
    (tmp_path / "lxc.d/10-mine").write_text("#!/bin/sh\n")
    found, _ = hooks.install(tmp_path)
    assert found.others == (tmp_path / "lxc", tmp_path / "lxc.d/10-mine")
    hooks.remove(tmp_path)
    assert (tmp_path / "lxc.d/10-mine").read_text() == "#!/bin/sh\n"


@pytest.mark.parametrize("link", [False, True])
def test_a_file_of_somebody_else_at_our_place_is_never_overwritten(tmp_path: Path, link: bool) -> None:
    place = tmp_path / "lxc.d/50-virtgrid"
    place.parent.mkdir()
    (tmp_path / "theirs").write_text("theirs")
    if link:
        place.symlink_to(tmp_path / "theirs")
    else:
        place.write_text("theirs")
    with pytest.raises(RefusedError, match="left alone"):
        hooks.install(tmp_path)
    hooks.remove(tmp_path)
    assert place.read_text() == "theirs"


def test_a_link_to_a_virtgrid_that_is_gone_is_replaced(tmp_path: Path) -> None:
    place = tmp_path / "lxc.d/50-virtgrid"
    place.parent.mkdir()
    place.symlink_to("/nonexistent/hooks/50-virtgrid")
    assert [hook.state for hook in hooks.status(tmp_path)] == [HookState.OLD, HookState.ABSENT]
    assert [hook.state for hook in hooks.install(tmp_path)] == [HookState.INSTALLED] * 2
