"""A guest that has left is kept from running here again by QEMU's own image locks.

QEMU's side is played by a second open file description: such locks conflict within one process too.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtgrid.virt.fence import Fence

_FLOCK = struct.Struct("hhqqi4x")


class Qemu:
    """Locks as block/file-posix.c takes them for a writable image: uses read and write, denies write."""

    def __init__(self, image: Path) -> None:
        self._file = os.open(image, os.O_RDWR)

    def _set(self, kind: int, byte: int) -> None:
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))

    def run(self) -> bool:
        """Activate the image, as ``cont`` does; False when somebody denies writing to it."""
        self._set(fcntl.F_RDLCK, 101)
        self._set(fcntl.F_RDLCK, 201)
        asked = fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 201, 1, 0))
        if _FLOCK.unpack(asked)[0] == fcntl.F_UNLCK:
            return True
        self.let_go()
        return False

    def let_go(self) -> None:
        for byte in (101, 201):
            self._set(fcntl.F_UNLCK, byte)

    def close(self) -> None:
        os.close(self._file)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def qemu(image: Path) -> Iterator[Qemu]:
    qemu = Qemu(image)
    assert qemu.run()
    yield qemu
    qemu.close()


def _until_held(fence: Fence) -> None:
    end_s = time.monotonic() + 10
    while not fence.held:
        assert time.monotonic() < end_s, "the fence was not put up"
        time.sleep(0.001)


def test_a_guest_that_has_left_cannot_be_run_until_the_fence_is_dropped(image: Path, qemu: Qemu) -> None:
    fence = Fence([str(image)])
    fence.put_up(unless=lambda: False)
    qemu.let_go()
    _until_held(fence)
    assert not qemu.run()
    fence.drop()
    assert qemu.run()


def test_a_running_guest_is_not_disturbed(image: Path, qemu: Qemu) -> None:
    fence = Fence([str(image)])
    assert fence.possible
    fence.put_up(unless=lambda: False)
    assert not fence.held
    assert qemu.run()
    fence.drop()


def test_no_fence_where_the_other_side_cannot_have_run_it(image: Path, qemu: Qemu) -> None:
    fence = Fence([str(image)])
    qemu.let_go()
    asked: list[bool] = []
    fence.put_up(unless=lambda: not asked.append(True))
    end_s = time.monotonic() + 10
    while not asked:
        assert time.monotonic() < end_s
        time.sleep(0.001)
    fence.drop()
    assert qemu.run()


def test_an_image_that_qemu_does_not_lock_is_no_fence(image: Path) -> None:
    fence = Fence([str(image)])
    assert not fence.possible
    fence.put_up(unless=lambda: False)
    assert not fence.held
    fence.drop()
    fence.drop()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    fence = Fence([str(pipe), str(tmp_path), "/dev/null", str(tmp_path / "none"), "no\0path"])
    assert not fence.possible
    fence.drop()


def test_the_first_image_that_is_in_use_is_taken(tmp_path: Path, image: Path, qemu: Qemu) -> None:
    unused = tmp_path / "unused.raw"
    unused.write_bytes(b"")
    fence = Fence([str(unused), str(image)])
    fence.put_up(unless=lambda: False)
    qemu.let_go()
    _until_held(fence)
    assert not qemu.run()
    fence.drop()
