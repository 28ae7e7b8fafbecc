"""Guests of a lab: described, booted, asked, destroyed.

libvirt is spoken to through ``virsh``, as the person at the lab would: the lab must not share
connections, or their bugs, with what is tested in it.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from lxml import etree

import virtgrid
from virtgrid.core.errors import LabError, NotFoundError, RefusedError, UsageError
from virtgrid.lab.image import KINDS, GuestImage, Progress, ensure_image, run, silent

# Small: below, the kernel and its unpacked initramfs do not fit. Debian: one Apache process for
# each connection.
MIN_MEMORY_MIB: Final = {"small": 128, "debian": 256}
DEFAULT_MEMORY_MIB: Final = {"small": 192, "debian": 512}
# The same paths inside every site: each has its own file system there.
SITE_IMAGES: Final = Path("/var/lib/libvirt/images")
SITE_LOGS: Final = Path("/var/log/libvirt/qemu")
_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
_DISK_FORMATS: Final = ("raw", "qcow2")


class Place(Protocol):
    """Somewhere in the lab where commands can be run."""

    def argv(self, command: Sequence[str]) -> list[str]:
        """The argument list that, run on the host, runs the command there."""
        ...


class Site(Place, Protocol):
    """One libvirtd. ``images`` is its /var/lib/libvirt/images as the host sees it."""

    @property
    def name(self) -> str: ...

    @property
    def uri(self) -> str: ...

    @property
    def images(self) -> Path: ...


class Lab(Protocol):
    """The part of a lab that guests live in: its sites by name, and the network of its clients."""

    @property
    def client(self) -> Place: ...

    def site(self, name: str) -> Site: ...


def check_name(name: str) -> str:
    """The name of a guest, or UsageError. It becomes part of file names."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot be a guest's name", hint="up to 32 small letters, digits and hyphens"
        )
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSpec:
    """What a guest is to be. UsageError when it cannot be that.

    disk_size_bytes: virtual size; None means the size of the image's template.
    memcheck_pages: pages the guest checks in a tight loop, 0 for none.
    dirty_bytes_s, disk_write_bytes_s: memory and disk rewritten at this rate.
    """

    name: str
    image: str = "small"
    memory_mib: int = 192
    vcpus: int = 1
    address: str = "10.77.0.10"
    prefix_length: int = 24
    gateway: str = "10.77.0.1"
    disk_size_bytes: int | None = None
    disk_format: str = "raw"
    memcheck_pages: int = 0
    dirty_bytes_s: int = 0
    disk_write_bytes_s: int = 0
    machine: str = "pc-i440fx-7.2"
    cpu: str = "qemu64"
    bridge: str = "br0"
    extra_cmdline: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.image not in KINDS:
            raise UsageError(f"there is no guest image '{self.image}'", hint=f"one of: {', '.join(KINDS)}")
        if self.disk_format not in _DISK_FORMATS:
            raise UsageError(
                f"a guest's disk cannot be '{self.disk_format}'", hint=f"one of: {', '.join(_DISK_FORMATS)}"
            )
        for label, text in (("address", self.address), ("gateway", self.gateway)):
            try:
                ipaddress.IPv4Address(text)
            except ValueError as error:
                raise UsageError(f"'{text}' is not an IPv4 {label}", cause=str(error)) from error
        lowest = {
            "memory_mib": MIN_MEMORY_MIB[self.image], "vcpus": 1, "memcheck_pages": 0, "dirty_bytes_s": 0,
            "disk_write_bytes_s": 0, "disk_size_bytes": 1,
        }  # fmt: skip
        for field, least in lowest.items():
            value = getattr(self, field)
            if value is not None and value < least:
                raise UsageError(f"{field} is {value}, it must be at least {least}")
        if not 1 <= self.prefix_length <= 30:
            raise UsageError(f"prefix_length is {self.prefix_length}, it must be from 1 to 30")

    @property
    def mac(self) -> str:
        """From the address: whoever has the address cached finds the guest again."""
        octets = ipaddress.IPv4Address(self.address).packed
        return "52:54:00:" + ":".join(f"{octet:02x}" for octet in octets[1:])

    @property
    def disk_name(self) -> str:
        """File name below /var/lib/libvirt/images."""
        return f"{self.name}.{self.disk_format}"

    def cmdline(self, image: GuestImage) -> str:
        """The kernel command line: the image's own words, then ours, then the caller's."""
        words = [
            image.cmdline,
            f"vg.ip={self.address}/{self.prefix_length}",
            f"vg.gw={self.gateway}",
            f"vg.name={self.name}",
        ]
        for key, value in (
            ("memcheck", self.memcheck_pages),
            ("dirty", self.dirty_bytes_s),
            ("diskwrite", self.disk_write_bytes_s),
        ):
            if value:
                words.append(f"vg.{key}={value}")
        return " ".join([*words, *self.extra_cmdline.split()])


