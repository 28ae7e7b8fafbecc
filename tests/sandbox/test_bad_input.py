"""What is refused, by the command, by the class and by the hook: with a sentence, and nothing touched."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosting import STATE, SandboxHost

from virtgrid.core.errors import RefusedError, UsageError, VirtgridError
from virtgrid.grid.node import domain, root
from virtgrid.grid.node.sandbox import Sandboxes

pytestmark = pytest.mark.lab


@pytest.fixture
def untouched(host: SandboxHost) -> Iterator[None]:
    yield
    # Not at once: control groups are the machine's, and so are those that others are just giving up.
    host.wait_clean()


@pytest.mark.parametrize("user", ["root", "../x", "x" * 65, "", "a:b", "a\nb", "-x", "daemon", "Ann"])
def test_names_that_cannot_be_users(host: SandboxHost, untouched: None, user: str) -> None:
    with pytest.raises(UsageError, match="cannot be a user"):
        host.spec(user=user, account="ann")


@pytest.mark.parametrize("name", ["../x", "x" * 65, "", "a,b", "a:b", "a\nb", ".hidden", "a/b"])
def test_names_that_cannot_be_sandboxes(host: SandboxHost, untouched: None, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name"):
        host.spec(name)


def test_accounts_that_cannot_have_a_sandbox(host: SandboxHost, untouched: None) -> None:
    host.add_account("homeless", 4111, make_home=False)
    host.add_account("stranger", 4112)
    os.chown(host.homes / "stranger", 4113, 4113)
    (host.homes / "filed").write_text("no directory")
    host.add_account("filed", 4114, make_home=False)
    host.site.run(["sh", "-c", "echo 'zero:x:0:0::/root:/bin/sh' >> /etc/passwd"])
    for account, words in (
        ("root", "is root"),
        ("zero", "is root"),
        ("nobody-knows", "no account"),
        ("homeless", "No such file"),
        ("stranger", "belongs to somebody else"),
        ("filed", "no directory"),
    ):
        with pytest.raises(RefusedError, match=words):
            host.make(account=account)


def test_a_linked_ssh_directory_is_refused(host: SandboxHost, untouched: None) -> None:
    home = host.add_account("linked", 4121)
    (home / ".ssh").symlink_to("/etc")
    with pytest.raises(RefusedError, match="symbolic link"):
        host.make(account="linked")
    (home / ".ssh").unlink()
    (home / ".ssh").write_text("a file")
    with pytest.raises(RefusedError, match="no directory"):
        host.make(account="linked")


def test_a_missing_ssh_directory_is_made_for_the_user(host: SandboxHost) -> None:
    home = host.add_account("fresh", 4122)
    host.make(account="fresh")
    found = (home / ".ssh").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (4122, 4122, 0o700)


def test_a_home_may_have_any_name_that_passwd_can_hold(host: SandboxHost) -> None:
    home = host.homes / "with, comma=and space"
    host.add_account("odd", 4123, home=home)
    box = host.make(account="odd")
    host.run(box, "echo there > from-inside")
    assert (home / "from-inside").read_text() == "there\n"
    host.site.run(["sh", "-c", "printf 'torn:x:4124:4124::/home/a\\tb:/bin/sh\\n' >> /etc/passwd"])
    with pytest.raises(RefusedError, match="cannot be shared"):
        host.make("torn", account="torn")


def test_a_template_that_is_missing_or_half_built(host: SandboxHost, untouched: None) -> None:
    with pytest.raises(RefusedError, match="not built") as caught:
        host.make(template="never-built")
    assert caught.value.hint == "virtgrid template build never-built"
    half = Path(f"/var/lib/virtgrid/templates/half{os.getpid()}")
    (half / "tree").mkdir(parents=True)
    try:
        with pytest.raises(RefusedError, match="half built"):
            host.make(template=half.name)
    finally:
        shutil.rmtree(half)


def test_an_address_belongs_to_one_sandbox(host: SandboxHost) -> None:
    host.make("first", address="10.77.0.70/24")
    with pytest.raises(RefusedError, match=r"10\.77\.0\.70 belongs to sandbox 'first'"):
        host.make("second", address="10.77.0.70/24")
    assert host.names() == ["first"]
    host.destroy("first")
    host.make("second", address="10.77.0.70/24")


@pytest.mark.parametrize("address", ["10.77.0.71/24", "fd77::71/64"])
def test_an_address_belongs_to_one_sandbox_whoever_makes_it(
    host: SandboxHost, tmp_path: Path, address: str
) -> None:
    host.make("first", address=address)
    spelt = address.replace("::", ":0:0::")  # the same one
    file = tmp_path / "second.xml"
    file.write_text(_xml(host, "second", address=address).replace(address[:-3], spelt[:-3]))
    refused = host.virsh("create", str(file), check=False)
    assert refused.returncode != 0
    assert "belongs to sandbox 'first'" in refused.stderr
    assert host.names() == ["first"]


def test_a_name_belongs_to_one_domain(host: SandboxHost) -> None:
    box = host.make("box")
    with pytest.raises(RefusedError, match="already"):
        host.make("box")
    assert host.out(box, "hostname") == "box"


def test_a_segment_that_does_not_exist(host: SandboxHost, untouched: None) -> None:
    with pytest.raises(VirtgridError, match="cannot start sandbox 'box'"):
        host.make(bridge="nowhere")


def test_a_template_without_sshd_is_told(host: SandboxHost, untouched: None) -> None:
    name = f"{host.template}x"
    templates = Path("/var/lib/virtgrid/templates")
    shutil.copytree(templates / host.template, templates / name, symlinks=True)
    try:
        (templates / name / "tree/etc/virtgrid/init").write_text("#!/bin/sh\nexec /usr/sbin/no-sshd\n")
        with pytest.raises(VirtgridError, match="ended"):
            host.make(template=name)
        (templates / name / "tree/etc/virtgrid/init").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
        with pytest.raises(VirtgridError, match="does not answer"):
            host.inside(lambda sandboxes: _soon(host, sandboxes, name))
        host.destroy()
    finally:
        shutil.rmtree(templates / name)


async def _soon(host: SandboxHost, sandboxes: Sandboxes, template: str) -> None:
    spec = host.spec(template=template)
    await sandboxes.prepare(spec)
    await sandboxes.wait_ready(await sandboxes.start(spec.name), timeout_s=0.3)


def _xml(host: SandboxHost, name: str = "box", **more: str) -> str:
    account = root.Account(name="ann", uid=4101, gid=4101, home=str(host.homes / "ann"))
    return domain.build(
        host.spec(name, **more), account, base=0x70000000, uuid="e3bfae3d-6a48-4b49-9a2f-1c8f5b5d7a11"
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (r'template="[^"]*"', 'template="../../../etc"', "cannot be the name of a template"),
        (r'template="[^"]*"', 'template="a:b,upperdir=/etc"', "cannot be the name of a template"),
        (r'template="[^"]*"', 'template="a&#10;b"', "cannot be the name of a template"),
        (r'user="grid"', 'user="root"', "cannot be a user"),
        (r'user="grid"', 'user="../x"', "cannot be a user"),
        (r'user="grid"', f'user="{"x" * 65}"', "cannot be a user"),
        (r'account="ann"', 'account="nobody-knows"', "no account"),
        (r'account="ann"', 'account="bea"', "not the home directory of 'bea'"),
        (r'layer-bytes="\d*"', 'layer-bytes="9,mode=777"', "not the layer"),
        (r'layer-bytes="\d*"', 'layer-bytes="1"', "cannot be"),
        (r'layer-bytes="\d*"', 'layer-bytes="16777216" lower="/etc"', "unknown attribute 'lower'"),
        (f"{STATE}/box/root", "/etc", "/ must come from"),
        (f"{STATE}/box/root", f"{STATE}/box/../../../../root", "/ must come from"),
        (f"{STATE}/box/layer/ssh", "/root/.ssh", "must come from"),
        (r'<source dir="/opt"/>', '<source dir="/root"/>', "/opt must come from /opt, read-only"),
        (r"<readonly/>", "", "read-only"),
        (r"<console", '<filesystem type="mount"><source dir="/"/><target dir="/host"/></filesystem><console',
         "nothing else"),
        (r"<console", '<interface type="bridge"><source bridge="br0"/></interface><console', "one interface"),
    ],
)  # fmt: skip
def test_the_hook_refuses_metadata_that_leads_elsewhere(
    host: SandboxHost, untouched: None, tmp_path: Path, old: str, new: str, words: str
) -> None:
    file = tmp_path / "box.xml"
    text, changed = re.subn(old, new, _xml(host))
    assert changed
    file.write_text(text)
    refused = host.virsh("create", str(file), check=False)
    assert refused.returncode != 0
    assert words in refused.stderr
    assert "virtgrid: " in refused.stderr
    host.wait_clean()


def test_a_name_libvirt_takes_and_a_path_cannot(host: SandboxHost, untouched: None, tmp_path: Path) -> None:
    for name in ("a:b", "a,b", "..", "x" * 65):
        file = tmp_path / "box.xml"
        file.write_text(_xml(host).replace("<name>box</name>", f"<name>{name}</name>"))
        refused = host.virsh("create", str(file), check=False)
        assert refused.returncode != 0
        assert "cannot be the name of a sandbox" in refused.stderr
    assert not host.site.run(["ls", "-A", f"{STATE}/.."]).stdout.count("layer")


def test_a_link_in_the_place_of_a_sandbox_is_left_alone(host: SandboxHost, tmp_path: Path) -> None:
    place = host.site.plan.root / "sandboxes/box"
    place.symlink_to(tmp_path)
    (tmp_path / "layer").mkdir()
    try:
        with pytest.raises(RefusedError, match="symbolic link"):
            host.make("box")
        assert (tmp_path / "layer").is_dir()
    finally:
        place.unlink()
