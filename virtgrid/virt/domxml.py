"""A domain's XML, read: what a migration needs to know of it. Pure; nothing is built from text.

Paths and names found here come from whoever may define domains; they are used as data for
libvirt's own calls, never as host paths of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lxml import etree

from virtgrid.core.errors import VirtgridError

_PARSER: Final = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """One disk. target: ``vda``; source: file path or None; backing: next file of its chain.

    alias: libvirt's name of the running device; the job that mirrors it is called ``drive-ALIAS``.
    """

    target: str
    alias: str | None
    kind: str
    device: str
    format: str
    source: str | None
    readonly: bool
    shareable: bool
    cache: str | None
    backing: str | None
    backing_format: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """One interface. tap: the host's device name while the domain runs. plugged: its link is not down."""

    mac: str
    kind: str
    source: str | None
    tap: str | None
    model: str | None
    plugged: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainXml:
    """What a migration needs to know of a domain."""

    name: str
    uuid: str
    virt_type: str
    memory_bytes: int
    arch: str
    machine: str
    emulator: str | None
    cpu_mode: str | None
    cpu_xml: str | None
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    host_devices: int


_MEMORY_UNITS: Final = {
    "b": 1, "bytes": 1, "kb": 10**3, "k": 2**10, "kib": 2**10, "mb": 10**6, "m": 2**20, "mib": 2**20,
    "gb": 10**9, "g": 2**30, "gib": 2**30, "tb": 10**12, "t": 2**40, "tib": 2**40,
}  # fmt: skip


def parse(xml: str) -> DomainXml:
    """Domain XML as libvirt gives it -> DomainXml. Errors: VirtgridError when it is none."""
    root = _read(xml, "domain")
    cpu = root.find("cpu")
    os_type = root.find("os/type")
    return DomainXml(
        name=root.findtext("name", ""),
        uuid=root.findtext("uuid", ""),
        virt_type=root.get("type", ""),
        memory_bytes=_memory_bytes(root.find("memory")),
        arch=os_type.get("arch", "") if os_type is not None else "",
        machine=os_type.get("machine", "") if os_type is not None else "",
        emulator=root.findtext("devices/emulator"),
        cpu_mode=cpu.get("mode", "custom") if cpu is not None else None,
        cpu_xml=etree.tostring(cpu, encoding="unicode") if cpu is not None else None,
        disks=tuple(_disk(element) for element in root.iterfind("devices/disk")),
        nics=tuple(_nic(element) for element in root.iterfind("devices/interface")),
        host_devices=len(root.findall("devices/hostdev")),
    )


def _unreadable(root: str, cause: str) -> VirtgridError:
    return VirtgridError(f"libvirt gave a {root} XML that cannot be read", cause=cause)


def _read(xml: str, root_name: str) -> etree._Element:
    """The root element of what libvirt gave us. libvirt writes no DOCTYPE, so one means harm."""
    try:
        root = etree.fromstring(xml.encode(), _PARSER)
    except (etree.XMLSyntaxError, UnicodeEncodeError) as error:
        raise _unreadable(root_name, str(error)) from error
    if root.tag != root_name:
        raise _unreadable(root_name, f"root is <{root.tag}>")
    if root.getroottree().docinfo.internalDTD is not None:
        raise _unreadable(root_name, "it has a document type declaration")
    return root


def _memory_bytes(element: etree._Element | None) -> int:
    if element is None:
        return 0
    try:
        return int(element.text or 0) * _MEMORY_UNITS[element.get("unit", "KiB").lower()]
    except (ValueError, KeyError) as error:
        raise _unreadable("domain", f"its memory is '{element.text}' '{element.get('unit')}'") from error


def _attr(element: etree._Element, path: str, name: str) -> str | None:
    found = element.find(path)
    return None if found is None else found.get(name)


def _disk(element: etree._Element) -> Disk:
    source = element.find("source")
    backing = _attr(element, "backingStore/source", "file")
    return Disk(
        target=_attr(element, "target", "dev") or "",
        alias=_attr(element, "alias", "name"),
        kind=element.get("type", ""),
        device=element.get("device", "disk"),
        format=_attr(element, "driver", "type") or "raw",
        source=None if source is None else source.get("file") or source.get("dev"),
        readonly=element.find("readonly") is not None,
        shareable=element.find("shareable") is not None,
        cache=_attr(element, "driver", "cache"),
        backing=backing,
        backing_format=_attr(element, "backingStore/format", "type"),
    )


def _nic(element: etree._Element) -> Nic:
    source = element.find("source")
    return Nic(
        mac=(_attr(element, "mac", "address") or "").lower(),
        kind=element.get("type", ""),
        source=None if source is None else source.get("bridge") or source.get("network"),
        tap=_attr(element, "target", "dev"),
        model=_attr(element, "model", "type"),
        plugged=_attr(element, "link", "state") != "down",
    )


def interface_xml(xml: str, mac: str, *, link: str) -> str | None:
    """The definition of one interface of a domain's XML with its link ``up`` or ``down``; None: no such."""
    for element in _read(xml, "domain").iterfind("devices/interface"):
        if (_attr(element, "mac", "address") or "").lower() == mac:
            state = element.find("link")
            if state is None:
                state = etree.SubElement(element, "link")
            state.set("state", link)
            return etree.tostring(element, encoding="unicode")
    return None


def volume_format(xml: str) -> str | None:
    """The image format a volume's XML names."""
    return _attr(_read(xml, "volume"), "target/format", "type")


def pool_xml(name: str, directory: str) -> str:
    """A transient directory pool over ``directory``."""
    root = etree.Element("pool", type="dir")
    etree.SubElement(root, "name").text = name
    etree.SubElement(etree.SubElement(root, "target"), "path").text = directory
    return etree.tostring(root, encoding="unicode")


def volume_xml(
    name: str,
    capacity_bytes: int,
    image_format: str,
    backing: str | None = None,
    backing_format: str | None = None,
) -> str:
    """A sparse volume of the given virtual size, over a backing file where there is one."""
    root = etree.Element("volume")
    etree.SubElement(root, "name").text = name
    etree.SubElement(root, "capacity", unit="bytes").text = str(capacity_bytes)
    etree.SubElement(root, "allocation", unit="bytes").text = "0"
    target = etree.SubElement(root, "target")
    etree.SubElement(target, "format", type=image_format)
    if backing:
        store = etree.SubElement(root, "backingStore")
        etree.SubElement(store, "path").text = backing
        etree.SubElement(store, "format", type=backing_format or "raw")
    return etree.tostring(root, encoding="unicode")