@dataclass(frozen=True, slots=True, kw_only=True)
class MemcheckState:
    """What the guest's memory checker last published. ``corrupt`` counts damaged pages."""

    pages: int
    iterations: int
    corrupt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestStatus:
    """A domain of a site. ``address`` is None for a domain that is no guest of ours."""

    name: str
    site: str
    running: bool
    address: str | None


# --- the domain's XML -------------------------------------------------------------------------


def template_path(name: str = "guest-qemu.xml") -> Path:
    """A file of xml-templates/: inside the installed package, or beside it in a source tree."""
    package = Path(virtgrid.__file__).parent
    for directory in (package / "xml-templates", package.parent / "xml-templates"):
        if (directory / name).is_file():
            return directory / name
    raise NotFoundError(f"the template {name} is missing", hint="install virtgrid again")


def domain_xml(spec: GuestSpec, image: GuestImage, *, disk_cache: str = "none") -> str:
    """The template with this guest's values put in. ``disk_cache``: see :func:`disk_cache_mode`."""
    root = etree.parse(template_path(), etree.XMLParser(remove_comments=True)).getroot()

    def at(path: str) -> etree._Element:
        element = root.find(path)
        if element is None:
            raise LabError(f"the template guest-qemu.xml lacks <{path}>")
        return element

    at("name").text = spec.name
    at("memory").text = str(spec.memory_mib * 1024)
    at("vcpu").text = str(spec.vcpus)
    at("os/type").set("machine", spec.machine)
    at("os/kernel").text = str(image.kernel)
    at("os/initrd").text = str(image.initrd)
    at("os/cmdline").text = spec.cmdline(image)
    at("cpu/model").text = spec.cpu
    driver = at("devices/disk/driver")
    driver.set("type", spec.disk_format)
    driver.set("cache", disk_cache)
    at("devices/disk/source").set("file", str(SITE_IMAGES / spec.disk_name))
    at("devices/interface/mac").set("address", spec.mac)
    at("devices/interface/source").set("bridge", spec.bridge)
    at("devices/serial/source").set("path", str(SITE_LOGS / f"{spec.name}-console.log"))
    return etree.tostring(root, encoding="unicode", pretty_print=True)


def disk_cache_mode(directory: Path) -> str:
    """``none`` where the file system does O_DIRECT, else ``writeback``.

    Both are safe to migrate with copied storage; none keeps the mirror's last flush, which is
    part of the pause, short.
    """
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".direct-") as file:
        try:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
        except OSError:
            return "writeback"
    return "none"


def make_disk(spec: GuestSpec, image: GuestImage, target: Path) -> None:
    """A copy of the image's template, grown to the size wanted, in the format wanted.

    RefusedError when the target exists or the size is below the template's.
    """
    size_bytes = spec.disk_size_bytes or image.disk_virtual_bytes
    if size_bytes < image.disk_virtual_bytes:
        raise RefusedError(
            f"a disk of {size_bytes} bytes is too small for the {image.kind} guest",
            hint=f"at least {image.disk_virtual_bytes} bytes",
        )
    if target.exists():
        raise RefusedError(f"{target} exists already", hint=f"virtgrid lab guest destroy {spec.name}")
    with tempfile.TemporaryDirectory(prefix=f".{spec.name}-", dir=target.parent) as text:
        draft = Path(text) / "disk"
        run(["cp", "--sparse=always", "--reflink=auto", str(image.disk), str(draft)], deadline_s=120)
        if size_bytes > image.disk_virtual_bytes:
            os.truncate(draft, size_bytes)
            run(["resize2fs", "-f", str(draft)], deadline_s=120)
        if spec.disk_format != "raw":
            converted = Path(text) / "converted"
            argv = ["qemu-img", "convert", "-f", "raw", "-O", spec.disk_format, str(draft), str(converted)]
            run(argv, deadline_s=300)
            draft = converted
        draft.rename(target)


# --- boot, ask, destroy -----------------------------------------------------------------------


def virsh(site: Site, *words: str, stdin: str = "", deadline_s: float = 60.0) -> str:
    """Standard output of a virsh command on a site. LabError with virsh's words if it fails."""
    return run(["virsh", "-q", "-c", site.uri, *words], stdin=stdin.encode(), deadline_s=deadline_s)


