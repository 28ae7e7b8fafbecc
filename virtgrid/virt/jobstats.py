"""What QEMU says about a running migration, as typed records in base units. Pure parsing.

Sources: QMP ``query-migrate`` (QEMU's qapi/migration.json) and ``query-block-jobs``
(qapi/block-core.json). Milliseconds, megabits and pages stop here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from virtgrid.core.errors import VirtgridError


@dataclass(frozen=True, slots=True, kw_only=True)
class RamStats:
    """Memory precopy as QEMU counts it.

    remaining_bytes: known to be dirty, as of the last sync (QEMU only looks at a sync).
    sync_count: how often QEMU has looked; dirty_bytes_s: rate over the last full interval.
    sent_bytes: everything on the migration stream so far.
    """

    remaining_bytes: int
    total_bytes: int
    sent_bytes: int
    dirty_bytes_s: float
    speed_bytes_s: float
    sync_count: int
    page_bytes: int
    normal_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationStatus:
    """``query-migrate``. status: none, setup, active, pre-switchover, device, completed, failed …"""

    status: str
    ram: RamStats | None
    total_time_s: float
    downtime_s: float | None
    error: str | None

    @property
    def copying_memory(self) -> bool:
        return self.status == "active" and self.ram is not None

    @property
    def switching(self) -> bool:
        """The guest is stopped or about to be: nothing can hold it any more."""
        return self.status in ("pre-switchover", "device", "completed")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJob:
    """One disk mirror. device: QEMU's job name; ready: in sync, only new writes are copied."""

    device: str
    copied_bytes: int
    total_bytes: int
    ready: bool
    status: str


def _number(data: Mapping[str, Any], key: str, default: float = 0) -> float:
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise VirtgridError(f"QEMU answered with a malformed '{key}'", cause=repr(value)[:100])
    return float(value)


def parse_migration(answer: Mapping[str, Any]) -> MigrationStatus:
    """``query-migrate``'s return value -> MigrationStatus. Errors: VirtgridError when malformed."""
    if not isinstance(answer, Mapping):
        raise VirtgridError("QEMU answered with something that is no migration", cause=repr(answer)[:100])
    ram = answer.get("ram")
    stats = None
    if isinstance(ram, Mapping):
        page_bytes = int(_number(ram, "page-size", 4096))
        stats = RamStats(
            remaining_bytes=int(_number(ram, "remaining")),
            total_bytes=int(_number(ram, "total")),
            sent_bytes=int(_number(ram, "transferred")),
            dirty_bytes_s=_number(ram, "dirty-pages-rate") * page_bytes,
            speed_bytes_s=_number(ram, "mbps") * 1e6 / 8,
            sync_count=int(_number(ram, "dirty-sync-count")),
            page_bytes=page_bytes,
            normal_bytes=int(_number(ram, "normal-bytes")),
        )
    downtime = answer.get("downtime")
    return MigrationStatus(
        status=str(answer.get("status", "none")),
        ram=stats,
        total_time_s=_number(answer, "total-time") / 1000,
        downtime_s=None if downtime is None else _number(answer, "downtime") / 1000,
        error=str(answer["error-desc"]) if "error-desc" in answer else None,
    )


def parse_block_jobs(answer: Sequence[Mapping[str, Any]]) -> tuple[BlockJob, ...]:
    """``query-block-jobs``'s return value -> the mirrors, by device name. Errors: as above."""
    if not isinstance(answer, Sequence) or not all(isinstance(job, Mapping) for job in answer):
        raise VirtgridError("QEMU answered with something that is no list of jobs", cause=repr(answer)[:100])
    jobs = [
        BlockJob(
            device=str(job.get("device", "")),
            copied_bytes=int(_number(job, "offset")),
            total_bytes=int(_number(job, "len")),
            ready=bool(job.get("ready")),
            status=str(job.get("status", "")),
        )
        for job in answer
        if job.get("type") == "mirror"
    ]
    return tuple(sorted(jobs, key=lambda job: job.device))
