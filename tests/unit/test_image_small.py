"""What goes into the guest images."""

from __future__ import annotations

from pathlib import Path

import pytest

from virtgrid.core.errors import LabError
from virtgrid.lab import image_content
from virtgrid.lab.image_small import modules_in_order


def _module(directory: Path, name: str, depends: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    info = b"license=GPL\0depends=" + depends.encode() + b"\0name=x\0"
    (directory / f"{name}.ko").write_bytes(b"\x7fELF\0\0" + info + b"rest")


def test_modules_come_after_what_they_depend_on(tmp_path: Path) -> None:
    _module(tmp_path / "net", "virtio-net", "virtio,virtio_ring,net_failover")
    _module(tmp_path / "net", "net_failover", "failover")
    _module(tmp_path / "net", "failover", "")
    _module(tmp_path / "v", "virtio", "virtio_ring")
    _module(tmp_path / "v", "virtio_ring", "")
    order = [path.stem for path in modules_in_order(tmp_path, ["virtio_net", "virtio"])]
    assert order == ["virtio_ring", "virtio", "failover", "net_failover", "virtio-net"]


def test_a_module_the_kernel_lacks_is_named(tmp_path: Path) -> None:
    _module(tmp_path, "virtio", "virtio_ring")
    with pytest.raises(LabError, match="no module 'virtio_ring'"):
        modules_in_order(tmp_path, ["virtio"])


def test_pages_and_images_have_the_workloads_sizes_in_every_build(tmp_path: Path) -> None:
    sizes = []
    for build in ("one", "two"):
        image_content.write_pages(tmp_path / build)
        sizes.append(
            [
                (path.name, path.stat().st_size)
                for kind in ("page", "img")
                for path in sorted((tmp_path / build / kind).iterdir())
            ]
        )
    assert sizes[0] == sizes[1]
    pages = [size for name, size in sizes[0] if name.endswith(".html")]
    images = [size for name, size in sizes[0] if name.endswith(".gif")]
    assert len(pages) == 50
    assert len(images) == 200
    assert all(2_000 <= size <= 40_000 for size in pages)
    assert all(1_000 <= size <= 30_000 for size in images)


def test_downloads_are_large_transfers_that_take_little_disk(tmp_path: Path) -> None:
    image_content.write_downloads(tmp_path / "download")
    files = sorted((tmp_path / "download").iterdir())
    assert [path.name for path in files] == [f"{number}.bin" for number in range(10)]
    assert min(path.stat().st_size for path in files) >= 4 * 2**20
    assert sum({path.stat().st_ino: path.stat().st_size for path in files}.values()) <= 12 * 2**20
