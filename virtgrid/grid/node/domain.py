"""A sandbox's spec as libvirt domain XML, and back. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lxml import etree

from virtgrid.core.errors import UsageError
from virtgrid.core.shipped import shipped
from virtgrid.grid.node import hook, root
from virtgrid.grid.node.spec import DEFAULT_TEMPLATE, SandboxLimits, SandboxSpec, id_map

METADATA: Final = f"{{{hook.NAMESPACE}}}sandbox"
# Of plain sandboxes, whose root is the host's: what sshd and a user's programs need, and no more.
_CAPABILITIES: Final = (
    "audit_write", "chown", "dac_override", "fowner", "fsetid", "kill", "net_admin", "net_bind_service",
    "setgid", "setuid", "sys_chroot",
)  # fmt: skip


def parameters(spec: SandboxSpec) -> tuple[str, ...]:
    """What the first process reads: lines ``KEY=NUMBER``."""
    limits = spec.limits
    lines = [f"SANDBOX_PROCESSES={limits.processes}"]
    if limits.walltime_s is not None:
        lines.append(f"SANDBOX_WALLTIME_S={limits.walltime_s}")
    if spec.mtu != 1500:
        lines.append(f"SANDBOX_MTU={spec.mtu}")
    return tuple(lines)


def build(spec: SandboxSpec, account: root.Account, *, base: int, uuid: str, state: str = root.STATE) -> str:
    """The domain XML of a sandbox.

    account: the host's account it shares. base: where its ids begin on the host; 0 without a user
    namespace. uuid: chosen by the caller, so that the domain can be recognised after a crash.
    """
    domain = etree.parse(shipped("xml-templates", "sandbox-lxc.xml")).getroot()
    here, inside = root.home_of(spec.name, state), f"/home/{spec.user}"
    limits = spec.limits
    _at(domain, "name").text = spec.name
    identity = etree.Element("uuid")
    identity.text = uuid
    _at(domain, "name").addnext(identity)
    ours = _at(domain, f"metadata/{METADATA}")
    ours.attrib.update(
        {
            "user": spec.user,
            "account": spec.host_account,
            "template": spec.template,
            "layer-bytes": str(limits.layer_bytes),
            "processes": str(limits.processes),
        }
    )
    if limits.walltime_s is not None:
        ours.set("walltime-s", str(limits.walltime_s))
    if spec.mtu != 1500:
        ours.set("mtu", str(spec.mtu))
    _at(domain, "memory").text = str(limits.memory_bytes)
    if limits.cpuset is not None:
        _at(domain, "vcpu").set("cpuset", limits.cpuset)
    if base:
        _at(domain, "features").addprevious(_idmap(base, account))
    else:
        keep = etree.SubElement(_at(domain, "features"), "capabilities", policy="deny")
        for name in _CAPABILITIES:
            etree.SubElement(keep, name, state="on")
    for element, source, target in zip(
        [fs for fs in domain.iterfind("devices/filesystem") if _at(fs, "source").get("dir") is None],
        (f"{here}/root", account.home, f"{here}/layer/ssh"),
        ("/", inside, f"{inside}/.ssh"),
        strict=True,
    ):
        _at(element, "source").set("dir", source)
        _at(element, "target").set("dir", target)
    interface = _at(domain, "devices/interface")
    _at(interface, "mac").set("address", spec.mac)
    _at(interface, "source").set("bridge", spec.bridge)
    _at(interface, "target").set("dev", spec.port)
    guest = _at(interface, "guest")
    guest.addprevious(etree.Element("ip", address=spec.ip, family=spec.family, prefix=str(spec.prefix)))
    if spec.gateway is not None:
        everywhere = "0.0.0.0" if spec.family == "ipv4" else "::"  # noqa: S104 - the default route
        guest.addprevious(
            etree.Element("route", family=spec.family, address=everywhere, prefix="0", gateway=spec.gateway)
        )
    etree.strip_tags(domain, etree.Comment)
    return etree.tostring(domain, encoding="unicode")


def _idmap(base: int, account: root.Account) -> etree._Element:
    element = etree.Element("idmap")
    for kind, kept in (("uid", account.uid), ("gid", account.gid)):
        for first, target, count in id_map(base, kept):
            etree.SubElement(element, kind, start=str(first), target=str(target), count=str(count))
    return element


def _at(element: etree._Element, path: str) -> etree._Element:
    found = element.find(path)
    if found is None:
        raise LookupError(f"the template of sandboxes has no {path}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What a sandbox's domain XML says: the spec, and what was chosen for it. home: of the account."""

    spec: SandboxSpec
    uuid: str
    base: int
    home: str


def parse(xml: str) -> Made | None:
    """The inverse of ``build``, for live XML too; None when it is no sandbox of this program.

    Nor is a domain with our metadata whose rest does not fit (the hook starts none), or half a file.
    """
    try:
        parser = etree.XMLParser(resolve_entities=False, no_network=True)
        domain = etree.fromstring(xml.encode(), parser)
        ours = domain.find(f"metadata/{METADATA}")
        return None if domain.get("type") != "lxc" or ours is None else _made(domain, ours)
    except (etree.XMLSyntaxError, KeyError, ValueError, LookupError, UsageError):
        return None


def _made(domain: etree._Element, ours: etree._Element) -> Made:
    user = _get(ours, "user")
    address = _at(domain, "devices/interface/ip")
    route = domain.find("devices/interface/route")
    first = domain.find("idmap/uid[@start='0']")
    homes = [_at(fs, "source") for fs in domain.iterfind("devices/filesystem") if _is_home(fs, user)]
    memory = _at(domain, "memory")
    walltime = ours.get("walltime-s")
    return Made(
        spec=SandboxSpec(
            name=domain.findtext("name", ""),
            user=user,
            account=ours.get("account"),
            address=f"{_get(address, 'address')}/{_get(address, 'prefix')}",
            gateway=None if route is None else _get(route, "gateway"),
            bridge=_get(_at(domain, "devices/interface/source"), "bridge"),
            mtu=int(ours.get("mtu", "1500")),
            template=ours.get("template", DEFAULT_TEMPLATE),
            user_namespace=first is not None,
            limits=SandboxLimits(
                memory_bytes=int(memory.text or "0") * {"b": 1, "KiB": 1024}[memory.get("unit", "KiB")],
                layer_bytes=int(_get(ours, "layer-bytes")),
                processes=int(_get(ours, "processes")),
                cpuset=_at(domain, "vcpu").get("cpuset"),
                walltime_s=None if walltime is None else int(walltime),
            ),
        ),
        uuid=domain.findtext("uuid", ""),
        base=0 if first is None else int(_get(first, "target")),
        home=_get(homes[0], "dir"),
    )


def _get(element: etree._Element, name: str) -> str:
    found = element.get(name)
    if found is None:
        raise LookupError(f"<{element.tag}> has no {name}")
    return found


def _is_home(filesystem: etree._Element, user: str) -> bool:
    return _at(filesystem, "target").get("dir") == f"/home/{user}"
