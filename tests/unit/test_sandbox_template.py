"""A template takes what fits the host's /usr, nothing secret, and is whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.grid.node import template


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A host's file system, as far as templates look at it."""
    place = tmp_path / "host"
    for directory in (
        "usr/bin",
        "usr/sbin",
        "etc/ssl/certs",
        "etc/ssl/private",
        "etc/alternatives",
        "etc/profile.d",
    ):
        (place / directory).mkdir(parents=True)
    for program in ("usr/sbin/sshd", "usr/bin/ssh-keygen"):
        (place / program).touch()
    for link in ("bin", "sbin"):
        (place / link).symlink_to(f"usr/{link}")
    (place / "etc/ssl/certs/ca.pem").write_text("public")
    (place / "etc/ssl/private/key.pem").write_text("secret")
    (place / "etc/alternatives/awk").symlink_to("/usr/bin/mawk")
    (place / "etc/profile.d/site.sh").write_text("export SITE=1\n")
    (place / "etc/profile.d/secret.sh").write_text("secret")
    (place / "etc/profile.d/secret.sh").chmod(0o600)
    os.mkfifo(place / "etc/profile.d/pipe")
    (place / "etc/shadow").write_text("root:secret")
    (place / "etc/passwd").write_text("ann:x:1000:1000::/home/ann:/bin/bash\n")
    return place


def _text(tree: Path) -> str:
    return "".join(path.read_text() for path in tree.rglob("*") if path.is_file() and not path.is_symlink())


def test_what_fits_is_taken_and_secrets_and_accounts_are_not(tmp_path: Path, source: Path) -> None:
    made = template.build("one", state=str(tmp_path), source=source)
    tree = tmp_path / "templates/one/tree"
    assert (tree / "etc/ssl/certs/ca.pem").read_text() == "public"
    assert (tree / "etc/alternatives/awk").readlink() == Path("/usr/bin/mawk")
    assert (tree / "bin").readlink() == Path("usr/bin")
    assert not os.path.lexists(tree / "lib64")
    assert "secret" not in _text(tree)
    assert "ann" not in (tree / "etc/passwd").read_text()
    assert not (tree / "etc/profile.d/pipe").exists()
    assert template.built(str(tmp_path)) == [made]
    # `*`: a locked account ("!") could not log in with its key either.
    assert all(line.split(":")[1] == "*" for line in (tree / "etc/shadow").read_text().splitlines())


def test_built_again_it_is_new_and_what_a_crash_left_is_gone(tmp_path: Path, source: Path) -> None:
    template.build("one", state=str(tmp_path), source=source)
    (tmp_path / "templates/.one.new/tree").mkdir(parents=True)
    (source / "etc/profile.d/site.sh").write_text("export SITE=2\n")
    template.build("one", state=str(tmp_path), source=source)
    assert "SITE=2" in (tmp_path / "templates/one/tree/etc/profile.d/site.sh").read_text()
    assert sorted(path.name for path in (tmp_path / "templates").iterdir()) == [".lock", "one"]


def test_one_in_use_is_neither_replaced_nor_removed(tmp_path: Path, source: Path) -> None:
    template.build("one", state=str(tmp_path), source=source)
    user = tmp_path / "sandboxes/box"
    user.mkdir(parents=True)
    (user / "note.template").write_text("one")
    with pytest.raises(RefusedError, match="in use by sandbox 'box'"):
        template.build("one", state=str(tmp_path), source=source)
    with pytest.raises(RefusedError, match="in use by sandbox 'box'"):
        template.remove("one", state=str(tmp_path))
    template.build("two", state=str(tmp_path), source=source)
    (user / "note.template").unlink()
    assert template.remove("one", state=str(tmp_path))
    assert not template.remove("one", state=str(tmp_path))


def test_a_host_of_another_kind_is_refused_before_anything_is_made(tmp_path: Path, source: Path) -> None:
    (source / "usr/sbin/sshd").unlink()
    with pytest.raises(RefusedError, match="sshd"):
        template.build(state=str(tmp_path), source=source)
    (source / "usr/sbin/sshd").touch()
    (source / "bin").unlink()
    (source / "bin").mkdir()
    with pytest.raises(RefusedError, match="does not lie in /usr"):
        template.build(state=str(tmp_path), source=source)
    with pytest.raises(UsageError):
        template.build("../x", state=str(tmp_path), source=source)
    assert not (tmp_path / "templates").exists()
