"""The whole history of a migration, from its journal: what reports are made of. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from virtgrid.core.events import Record
from virtgrid.report.fold import Alive, Fold
from virtgrid.report.model import (
    Check,
    Clamp,
    CountSample,
    DiskSample,
    GateDecision,
    Lane,
    Note,
    RamSample,
    Status,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline(Status):
    """The whole history of one migration, for reports; everything a Status says, too."""

    checks: tuple[Check, ...] = ()
    estimate: Mapping[str, float]
    storage_series: tuple[DiskSample, ...] = ()
    ram_series: tuple[RamSample, ...] = ()
    clamps: tuple[Clamp, ...] = ()
    lanes: tuple[Lane, ...] = ()
    counts_series: tuple[CountSample, ...] = ()
    decisions: tuple[GateDecision, ...] = ()
    notes: tuple[Note, ...] = ()
    options: Mapping[str, str]
    stopped_unsuitable: int | None = None

    @classmethod
    def from_records(cls, records: Iterable[Record], alive: Alive | None = None) -> Timeline:
        """Fold a journal. alive tells whether its writer still runs; without it an open end is running."""
        fold = Fold()
        for record in records:
            fold.add(record)
        status = fold.status(alive)
        return cls(
            **{f.name: getattr(status, f.name) for f in fields(Status)},
            checks=tuple(fold.checks),
            estimate=fold.estimate,
            storage_series=tuple(fold.storage),
            ram_series=tuple(fold.ram),
            clamps=tuple(fold.clamps),
            lanes=fold.lanes(),
            counts_series=tuple(fold.counts),
            decisions=tuple(fold.gate),
            notes=tuple(fold.notes),
            options=fold.options(),
            stopped_unsuitable=fold.stopped_unsuitable,
        )

    @property
    def end_s(self) -> float:
        """Where the time axis ends."""
        return self.end.at_s if self.end else self.last_s
