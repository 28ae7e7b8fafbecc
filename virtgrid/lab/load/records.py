"""One record per request, as the load writes them and everyone else reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["page", "image", "download"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request. Times on CLOCK_MONOTONIC, which all processes of a host share.

    count_bytes: of the body. status 0 and an error: no whole answer came.
    """

    session: int
    connection: int
    kind: Kind
    url: str
    start_s: float
    first_byte_s: float | None
    end_s: float
    count_bytes: int
    status: int
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and 200 <= self.status < 400

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


def write(path: Path, requests: Iterable[Request]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for request in requests:
            file.write(json.dumps(asdict(request), separators=(",", ":")) + "\n")


def read(path: Path) -> list[Request]:
    """The requests of a file ``write`` made, in their order."""
    with path.open(encoding="utf-8") as file:
        return [Request(**json.loads(line)) for line in file if line.strip()]
