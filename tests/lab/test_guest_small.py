"""The small guest in a real lab: it serves, checks its memory, and goes when told to."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virtgrid.core.errors import LabError, NotFoundError, RefusedError
from virtgrid.lab import guest
from virtgrid.lab.guest import GuestSpec
from virtgrid.lab.image import cached_images, ensure_image, sha256_file
from virtgrid.lab.lab import Lab

pytestmark = pytest.mark.lab

ANSWER_S = 60.0  # a limit for a loaded machine, not what it takes


@pytest.fixture(scope="module")
def web(lab: Lab) -> Iterator[GuestSpec]:
    spec = GuestSpec(
        name="gweb",
        address="10.77.0.110",
        memcheck_pages=48,
        dirty_bytes_s=400_000,
        disk_write_bytes_s=65_536,
    )
    guest.boot(lab, "alice", spec)
    guest.wait_answering(lab, spec, deadline_s=ANSWER_S)
    yield spec
    guest.destroy(lab, "alice", "gweb")


def until(true: Callable[[], bool], what: str, deadline_s: float = ANSWER_S) -> None:
    end_s = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end_s, f"after {deadline_s:.0f} s not yet: {what}"
        time.sleep(0.1)


def running(lab: Lab, site: str, name: str) -> bool:
    return any(status.name == name and status.running for status in guest.guests(lab, site))


def known(lab: Lab, site: str, name: str) -> bool:
    """Whether a domain or anything below the site's images has this name."""
    files = list(lab.site(site).images.glob(f"*{name}*")) + list(lab.site(site).images.glob(f".{name}*"))
    return bool(files) or name in [status.name for status in guest.guests(lab, site)]


def test_it_serves_the_workloads_urls(lab: Lab, web: GuestSpec) -> None:
    for path, least_bytes in (
        ("/page/49.html", 2_000),
        ("/img/199.gif", 1_000),
        ("/download/9.bin", 4 * 2**20),
        ("/slow/page/0.html", 2_000),
        ("/slow/900k/page/0.html", 2_000),
        ("/data/download/0.bin", 4 * 2**20),
    ):
        # decoded as text with replacements: at least one character for every three bytes or so
        assert len(guest.http_get(lab, web.address, path, deadline_s=ANSWER_S)) >= least_bytes / 4, path
    assert guest.http_get(lab, web.address, "/vg/name", deadline_s=ANSWER_S) == "gweb\n"


def test_it_takes_uploads(lab: Lab, web: GuestSpec) -> None:
    post = (
        "import http.client, sys; c = http.client.HTTPConnection(sys.argv[1], timeout=30); "
        "c.request('POST', '/upload', bytes(1 << 20)); print(c.getresponse().status)"
    )
    argv = lab.client.argv(["python3", "-I", "-c", post, web.address])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "204"


def test_its_memory_check_runs_and_is_clean(lab: Lab, web: GuestSpec) -> None:
    first = guest.memcheck_state(lab, web)
    until(lambda: guest.memcheck_state(lab, web).iterations > first.iterations, "another round")
    state = guest.memcheck_state(lab, web)
    assert (state.pages, state.corrupt) == (48, 0)
    assert "CORRUPT" not in guest.console(lab, "alice", "gweb")


def test_it_writes_to_its_disk_when_asked_to(lab: Lab, web: GuestSpec) -> None:
    before = _written_bytes(lab)
    until(lambda: _written_bytes(lab) >= before + 65_536, "another slot written")


def _written_bytes(lab: Lab) -> int:
    stats = guest.virsh(lab.site("alice"), "domblkstat", "gweb", "vda")
    return next(int(line.split()[2]) for line in stats.splitlines() if line.split()[1] == "wr_bytes")


def test_it_is_listed_with_its_address(lab: Lab, web: GuestSpec) -> None:
    status = next(status for status in guest.guests(lab, "alice") if status.name == "gweb")
    assert (status.running, status.address) == (True, web.address)
    assert "gweb" not in [status.name for status in guest.guests(lab, "bob")]


def test_booting_it_twice_is_refused_and_leaves_the_first_alone(lab: Lab, web: GuestSpec) -> None:
    with pytest.raises(RefusedError, match="has a domain 'gweb' already"):
        guest.boot(lab, "alice", web)
    guest.wait_answering(lab, web, deadline_s=ANSWER_S)


def test_a_guest_that_does_not_start_leaves_no_domain_and_no_disk(lab: Lab) -> None:
    with pytest.raises(LabError):
        guest.boot(lab, "bob", GuestSpec(name="lost", address="10.77.0.112", bridge="nosuchbridge"))
    assert not known(lab, "bob", "lost")


def test_a_larger_qcow2_disk_is_usable_whole_and_the_power_button_ends_it(lab: Lab) -> None:
    spec = GuestSpec(name="shop", address="10.77.0.111", disk_format="qcow2", disk_size_bytes=256 * 2**20)
    guest.boot(lab, "bob", spec)
    try:
        guest.wait_answering(lab, spec, deadline_s=ANSWER_S)
        guest.virsh(lab.site("bob"), "shutdown", "shop")
        until(lambda: not running(lab, "bob", "shop"), "powered off")
        assert "power button" in guest.console(lab, "bob", "shop")
        disk = lab.site("bob").images / spec.disk_name
        flat = disk.with_suffix(".flat")
        subprocess.run(["qemu-img", "convert", "-O", "raw", disk, flat], check=True, timeout=60)
        # Left clean by the shutdown, and as large as it was asked to be.
        subprocess.run(["fsck.ext4", "-n", "-f", flat], check=True, timeout=60, capture_output=True)
        superblock = flat.read_bytes()[1024:2048]
        blocks, block_bytes = int.from_bytes(superblock[4:8], "little"), 1024 << superblock[24]
        assert blocks * block_bytes == 256 * 2**20
        flat.unlink()
    finally:
        guest.destroy(lab, "bob", "shop")
    assert not known(lab, "bob", "shop")


def test_destroying_what_is_not_there_says_so(lab: Lab) -> None:
    with pytest.raises(NotFoundError, match="bob has no guest 'ghost'"):
        guest.destroy(lab, "bob", "ghost")


def test_two_processes_building_at_once_share_one_image_equal_to_any_other_build(tmp_path: Path) -> None:
    ours = ensure_image("small")
    # The kernel package need not be downloaded again for this.
    (tmp_path / "packages").symlink_to(ours.directory.parent / "packages")
    program = "from virtgrid.lab.image import ensure_image; ensure_image('small', progress=print)"
    environment = {**os.environ, "VIRTGRID_CACHE_DIR": str(tmp_path)}
    builders = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [builder.communicate(timeout=120)[0] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    assert sum("building the small guest image" in text for text in said) == 1
    (built,) = cached_images(tmp_path)
    assert built.key == ours.key
    assert sha256_file(built.initrd) == sha256_file(ours.initrd)
    assert sha256_file(built.kernel) == sha256_file(ours.kernel)
