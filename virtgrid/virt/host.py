"""Questions a preflight asks a host through libvirt."""

from __future__ import annotations

from typing import Any, Final

import libvirt
from lxml import etree

from virtgrid.virt.connection import Hypervisor, LibvirtError
from virtgrid.virt.domxml import DomainXml

_PARSER: Final = etree.XMLParser(resolve_entities=False, no_network=True)
_CPU_ANSWERS: Final = {
    libvirt.VIR_CPU_COMPARE_INCOMPATIBLE: (False, "the destination's CPU lacks features the guest has"),
    libvirt.VIR_CPU_COMPARE_IDENTICAL: (True, "identical"),
    libvirt.VIR_CPU_COMPARE_SUPERSET: (True, "the destination offers all the guest's features"),
}


async def versions(hypervisor: Hypervisor) -> tuple[int, int]:
    """(libvirt, hypervisor) as libvirt counts versions: major * 10^6 + minor * 10^3 + release."""
    return await hypervisor.call(
        lambda raw: (int(raw.getLibVersion()), int(raw.getVersion())),
        f"cannot ask {hypervisor.name} for versions",
    )


async def host_uuid(hypervisor: Hypervisor) -> str:
    """The host's UUID out of its capabilities; the same on both sides means the same host."""

    def ask(raw: Any) -> str:
        return str(etree.fromstring(raw.getCapabilities().encode(), _PARSER).findtext("host/uuid") or "")

    return await hypervisor.call(ask, f"cannot read the capabilities of {hypervisor.name}", deadline_s=30)


async def has_kvm(hypervisor: Hypervisor) -> bool:
    """Whether the host can run guests of virt type kvm."""

    def ask(raw: Any) -> bool:
        capabilities = etree.fromstring(raw.getCapabilities().encode(), _PARSER)
        return any(domain.get("type") == "kvm" for domain in capabilities.iterfind("guest/arch/domain"))

    return await hypervisor.call(ask, f"cannot read the capabilities of {hypervisor.name}", deadline_s=30)


async def machine_known(hypervisor: Hypervisor, xml: DomainXml) -> tuple[bool | None, str]:
    """Whether the host's QEMU has the guest's machine type -> (yes/no/unknown, text)."""

    def ask(raw: Any) -> None:
        raw.getDomainCapabilities(xml.emulator, xml.arch, xml.machine, xml.virt_type, 0)

    try:
        await hypervisor.call(ask, f"{hypervisor.name} does not offer {xml.machine}", deadline_s=30)
    except LibvirtError as error:
        return False, error.cause or error.what
    return True, xml.machine


async def cpu_compatible(hypervisor: Hypervisor, xml: DomainXml) -> tuple[bool | None, str]:
    """Whether the host can run the guest's CPU -> (yes/no/unknown, text)."""
    if xml.cpu_xml is None:
        return True, "QEMU's default CPU, the same everywhere"
    if xml.cpu_mode == "host-passthrough":
        return None, "host-passthrough: both hosts need the very same CPU and microcode"

    def ask(raw: Any) -> int:
        return int(
            raw.compareHypervisorCPU(xml.emulator, xml.arch, xml.machine, xml.virt_type, xml.cpu_xml, 0)
        )

    try:
        answer = await hypervisor.call(ask, f"cannot compare CPUs on {hypervisor.name}", deadline_s=30)
    except LibvirtError as error:
        return None, f"could not be compared: {error.cause}"
    return _CPU_ANSWERS.get(answer, (None, "could not be compared"))


async def name_owner(hypervisor: Hypervisor, name: str) -> str | None:
    """The UUID of the domain that has this name on the host, if any has."""

    def ask(raw: Any) -> str | None:
        try:
            return str(raw.lookupByName(name).UUIDString())
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise

    return await hypervisor.call(ask, f"cannot look up '{name}' on {hypervisor.name}")
