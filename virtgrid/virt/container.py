"""libvirt's LXC driver, as far as sandboxes need it: create, find, list, destroy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import libvirt

from virtgrid.virt.connection import Hypervisor

CREATE_DEADLINE_S: Final = 60.0
#: libvirt kills in rounds of 200 ms, and waits for the hook.
DESTROY_DEADLINE_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A running LXC domain. controller: the pid of its libvirt_lxc, whose child is the first process."""

    name: str
    uuid: str
    controller: int
    persistent: bool


def _container(domain: Any) -> Container | None:
    try:
        controller = int(domain.ID())
        if controller <= 0:
            return None
        return Container(
            name=domain.name(),
            uuid=domain.UUIDString(),
            controller=controller,
            persistent=bool(domain.isPersistent()),
        )
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
            return None
        raise


async def create(hypervisor: Hypervisor, xml: str, name: str) -> Container:
    """Define and start a transient domain. Errors: LibvirtError with what the hook or libvirt said."""

    def make(raw: Any) -> Container:
        # Not validated here: libvirt reads its whole schema for it, a third of the time this takes.
        domain = raw.createXML(xml, 0)
        # Not asked again: a domain that ended at once would answer with an error.
        return Container(name=name, uuid=domain.UUIDString(), controller=int(domain.ID()), persistent=False)

    return await hypervisor.call(make, f"cannot start sandbox '{name}'", deadline_s=CREATE_DEADLINE_S)


async def find(hypervisor: Hypervisor, name: str) -> Container | None:
    """The running domain of this name; None when there is none."""

    def look(raw: Any) -> Container | None:
        try:
            return _container(raw.lookupByName(name))
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise

    return await hypervisor.call(look, f"cannot look up domain '{name}'")


async def xml(hypervisor: Hypervisor, name: str) -> str | None:
    """The live XML of a domain; None when there is none."""

    def look(raw: Any) -> str | None:
        try:
            return str(raw.lookupByName(name).XMLDesc(0))
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise

    return await hypervisor.call(look, f"cannot read the XML of '{name}'")


async def running(hypervisor: Hypervisor) -> list[Container]:
    """All running domains of the driver."""

    def look(raw: Any) -> list[Container]:
        domains = raw.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        return [found for domain in domains if (found := _container(domain)) is not None]

    return await hypervisor.call(look, f"cannot list the domains of {hypervisor.name}")


async def destroy(hypervisor: Hypervisor, name: str) -> bool:
    """Pull the plug; False when there was no such running domain."""

    def end(raw: Any) -> bool:
        try:
            raw.lookupByName(name).destroy()
        except libvirt.libvirtError as error:
            if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                return False
            raise
        return True

    return await hypervisor.call(end, f"cannot destroy '{name}'", deadline_s=DESTROY_DEADLINE_S)


async def forget(hypervisor: Hypervisor, name: str) -> None:
    """Have libvirt drop a transient domain that does not run.

    One whose libvirt_lxc ended while libvirtd was away stays listed as shut off, and keeps its name, until
    somebody tries to destroy it (libvirt 11.3).
    """

    def drop(raw: Any) -> None:
        try:
            domain = raw.lookupByName(name)
            if not domain.isActive() and not domain.isPersistent():
                domain.destroy()
        except libvirt.libvirtError as error:
            if error.get_error_code() not in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID):
                raise

    await hypervisor.call(drop, f"cannot drop domain '{name}'")
