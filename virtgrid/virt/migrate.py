"""The migrate call itself: options in our words -> libvirt's flags and parameters -> one blocking call.

The call is driven by this client, not peer to peer: when the client dies, libvirt cancels the
migration and the guest stays where it is. A lost controller is then never a lost hold.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Final

import libvirt

from virtgrid.virt.connection import KEEPALIVE_INTERVAL_S, OPEN_DEADLINE_S, Hypervisor

_MIB: Final = 1 << 20
#: How patient the migrate call is with a silent destination: 60 s. When the last word ("finish") is
#: on its way and no answer comes, libvirt's client lets the guest run on the source again. It must
#: not do so before the destination's libvirtd has given us up (keepalive_interval x (count + 1) of its
#: libvirtd.conf, 30 s by default) and has ended the guest there, or the word arrives late and it runs twice.
_FINISH_KEEPALIVE_COUNT: Final = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrateOptions:
    """What is asked of libvirt. migrate_uri: where the source's QEMU connects to (tcp://host[:port]).

    bandwidth_bytes_s: libvirt counts whole MiB/s; it is rounded up. disks: targets to copy.
    tls: memory and disks encrypted, each QEMU showing a certificate. tls_destination: the name the
    destination's must have, when it is not the one in migrate_uri.
    """

    migrate_uri: str | None
    listen_address: str | None = None
    copy_storage: str | None = None  # "all", "inc" or None
    disks: tuple[str, ...] = ()
    persistent: bool = False
    undefine_source: bool = False
    unsafe: bool = False
    abort_on_error: bool = False
    bandwidth_bytes_s: float | None = None
    destination_name: str | None = None
    destination_xml: str | None = None
    persistent_xml: str | None = None
    tls: bool = False
    tls_destination: str | None = None


def flags(options: MigrateOptions) -> int:
    """libvirt's flags for these options."""
    wanted = {
        libvirt.VIR_MIGRATE_LIVE: True,
        libvirt.VIR_MIGRATE_CHANGE_PROTECTION: True,
        libvirt.VIR_MIGRATE_NON_SHARED_DISK: options.copy_storage == "all",
        libvirt.VIR_MIGRATE_NON_SHARED_INC: options.copy_storage == "inc",
        libvirt.VIR_MIGRATE_PERSIST_DEST: options.persistent,
        libvirt.VIR_MIGRATE_UNDEFINE_SOURCE: options.undefine_source,
        libvirt.VIR_MIGRATE_UNSAFE: options.unsafe,
        libvirt.VIR_MIGRATE_ABORT_ON_ERROR: options.abort_on_error,
        libvirt.VIR_MIGRATE_TLS: options.tls,
    }
    result = 0
    for flag, on in wanted.items():
        result |= int(flag) if on else 0
    return result


def parameters(options: MigrateOptions) -> dict[str, Any]:
    """libvirt's typed parameters for these options."""
    wanted: dict[str, Any] = {
        libvirt.VIR_MIGRATE_PARAM_URI: options.migrate_uri,
        libvirt.VIR_MIGRATE_PARAM_LISTEN_ADDRESS: options.listen_address,
        libvirt.VIR_MIGRATE_PARAM_DEST_NAME: options.destination_name,
        libvirt.VIR_MIGRATE_PARAM_DEST_XML: options.destination_xml,
        libvirt.VIR_MIGRATE_PARAM_PERSIST_XML: options.persistent_xml,
        libvirt.VIR_MIGRATE_PARAM_TLS_DESTINATION: options.tls_destination,
    }
    if options.copy_storage:
        # An empty list would mean: all disks, shared ones included.
        wanted[libvirt.VIR_MIGRATE_PARAM_MIGRATE_DISKS] = list(options.disks) or None
    if options.bandwidth_bytes_s:
        wanted[libvirt.VIR_MIGRATE_PARAM_BANDWIDTH] = max(1, -(-round(options.bandwidth_bytes_s) // _MIB))
    return {key: value for key, value in wanted.items() if value is not None}


class MigrateCall:
    """One migrate call on two connections of its own, in a thread of its own.

    ``async with MigrateCall(src_uri, dst_uri) as call: await call.run(uuid, options)``.
    Leaving the block closes both connections, which makes libvirt cancel what still runs.
    """

    def __init__(self, source_uri: str, destination_uri: str) -> None:
        self._source_uri = source_uri
        self._destination_uri = destination_uri
        self._source: Hypervisor | None = None
        self._closed = threading.Event()

    async def __aenter__(self) -> MigrateCall:
        self._source = await Hypervisor.open(self._source_uri, name="source (migrate call)")
        self._destination: Any = await self._source.call(
            lambda _: _open_plain(self._destination_uri),
            f"cannot connect to {self._destination_uri}",
            deadline_s=OPEN_DEADLINE_S,
        )
        return self

    async def run(self, uuid: str, options: MigrateOptions) -> None:
        """Migrate and return when libvirt has finished; watched from outside, so without a deadline.

        Errors: LibvirtError with libvirt's reason; PeerUnreachableError when a side went away.
        """
        assert self._source is not None, "use it as a context manager"
        chosen, given = flags(options), parameters(options)

        def migrate(raw: Any) -> None:
            raw.lookupByUUIDString(uuid).migrate3(self._destination, given, chosen)

        await self._source.call(migrate, "libvirt did not migrate the domain", deadline_s=None)

    async def __aexit__(self, *_: object) -> None:
        if self._source is not None:
            await self._source.close()


def _open_plain(uri: str) -> Any:
    raw = libvirt.open(uri)
    raw.setKeepAlive(KEEPALIVE_INTERVAL_S, _FINISH_KEEPALIVE_COUNT)
    return raw
