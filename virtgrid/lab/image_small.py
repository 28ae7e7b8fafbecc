"""The small guest: Debian's cloud kernel, busybox, nginx and our two little programs.

Everything that runs is in the initramfs; the disk holds what makes a disk worth migrating
(downloads, uploads, a log). It answers some seconds after it was created, without KVM.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from virtgrid.core.errors import LabError
from virtgrid.lab import image_content
from virtgrid.lab.image import (
    GUESTFILES,
    Progress,
    Recipe,
    apt_show,
    fetch_package,
    installed_version,
    make_ext4,
    run,
    sha256_file,
)

DISK_BYTES: Final = 64 * 2**20
KERNEL_META_PACKAGE: Final = "linux-image-cloud-amd64"
# What the guest needs beyond what Debian builds into the kernel. Dependencies are looked up.
MODULES: Final = ("virtio_pci", "virtio_blk", "virtio_net", "button", "evdev", "pvpanic_mmio")
_SOURCES: Final = ("init", "power-button", "nginx.conf", "memcheck.c", "dirty.c")
BUSYBOX: Final = Path("/usr/bin/busybox")
_NGINX: Final = Path("/usr/sbin/nginx")


class SmallBuilder:
    """Builds the small guest; see the module."""

    cmdline = "console=ttyS0 quiet mitigations=off"

    def recipe(self) -> Recipe:
        """Hash of our sources, of the host's binaries, and the versions of the rest."""
        here = Path(__file__).parent
        sources = [*(GUESTFILES / name for name in _SOURCES)]
        sources += [here / name for name in ("image.py", "image_content.py", "image_small.py")]
        package, version = kernel_package()
        binaries = [BUSYBOX, _NGINX, *shared_libraries(_NGINX)]
        return Recipe(
            kind="small",
            sources={path.name: sha256_file(path) for path in sources},
            packages={
                package: version,
                **{name: installed_version(name) for name in ("gcc", "libc6-dev", "busybox-static", "nginx")},
            },
            binaries={str(path): sha256_file(path) for path in binaries},
        )

    def build(self, into: Path, cache_dir: Path, progress: Progress) -> None:
        """Unpack the kernel, lay out the root file system, pack it, make the disk."""
        package, version = kernel_package()
        deb = fetch_package(package, version, cache_dir, progress)
        with tempfile.TemporaryDirectory(prefix="work-", dir=into) as text:
            work = Path(text)
            progress("unpacking the kernel")
            run(["dpkg-deb", "-x", str(deb), str(work / "kernel")], deadline_s=120)
            (vmlinuz,) = (work / "kernel/boot").glob("vmlinuz-*")
            shutil.copyfile(vmlinuz, into / "kernel")
            progress("laying out the root file system")
            root = work / "root"
            _lay_out_root(root, work / "kernel")
            pack_initramfs(root, into / "initrd")
            progress("making the disk")
            image_content.write_downloads(work / "disk/download")
            make_ext4(into / "disk", tree=work / "disk", size_bytes=DISK_BYTES)


@functools.cache
def kernel_package() -> tuple[str, str]:
    """Name and version of the package that the meta package stands for today.

    Asked once per process: apt takes most of a second to say it.
    """
    fields = apt_show([KERNEL_META_PACKAGE])[KERNEL_META_PACKAGE]
    match = re.search(r"(linux-image-\S+) \(= ([^)]+)\)", fields.get("Depends", ""))
    if not match:
        raise LabError(
            f"apt does not say which kernel {KERNEL_META_PACKAGE} stands for", cause=fields.get("Depends")
        )
    return match[1], match[2]


def shared_libraries(program: Path) -> list[Path]:
    """The libraries a program is started with, the dynamic loader included, sorted."""
    found = re.findall(r"(/\S+) \(0x[0-9a-f]+\)", run(["ldd", str(program)], deadline_s=30))
    return sorted({Path(path) for path in found})


def modules_in_order(kernel_tree: Path, wanted: Iterable[str]) -> list[Path]:
    """The .ko files to load, each after what it depends on.

    Read from the modules themselves (``depends`` in .modinfo): the package has no modules.dep,
    its installation would run depmod on the host.
    """
    files = {path.stem.replace("-", "_"): path for path in sorted(kernel_tree.rglob("*.ko"))}
    order: dict[str, Path] = {}

    def add(name: str) -> None:
        if name in order:
            return
        if name not in files:
            raise LabError(f"the kernel package has no module '{name}'")
        match = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
        for dependency in match[1].decode().split(",") if match else ():
            if dependency:
                add(dependency.replace("-", "_"))
        order[name] = files[name]

    for name in wanted:
        add(name)
    return list(order.values())


def _lay_out_root(root: Path, kernel_tree: Path) -> None:
    for name in (
        "bin",
        "sbin",
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "data",
        "www",
        "etc/acpi/PWRF",
        "lib/modules",
    ):
        (root / name).mkdir(parents=True)
    for name in ("var/log/nginx", "var/lib/nginx", "usr/share/nginx", "usr/sbin"):
        (root / name).mkdir(parents=True)  # compiled into nginx, which wants them there
    install(BUSYBOX, root / "bin/busybox")
    install(_NGINX, root / "usr/sbin/nginx")
    for library in shared_libraries(_NGINX):
        install(library, root / library.relative_to("/"))
    for name in ("memcheck", "dirty"):
        compile_guest_program(name, root / "bin" / name)
    install_modules(root, kernel_tree, MODULES)
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    install(GUESTFILES / "nginx.conf", root / "etc/nginx.conf")
    install(GUESTFILES / "init", root / "init", mode=0o755)
    install(GUESTFILES / "power-button", root / "etc/acpi/PWRF/00000080", mode=0o755)
    image_content.write_pages(root / "www")
    (root / "www/download").symlink_to("/data/download")
    (root / "www/data").symlink_to("/data")


def compile_guest_program(name: str, target: Path) -> None:
    """Compile one of guestfiles/*.c; static, so that it runs in any guest."""
    source = str(GUESTFILES / f"{name}.c")
    argv = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s", source, "-o", str(target)]
    run(argv, deadline_s=120)


def install_modules(root: Path, kernel_tree: Path, wanted: Iterable[str]) -> None:
    """Copy kernel modules to /lib/modules, with a file ``order`` that says how to load them."""
    modules = modules_in_order(kernel_tree, wanted)
    for module in modules:
        install(module, root / "lib/modules" / module.name)
    (root / "lib/modules/order").write_text("".join(f"{module.stem}\n" for module in modules))


def install(source: Path, target: Path, *, mode: int | None = None) -> None:
    """Copy a file, its directories made, with the mode given or its own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode if mode is not None else source.stat().st_mode & 0o777)


def pack_initramfs(root: Path, target: Path) -> None:
    """A directory tree as a newc archive, owned by root.

    Not compressed: unpacking is what an emulated processor does worst, half a second of boot.
    """
    for path in [root, *root.rglob("*")]:
        os.utime(path, (0, 0), follow_symlinks=False)  # the same bytes whenever it is built
    names = [".", *sorted(str(path.relative_to(root)) for path in root.rglob("*"))]
    argv = ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0", "--reproducible", "-O", str(target)]
    run(argv, cwd=root, stdin="\n".join(names).encode() + b"\n", deadline_s=120)
