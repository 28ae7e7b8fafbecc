"""Starting the lab's own processes so that they outlive the caller, and hearing that they are ready."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from virtgrid.core.errors import DeadlineError, LabError
from virtgrid.lab.layout import MARKER

_READY: Final = b"ready\n"


def start(module: str, arguments: Sequence[str], *, lab: Path, log: Path, timeout_s: float = 30.0) -> None:
    """Run ``python -m module ARGUMENTS FD`` in the background and wait until it says it is ready.

    FD is where it reports to. Errors: LabError with what it said; DeadlineError.
    """
    reader, writer = os.pipe()
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments, str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(writer,),
                start_new_session=True,
                cwd="/",
                env=_environment(lab),
            )
        os.close(writer)
        writer = -1
        said = _listen(reader, time.monotonic() + timeout_s)
        process.wait(timeout_s)  # the child we started ends as soon as its own child runs
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.wait()
        raise _too_late(module, log, timeout_s) from error
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    if said is None:
        raise _too_late(module, log, timeout_s)
    if said != _READY:
        cause = said.decode(errors="replace").strip() or _tail(log)
        raise LabError(f"the lab's {module.rpartition('.')[2]} could not start", cause=cause)


def detach() -> None:
    """For the started process: go on as a child of nobody in particular."""
    if os.fork():
        os._exit(0)


def report_ready(descriptor: int) -> None:
    """For the started process: everything stands."""
    os.write(descriptor, _READY)
    os.close(descriptor)


def report_failure(descriptor: int, error: BaseException) -> None:
    """For the started process: why it could not be."""
    os.write(descriptor, f"{type(error).__name__}: {error}\n".encode()[:4000])
    os.close(descriptor)


def _too_late(module: str, log: Path, timeout_s: float) -> DeadlineError:
    what = f"the lab's {module.rpartition('.')[2]} did not come up within {timeout_s:.0f} s"
    return DeadlineError(what, cause=_tail(log))


def _tail(log: Path) -> str:
    # Told, not pointed to: an `up` that fails removes the log with everything else.
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return " | ".join(lines[-3:]) or "it said nothing"


def _listen(reader: int, deadline_s: float) -> bytes | None:
    said = b""
    while True:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not select.select([reader], [], [], left_s)[0]:
            return None
        more = os.read(reader, 4096)
        said += more
        if not more or said == _READY:
            return said


def _environment(lab: Path) -> dict[str, str]:
    # A clean one: what an administrator has exported must not change what libvirtd does.
    wanted = ("PATH", "LANG", "PYTHONPATH", "VIRTUAL_ENV", "TZ")
    kept = {key: os.environ[key] for key in wanted if key in os.environ}
    return {"HOME": "/root", **kept, MARKER: os.fspath(lab)}


def order_argument(order: object) -> str:
    """A structure as one command line word."""
    return json.dumps(order, separators=(",", ":"))