def boot(
    lab: Lab,
    site_name: str,
    spec: GuestSpec,
    *,
    image: GuestImage | None = None,
    cache_dir: Path | None = None,
    progress: Progress = silent,
) -> GuestImage:
    """Define and start a guest on a site; it need not answer yet (:func:`wait_answering`).

    The image, when none is given, is built when the cache lacks it. RefusedError when the site has such a
    domain or disk; after any failure neither is left.
    """
    site = lab.site(site_name)
    if spec.name in _names(site, "--all"):
        raise RefusedError(
            f"{site.name} has a domain '{spec.name}' already", hint=f"virtgrid lab guest destroy {spec.name}"
        )
    image = image or ensure_image(spec.image, cache_dir=cache_dir, progress=progress)
    disk = site.images / spec.disk_name
    with ExitStack() as undo:
        make_disk(spec, image, disk)
        undo.callback(disk.unlink, missing_ok=True)
        xml = domain_xml(spec, image, disk_cache=disk_cache_mode(site.images))
        virsh(site, "define", "/dev/stdin", stdin=xml)
        undo.callback(virsh, site, "undefine", spec.name)
        virsh(site, "start", spec.name, deadline_s=120)
        undo.pop_all()
    return image


def destroy(lab: Lab, site_name: str, name: str) -> None:
    """Stop a guest, forget it and remove its disk. NotFoundError when the site knows nothing of it."""
    site = lab.site(site_name)
    known = check_name(name) in _names(site, "--all")
    disks = [path for kind in _DISK_FORMATS if (path := site.images / f"{name}.{kind}").exists()]
    if not known and not disks:
        raise NotFoundError(f"{site.name} has no guest '{name}'", hint="virtgrid lab guest list")
    if known:
        if name in _names(site):
            virsh(site, "destroy", name)
        # A transient domain is gone once it is stopped.
        if name in _names(site, "--all"):
            virsh(site, "undefine", name)
    for disk in disks:
        disk.unlink(missing_ok=True)


def guests(lab: Lab, site_name: str) -> list[GuestStatus]:
    """The domains of a site, by name."""
    site = lab.site(site_name)
    running = set(_names(site))
    found = []
    for name in sorted(_names(site, "--all")):
        root = etree.fromstring(virsh(site, "dumpxml", name))
        match = re.search(r"\bvg\.ip=([0-9.]+)", root.findtext("os/cmdline") or "")
        found.append(
            GuestStatus(
                name=name, site=site.name, running=name in running, address=match[1] if match else None
            )
        )
    return found


def console(lab: Lab, site_name: str, name: str) -> str:
    """What the guest has printed on its serial console on this site."""
    return run(lab.site(site_name).argv(["cat", str(SITE_LOGS / f"{name}-console.log")]), deadline_s=30)


# Run by a Python of the client's network; asks until there is an answer. Short time-outs at first: a
# SYN sent before the guest is up is repeated by the kernel only after a second. They grow, because
# the lab's client may be far away.
_ASK: Final = """
import http.client, sys, time
host, path, end_s = sys.argv[1], sys.argv[2], time.monotonic() + float(sys.argv[3])
patience_s = 0.3
while True:
    asker = http.client.HTTPConnection(host, 80, timeout=patience_s)
    try:
        asker.connect()
        asker.sock.settimeout(max(patience_s, end_s - time.monotonic()))
        asker.request("GET", path)
        answer = asker.getresponse()
        if answer.status == 200:
            sys.stdout.buffer.write(answer.read())
            sys.exit(0)
        why = f"status {answer.status}"
    except TimeoutError as error:
        why = str(error)
        patience_s = min(patience_s * 1.3, 5.0)
    except (OSError, http.client.HTTPException) as error:
        why = str(error)
    finally:
        asker.close()
    if time.monotonic() >= end_s:
        sys.exit(why)
    time.sleep(0.05)
"""


def http_get(lab: Lab, address: str, path: str, *, deadline_s: float) -> str:
    """GET from the client network, repeated until the answer is 200; LabError after the deadline."""
    argv = [sys.executable, "-I", "-c", _ASK, address, path, str(deadline_s)]
    try:
        return run(lab.client.argv(argv), deadline_s=deadline_s + 10)
    except LabError as error:
        raise LabError(
            f"http://{address}{path} did not answer within {deadline_s:.0f} s", cause=error.cause
        ) from error


def wait_answering(lab: Lab, spec: GuestSpec, *, deadline_s: float = 60.0) -> None:
    """Return when the guest answers an HTTP request of the client; LabError after the deadline."""
    http_get(lab, spec.address, "/", deadline_s=deadline_s)


def memcheck_state(lab: Lab, spec: GuestSpec, *, deadline_s: float = 30.0) -> MemcheckState:
    """The guest's own account of its memory, not older than a second or so."""
    state = json.loads(http_get(lab, spec.address, "/vg/memcheck.json", deadline_s=deadline_s))
    return MemcheckState(
        pages=int(state["pages"]), iterations=int(state["iterations"]), corrupt=int(state["corrupt"])
    )


def _names(site: Site, *options: str) -> list[str]:
    return virsh(site, "list", "--name", *options).split()
