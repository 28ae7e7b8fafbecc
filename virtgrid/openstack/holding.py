"""One migration's gatekeeper as nova-compute sees it: a child process, two pipes, one thread that reads.

Threads, not asyncio: Nova's driver lives in threads, native or green ones. No import of Nova here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from virtgrid.core.errors import MigrationFailedError

LOG: Final = logging.getLogger(__name__)
#: Both hosts asked, a capture begun: seconds over a WAN.
READY_S: Final = 90.0
_ANSWER_S: Final = 10.0
#: After the call has come back: the gatekeeper looks at both hosts and puts limits back.
_OVER_S: Final = 40.0
_LINE_LIMIT: Final = 1 << 20


class Hold:
    """A gatekeeper for one migration: ``start`` before the migrate call, ``ended`` after it, then ``close``.

    argv: starts the gatekeeper. request: its first line (``migration.plan.MigrationRequest``).
    abort: called from a thread when the gatekeeper is gone while the migration runs: nobody would let go.
    """

    def __init__(self, argv: Sequence[str], request: dict[str, Any], *, abort: Callable[[], None]) -> None:
        self._argv = list(argv)
        self._request = request
        self._abort = abort
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._heard = threading.Event()
        self._answered = threading.Event()
        self._one_release = threading.Lock()
        self._pipe = threading.Lock()
        self._held = False
        self._ready: str | None = None
        self._ended = False
        #: The fields of the journal's last line, once it is over.
        self.over: dict[str, Any] | None = None

    def start(self) -> None:
        """Return when the migrate call may begin. Errors: MigrationFailedError, with the reason."""
        try:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise MigrationFailedError("virtgrid-gatekeeper cannot be started", cause=str(error)) from error
        self._reader = threading.Thread(target=self._read, name="virtgrid-hold", daemon=True)
        self._reader.start()
        self._say(self._request)
        if not self._heard.wait(READY_S):
            self._process.kill()
        if self._ready is None:
            self._ended = True
            told = self.over or {}
            raise MigrationFailedError(
                told.get("what") or "virtgrid-gatekeeper ended, or was silent, before it was ready",
                cause=told.get("cause"),
                hint=told.get("hint") or f"does '{' '.join(self._argv)}' run as root without asking?",
            )

    def release(self) -> bool:
        """End it now -> whether it was held and is let go by that; false: it is not held from now on."""
        with self._one_release:
            self._answered.clear()
            self._held = False
            if not self._say({"say": "release"}):
                return False
            self._answered.wait(_ANSWER_S)
            return self._held

    def ended(self, error: BaseException | None, number: int = 0) -> None:
        """The migrate call has come back. number: libvirt's of the error."""
        self._ended = True
        text = None if error is None else f"{error}"[:2000]
        self._say({"say": "ended", "error": text, "number": number})

    def close(self) -> None:
        """Wait for its last word; it is not left running."""
        process = self._process
        if process is None:
            return
        if not self._ended and self._ready is not None and process.stdin is not None:
            with self._pipe, contextlib.suppress(OSError):
                process.stdin.close()  # gone without a word: it aborts what may still run
        try:
            process.wait(_OVER_S)
        except subprocess.TimeoutExpired:
            # Root's, perhaps, and then not ours to kill: its input's end tells it.
            with contextlib.suppress(OSError):
                process.kill()
            LOG.warning("virtgrid-gatekeeper %s did not end within %d s", self._ready, _OVER_S)
        if self._reader is not None:
            self._reader.join(_ANSWER_S)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _say(self, line: dict[str, Any]) -> bool:
        process = self._process
        if process is None or process.stdin is None:
            return False
        try:
            with self._pipe:
                process.stdin.write(json.dumps(line).encode() + b"\n")
                process.stdin.flush()
        except (OSError, ValueError):
            return False
        return True

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            while line := self._process.stdout.readline(_LINE_LIMIT):
                self._take(json.loads(line))
        self._heard.set()
        self._answered.set()
        if self._ready is not None and not self._ended and self.over is None:
            LOG.error(
                "virtgrid-gatekeeper %s is gone: the migration is aborted, for nobody would let go of it;"
                " afterwards: virtgrid migration recover %s",
                self._ready,
                self._ready,
            )
            with contextlib.suppress(Exception):
                self._abort()

    def _take(self, told: Any) -> None:
        match told:
            case {"state": "ready", "id": str(migration_id)}:
                self._ready = migration_id
                self._heard.set()
            case {"state": "release", "held": bool(held)}:
                self._held = held
                self._answered.set()
            case {"state": "over" | "refused", **fields}:
                self.over = {str(name): value for name, value in fields.items()}
            case _:
                raise ValueError("not one of its lines")
