"""A load of clients.py as a process beside a server host."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from types import TracebackType
from typing import Final

from virtgrid.core.errors import LabError
from virtgrid.lab.servers.clients import ClientsWanted, Command
from virtgrid.lab.servers.host import ServerHost

_END_S: Final = 60.0


class ClientProcess:
    """Clients that run until ``finish``, or the end of the block."""

    def __init__(self, host: ServerHost, wanted: ClientsWanted) -> None:
        self._process = host.client(
            sys.executable,
            "-m",
            "virtgrid.lab.servers.clients",
            json.dumps(asdict(wanted)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def finish(self) -> list[Command]:
        """End them, in their own time; what they did. Errors: LabError."""
        try:
            said, _ = self._process.communicate(timeout=_END_S)
            return [Command(**one) for one in json.loads(said)]
        except (subprocess.TimeoutExpired, ValueError) as error:
            raise LabError("the clients left no record", cause=str(error)) from error

    def __enter__(self) -> ClientProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
