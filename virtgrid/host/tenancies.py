"""Who has a sandbox on this host and until when: what virtgridd must know after its own restart.

One file per sandbox, written before anything is made and removed after everything is gone. Whether a
sandbox is there is *not* in it: that is looked at.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from virtgrid.core.errors import VirtgridError
from virtgrid.core.files import replace_file
from virtgrid.grid.messages.common import Model
from virtgrid.grid.messages.node import Init
from virtgrid.grid.messages.ticket import Ticket
from virtgrid.grid.node import root
from virtgrid.grid.node.spec import SandboxSpec

DIRECTORY: Final = Path(root.sandboxes(), ".tenancies")
_log = logging.getLogger(__name__)


class Tenancy(Model):
    """ticket: of its pilot. init: what was asked; spec: what was made of it; ready: keys have been set."""

    v: Literal[1] = 1
    ticket: Ticket
    init: Init
    spec: dict[str, Any]
    ready: bool = False

    @property
    def sandbox(self) -> SandboxSpec:
        return SandboxSpec.from_dict(self.spec)


class Tenancies:
    """The files. Names come from tickets, whose form is one label of a host's name."""

    def __init__(self, directory: Path = DIRECTORY) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def load(self, name: str) -> Tenancy | None:
        """None when there is none, or only half a file: then nothing was made."""
        try:
            return Tenancy.model_validate_json(self._path(name).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            _log.error("the record of %s cannot be read and is left out: %s", name, error)
            return None

    def save(self, tenancy: Tenancy) -> None:
        """On the disk when this returns. Errors: VirtgridError."""
        path = self._path(tenancy.ticket.sandbox)
        try:
            replace_file(path, tenancy.model_dump_json().encode())
        except OSError as error:
            raise VirtgridError("virtgridd cannot write its record", cause=str(error)) from error

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path(name).unlink()

    def all(self) -> list[Tenancy]:
        found = [self.load(path.stem) for path in sorted(self.directory.glob("*.json"))]
        return [one for one in found if one is not None]

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"
