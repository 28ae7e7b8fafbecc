"""A domain that arrives, made to fit this host: bridges and paths that are called otherwise here.

Run by the ``qemu`` hook within libvirtd's time: the standard library only. The XML comes from the source's
libvirtd and is not trusted: no document type, a limit of size, and what is put in comes from this host's
configuration alone.
"""

import os
import re
import tomllib
from xml.etree import ElementTree

LIMIT_BYTES = 1 << 20
_BRIDGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")
_DEPTH = 64
#: Where files of the host stand in a domain's XML, and in which attribute.
_PATHS = (
    ("devices/disk/source", "file"),
    ("devices/disk/source", "dev"),
    ("devices/filesystem/source", "dir"),
)


class IncomingError(Exception):
    """A sentence for libvirt's log and whoever migrates."""


def configured(path: str) -> "tuple[dict[str, str], dict[str, str]] | None":
    """``[incoming]`` of the configuration -> (bridges, paths); None: nothing is to be changed.

    Errors: IncomingError naming the file.
    """
    try:
        with open(path, "rb") as file:
            section = tomllib.load(file).get("incoming")
    except (OSError, ValueError) as error:
        raise IncomingError(f"{path} cannot be read: {error}") from None
    if not section:
        return None
    try:
        bridges, paths = dict(section.get("bridges", {})), dict(section.get("paths", {}))
    except (AttributeError, TypeError, ValueError):
        raise IncomingError(f"{path}: [incoming] has the tables bridges and paths") from None
    for there, here in bridges.items():
        if not all(isinstance(name, str) and _BRIDGE.fullmatch(name) for name in (there, here)):
            raise IncomingError(f"{path}: incoming.bridges: '{there}' or its other name is no bridge's")
    for there, here in paths.items():
        if not all(isinstance(one, str) and _is_plain(one) for one in (there, here)):
            raise IncomingError(
                f"{path}: incoming.paths: '{there}' or its other name is no plain absolute path"
            )
    return (bridges, paths) if bridges or paths else None


def adapt(text: bytes, maps: "tuple[dict[str, str], dict[str, str]]") -> "bytes | None":
    """The domain with this host's names; None: there is nothing to change. Errors: IncomingError."""
    if len(text) > LIMIT_BYTES:
        raise IncomingError("the arriving domain's XML is too large")
    root = _read(text)
    bridges, paths = maps
    changed = False
    for source in root.iterfind("devices/interface/source"):
        here = bridges.get(source.get("bridge", ""))
        if here is not None:
            source.set("bridge", here)
            changed = True
    for place, attribute in _PATHS:
        for source in root.iterfind(place):
            here = _here(source.get(attribute, ""), paths)
            if here is not None:
                source.set(attribute, here)
                changed = True
    return ElementTree.tostring(root) if changed else None


def _here(path: str, paths: "dict[str, str]") -> "str | None":
    """The path below this host's directory; the longest directory that fits counts."""
    fitting = [there for there in paths if path == there or path.startswith(there.rstrip("/") + "/")]
    if not fitting:
        return None
    if not _is_plain(path):
        raise IncomingError(f"the arriving domain names {path[:200]!r}, which is no plain path")
    there = max(fitting, key=len)
    return paths[there].rstrip("/") + path[len(there.rstrip("/")) :]


def _is_plain(path: str) -> bool:
    """Absolute, and what it seems: no way up out of a directory."""
    return path.startswith("/") and os.path.normpath(path) == path and path.isprintable()


class _NoDoctype(ElementTree.TreeBuilder):
    @staticmethod
    def doctype(*_: object) -> None:
        """libvirt writes none, so one means harm."""
        raise IncomingError("the arriving domain's XML has a document type declaration")


def _read(text: bytes) -> ElementTree.Element:
    """The XML as a tree that is written back with the prefixes it had."""
    parser = ElementTree.XMLParser(target=_NoDoctype(insert_comments=True))
    depth = 0
    try:
        if b"<!DOCTYPE" in text:  # before expat sees what it declares
            _NoDoctype.doctype()
        parser.feed(text)
        root = parser.close()
    except ElementTree.ParseError as error:
        raise IncomingError(f"the arriving domain's XML cannot be read: {error}") from None
    for prefix, uri in re.findall(rb'xmlns:([A-Za-z_][\w.-]{0,63})=["\']([^"\'<>&]{1,200})["\']', text):
        if not re.match(rb"(ns\d+|xml.*)$", prefix):
            ElementTree.register_namespace(prefix.decode(), uri.decode(errors="replace"))
    if root.tag != "domain":
        raise IncomingError(f"what arrives is no domain but <{str(root.tag)[:80]}>")
    level = [root]
    while level:
        depth += 1
        if depth > _DEPTH:
            raise IncomingError("the arriving domain's XML is nested too deep")
        level = [child for element in level for child in element]
    return root
