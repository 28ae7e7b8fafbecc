"""What the `lxc` hook does for a domain with our metadata. hooks/README.md is the contract.

Only the standard library, quick to load, never libvirt: libvirtd waits for us.
"""

from __future__ import annotations

import os
import sys
from xml.parsers import expat

from virtgrid.grid.node import root

NAMESPACE = "https://virtgrid.example/xmlns/sandbox/1.0"
NOTICE_SOCKET = "/run/virtgrid/notice.sock"
_XML_LIMIT_BYTES = 1 << 20


class DomainFacts:
    """What the hook reads from a domain's XML. ours: our metadata's attributes, None without it."""

    def __init__(self) -> None:
        self.kind = ""
        self.name = ""
        self.ours: dict[str, str] | None = None
        self.mounts: dict[str, tuple[str, bool]] = {}
        """Target -> (source, read-only)."""
        self.addresses: list[str] = []
        self.bridges: list[str] = []
        self.ports: list[tuple[str, str]] = []
        """(bridge, the host's end of the cable)"""
        self.interfaces = 0
        self.base = 0


def read(text: bytes) -> DomainFacts:
    """Domain XML as libvirt hands it to hooks. Errors: RootError when it is none."""
    facts = DomainFacts()
    path: list[str] = []
    pending = {"source": "", "target": "", "readonly": ""}
    words: list[str] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        path.append(tag)
        words.clear()
        where = "/".join(path)
        if where == "domain":
            facts.kind = attributes.get("type", "")
        elif where == f"domain/metadata/{NAMESPACE} sandbox":
            facts.ours = dict(attributes)
        elif where == "domain/idmap/uid" and attributes.get("start") == "0":
            facts.base = _number(attributes.get("target", ""), "an id")
        elif where == "domain/devices/interface":
            facts.interfaces += 1
            pending.update(source="", target="")
        elif where == "domain/devices/filesystem":
            pending.update(source="", target="", readonly="")
        elif where == "domain/devices/interface/ip":
            facts.addresses.append(attributes.get("address", ""))
        elif where in ("domain/devices/filesystem/source", "domain/devices/interface/source"):
            pending["source"] = attributes.get("dir") or attributes.get("bridge", "")
        elif where in ("domain/devices/filesystem/target", "domain/devices/interface/target"):
            pending["target"] = attributes.get("dir") or attributes.get("dev", "")
        elif where == "domain/devices/filesystem/readonly":
            pending["readonly"] = "yes"

    def end(_: str) -> None:
        where = "/".join(path)
        if where == "domain/name":
            facts.name = "".join(words)
        elif where == "domain/devices/filesystem":
            facts.mounts[pending["target"]] = (pending["source"], bool(pending["readonly"]))
        elif where == "domain/devices/interface":
            facts.bridges.append(pending["source"])
            if pending["target"]:
                facts.ports.append((pending["source"], pending["target"]))
        path.pop()

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = words.append

    def refuse(*_: object) -> None:
        raise root.RootError("the domain's XML has a document type declaration")

    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise root.RootError(f"the domain's XML cannot be read: {error}") from None
    return facts


