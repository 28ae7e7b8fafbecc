"""The Debian guest of the benchmarks: a real user space with Apache and PHP on its disk.

The same kernel and URLs as the small guest. Built by mmdebstrap from the host's own mirrors, in
minutes, when somebody asks for it. Not booted by systemd: under emulation that takes longer than
everything else, and the guest is there for its web server.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from virtgrid.core.errors import LabError, RefusedError
from virtgrid.lab import image_content
from virtgrid.lab.image import (
    GUESTFILES,
    Progress,
    Recipe,
    apt_versions,
    fetch_package,
    make_ext4,
    run,
    sha256_file,
)
from virtgrid.lab.image_small import (
    BUSYBOX,
    MODULES,
    compile_guest_program,
    install,
    install_modules,
    kernel_package,
    pack_initramfs,
)

DISK_BYTES: Final = 2**30
PACKAGES: Final = (
    "sysvinit-core",
    "acpid",
    "apache2",
    "libapache2-mod-php",
    "iproute2",
    "procps",
)
_SOURCES: Final = (
    "debian-initrd",
    "debian-service",
    "apache.conf",
    "page.php",
    "upload.php",
    "memcheck.c",
    "dirty.c",
)
_LEFT_OUT: Final = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")


class DebianBuilder:
    """Builds the Debian guest; see the module."""

    cmdline = "console=ttyS0 quiet mitigations=off"

    def recipe(self) -> Recipe:
        """Hash of our sources and the versions of the packages that matter."""
        here = Path(__file__).parent
        sources = [*(GUESTFILES / name for name in _SOURCES)]
        sources += [here / f"{name}.py" for name in ("image", "image_content", "image_debian", "image_small")]
        package, version = kernel_package()
        return Recipe(
            kind="debian",
            sources={path.name: sha256_file(path) for path in sources},
            packages={package: version, **apt_versions(PACKAGES)},
            binaries={str(BUSYBOX): sha256_file(BUSYBOX)},
        )

    def build(self, into: Path, cache_dir: Path, progress: Progress) -> None:
        """Kernel, an initramfs that finds the disk, and the disk."""
        if os.geteuid() != 0:
            raise RefusedError(
                "only root can build the Debian guest", hint="sudo virtgrid lab guest build debian"
            )
        package, version = kernel_package()
        deb = fetch_package(package, version, cache_dir, progress)
        with tempfile.TemporaryDirectory(prefix="work-", dir=into) as text:
            work = Path(text)
            progress("unpacking the kernel")
            run(["dpkg-deb", "-x", str(deb), str(work / "kernel")], deadline_s=120)
            (vmlinuz,) = (work / "kernel/boot").glob("vmlinuz-*")
            shutil.copyfile(vmlinuz, into / "kernel")
            _lay_out_initrd(work / "initrd", work / "kernel")
            pack_initramfs(work / "initrd", into / "initrd")
            progress("bootstrapping Debian with Apache and PHP (some minutes)")
            root = work / "root"
            _bootstrap(root)
            progress("configuring it")
            _configure(root)
            progress("making the disk")
            make_ext4(into / "disk", tree=root, size_bytes=DISK_BYTES)


def host_sources() -> tuple[str, list[str]]:
    """The host's release and its apt sources of that release, as lines for mmdebstrap.

    Backports are left out: the guest is stock Debian.
    """
    codename = next(
        (
            line.partition("=")[2].strip('"')
            for line in Path("/etc/os-release").read_text().splitlines()
            if line.startswith("VERSION_CODENAME=")
        ),
        "",
    )
    listed = run(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(REPO_URI) $(RELEASE) $(CODENAME) $(COMPONENT)",
            "Created-By: Packages",
        ],
        deadline_s=60,
    )
    suites = {codename, f"{codename}-updates", f"{codename}-security"}
    lines = []
    for line in listed.splitlines():
        uri, _release, suite, component = line.split()
        if suite in suites and f"deb {uri} {suite} {component}" not in lines:
            lines.append(f"deb {uri} {suite} {component}")
    if not lines:
        raise LabError(
            f"apt knows no mirror of {codename or 'this release'}", hint="see /etc/apt/sources.list"
        )
    return codename, lines


def _bootstrap(root: Path) -> None:
    codename, lines = host_sources()
    argv = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=directory"]
    argv.append(f"--include={','.join(PACKAGES)}")
    argv += [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
    argv.append('--aptopt=Acquire::Retries "3"')
    run([*argv, codename, str(root), *lines], deadline_s=1800)


def _configure(root: Path) -> None:
    apache = root / "etc/apache2"
    for module in ("rewrite.load", "ratelimit.load"):
        (apache / "mods-enabled" / module).symlink_to(f"../mods-available/{module}")
    (apache / "conf-enabled/other-vhosts-access-log.conf").unlink(missing_ok=True)
    for site in (apache / "sites-enabled").iterdir():
        site.unlink()
    install(GUESTFILES / "apache.conf", apache / "sites-enabled/virtgrid.conf", mode=0o644)
    served = root / "var/www/html"
    shutil.rmtree(served)
    image_content.write_pages(served)
    (served / "page").rename(root / "var/www/pages")
    image_content.write_downloads(served / "download")
    (served / "vg").mkdir()
    for name in ("page.php", "upload.php"):
        install(GUESTFILES / name, served / name, mode=0o644)
    for name in ("memcheck", "dirty"):
        compile_guest_program(name, root / "usr/local/bin" / name)
    install(GUESTFILES / "debian-service", root / "etc/init.d/virtgrid-guest", mode=0o755)
    run(["chroot", str(root), "update-rc.d", "virtgrid-guest", "defaults"], deadline_s=60)
    (root / "etc/acpi/events/power").write_text("event=button/power.*\naction=/sbin/poweroff\n")
    (root / "etc/fstab").write_text("/dev/vda / ext4 noatime 0 1\n")
    (root / "etc/hostname").write_text("guest\n")
    # The serial console is a file: nobody could log in.
    inittab = root / "etc/inittab"
    kept = [line for line in inittab.read_text().splitlines() if "getty" not in line]
    inittab.write_text("\n".join(kept) + "\n")


def _lay_out_initrd(root: Path, kernel_tree: Path) -> None:
    for name in ("bin", "proc", "dev", "root", "lib/modules"):
        (root / name).mkdir(parents=True)
    install(BUSYBOX, root / "bin/busybox")
    install_modules(root, kernel_tree, MODULES)
    install(GUESTFILES / "debian-initrd", root / "init", mode=0o755)
