"""QEMU's monitor through libvirt: the few QMP commands the hold needs, each with a deadline.

libvirt has no API for them. Its own SetMaxSpeed counts whole MiB/s, and 1 MiB/s is enough for a
quiet guest to drain and complete. Using the monitor taints the domain ("custom-monitor").
"""

from __future__ import annotations

import json
from typing import Any, Final, Protocol

from virtgrid.core.errors import VirtgridError
from virtgrid.virt.connection import Hypervisor, _qemu
from virtgrid.virt.jobstats import BlockJob, MigrationStatus, parse_block_jobs, parse_migration

QMP_DEADLINE_S: Final = 5.0
#: An answer larger than this is not one of ours to parse.
_ANSWER_LIMIT_BYTES: Final = 4 << 20
#: A migration parameter since QEMU 8.2.
SWITCHOVER_BANDWIDTH: Final = "avail-switchover-bandwidth"


class MonitorError(VirtgridError):
    """QEMU refused a QMP command."""

    code = "VG-QMP"


class Monitor(Protocol):
    """What the hold asks of QEMU; tests script it from recorded answers."""

    async def migration(self) -> MigrationStatus: ...

    async def set_limits(
        self,
        *,
        bandwidth_bytes_s: int | None = None,
        downtime_s: float | None = None,
        switchover_bytes_s: int | None = None,
    ) -> None: ...

    async def block_jobs(self) -> tuple[BlockJob, ...]: ...

    async def parameters(self) -> dict[str, Any]: ...

    async def cut_storage(self) -> int: ...


class QemuMonitor:
    """The monitor of one running domain, over a Hypervisor connection."""

    def __init__(self, hypervisor: Hypervisor, uuid: str, *, deadline_s: float = QMP_DEADLINE_S) -> None:
        self._hypervisor = hypervisor
        self._uuid = uuid
        self._deadline_s = deadline_s
        self._domain: Any = None

    async def command(self, name: str, **arguments: Any) -> Any:
        """One QMP command -> its return value. Errors: MonitorError, DeadlineError, NotFoundError."""
        request = {"execute": name, "arguments": arguments} if arguments else {"execute": name}

        def ask(raw: Any) -> str:
            if self._domain is None:
                self._domain = raw.lookupByUUIDString(self._uuid)
            return str(_qemu().qemuMonitorCommand(self._domain, json.dumps(request), 0))

        text = await self._hypervisor.call(
            ask, f"QEMU's monitor did not take '{name}'", deadline_s=self._deadline_s
        )
        if len(text) > _ANSWER_LIMIT_BYTES:
            raise MonitorError(f"QEMU's answer to '{name}' has {len(text)} bytes", hint="not parsed")
        answer = json.loads(text)
        if not isinstance(answer, dict) or "return" not in answer:
            error = answer.get("error", {}) if isinstance(answer, dict) else {}
            raise MonitorError(f"QEMU refused '{name}'", cause=str(error.get("desc", text))[:300])
        return answer["return"]

    async def migration(self) -> MigrationStatus:
        return parse_migration(await self.command("query-migrate"))

    async def block_jobs(self) -> tuple[BlockJob, ...]:
        return parse_block_jobs(await self.command("query-block-jobs"))

    async def parameters(self) -> dict[str, Any]:
        """``query-migrate-parameters`` as QEMU names them (bytes per second, milliseconds)."""
        return dict(await self.command("query-migrate-parameters"))

    async def set_limits(
        self,
        *,
        bandwidth_bytes_s: int | None = None,
        downtime_s: float | None = None,
        switchover_bytes_s: int | None = None,
    ) -> None:
        """Set what is given in one command, so that none is seen without the other.

        switchover_bytes_s: what QEMU is to believe a switchover would have; 0: what it measured.
        """
        arguments: dict[str, int] = {}
        if bandwidth_bytes_s is not None:
            arguments["max-bandwidth"] = bandwidth_bytes_s
        if downtime_s is not None:
            arguments["downtime-limit"] = round(downtime_s * 1000)
        if switchover_bytes_s is not None:
            arguments[SWITCHOVER_BANDWIDTH] = switchover_bytes_s
        await self.command("migrate-set-parameters", **arguments)

    async def cut_storage(self) -> int:
        """Break the connections of the storage copies off -> how many there were.

        Cancelling a mirror whose peer is silent makes QEMU, guest and all, wait for the mirror's last
        write until TCP gives up: a quarter of an hour. Its ``yank`` is made for this, but must come first.
        """
        copies = [
            {"type": "block-node", "node-name": instance["node-name"]}
            for instance in await self.command("query-yank")
            # libvirt's names; the guest may have network disks of its own.
            if str(instance.get("node-name", "")).startswith("migration-")
        ]
        if copies:
            await self.command("yank", instances=copies)
        return len(copies)