def _number(text: str, what: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise root.RootError(f"{text[:40]!r} is not {what}")
    return int(text)


def request_of(facts: DomainFacts, state: str = root.STATE) -> root.RootRequest:
    """The root a domain asks for. Pure. Errors: RootError naming what does not fit.

    The metadata names things, never places: a domain whose root lies elsewhere is refused.
    """
    ours = dict(facts.ours or {})
    name = root.check_name(facts.name, "sandbox")
    user = root.check_user(ours.pop("user", ""))
    account = ours.pop("account", user)
    template = root.check_name(ours.pop("template", "default"), "template")
    layer_bytes = _number(ours.pop("layer-bytes", ""), "the layer's size in bytes")
    parameters = []
    for key in ("processes", "walltime-s", "mtu"):
        if key in ours:
            value = _number(ours.pop(key), f"a number for {key}")
            parameters.append(f"SANDBOX_{key.upper().replace('-', '_')}={value}")
    if ours:
        raise root.RootError(f"the metadata of sandbox '{name}' has an unknown attribute '{min(ours)}'")
    here = root.home_of(name, state)
    inside = f"/home/{user}"
    for target, source, readonly in (
        ("/", f"{here}/root", False),
        (f"{inside}/.ssh", f"{here}/layer/ssh", False),
        ("/usr", "/usr", True),
        ("/opt", "/opt", True),
    ):
        if facts.mounts.get(target) != (source, readonly):
            words = f"{source}{', read-only' if readonly else ''}"
            raise root.RootError(f"sandbox '{name}': {target} must come from {words}")
    if inside not in facts.mounts or len(facts.mounts) != 5:
        raise root.RootError(f"sandbox '{name}' shares /usr, /opt and {inside}, nothing else")
    if facts.interfaces != 1 or len(facts.addresses) != 1 or not facts.bridges[0]:
        raise root.RootError(f"sandbox '{name}' must have one interface, on a bridge, with one address")
    return root.RootRequest(
        name=name,
        user=user,
        account=account,
        template=template,
        address=facts.addresses[0],
        bridge=facts.bridges[0],
        base=facts.base,
        layer_bytes=layer_bytes,
        parameters=tuple(parameters),
    )


def act(operation: str, facts: DomainFacts, text: bytes, state: str = root.STATE) -> None:
    """One step of a domain of ours. Errors: RootError."""
    if operation == "prepare":
        request = request_of(facts, state)
        account = root.account_of(request.account)
        shared = facts.mounts[f"/home/{request.user}"][0]
        if shared != account.home:
            raise root.RootError(f"{shared} is not the home directory of {request.account!r}, {account.home}")
        for _, port in facts.ports:
            _delete_stale(port)
        root.prepare(request, fill=lambda *_: _note(request.name, text, state), state=state)
        root.mark_started(request.name, state)
    elif operation == "release":
        root.release(facts.name, state=state)
    elif operation == "reconnect":
        from virtgrid.grid.node import cables

        for bridge, port in facts.ports:
            try:
                cables.plug(bridge, port)
            except OSError as error:
                raise root.RootError(f"{port} cannot be put into {bridge}: {error.strerror}") from None


def _note(name: str, text: bytes, state: str) -> None:
    """Write the XML down: should the domain vanish in a crash, this says what its root was for."""
    with open(f"{root.home_of(name, state)}/note.xml", "wb") as file:
        file.write(text)


def _delete_stale(port: str) -> None:
    """The cable of a domain of this name that libvirt did not live to take away."""
    if port.startswith("vg") and os.path.lexists(f"/sys/class/net/{port}"):
        from virtgrid.grid.node import cables

        try:
            cables.delete(port)
        except OSError as error:
            raise root.RootError(f"{port} is in the way: {error.strerror}") from None


def notify(driver: str, name: str, operation: str, extra: str) -> None:
    """Tell virtgridd, if one listens: one datagram, never waiting, never failing."""
    if not os.path.exists(NOTICE_SOCKET):
        return
    import json
    import socket

    words = {"v": 1, "driver": driver, "domain": name, "operation": operation, "sub_operation": extra}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as line:
            line.sendto(json.dumps(words).encode(), NOTICE_SOCKET)
    except OSError:
        return


def main() -> int:
    """``hook.py NAME OPERATION SUB-OPERATION EXTRA``, the XML on standard input (libvirt's hook protocol).

    What libvirt shows the user of a refused start is what we write to standard error.
    """
    name, operation, extra = sys.argv[1], sys.argv[2], sys.argv[3]
    text = os.environ.get("VIRTGRID_HOOK_READ", "").encode() + sys.stdin.buffer.read(_XML_LIMIT_BYTES)
    try:
        facts = read(text)
        if facts.ours is None or facts.kind != "lxc" or facts.name != name:
            return 0
        act(operation, facts, text)
    except root.RootError as error:
        hint = f" ({error.hint})" if error.hint else ""
        sys.stderr.write(f"virtgrid: {error.what}{hint}\n")
        return 1
    notify("lxc", name, operation, extra)
    return 0


if __name__ == "__main__":
    sys.exit(main())
