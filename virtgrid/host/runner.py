"""Run one program and stream its output: ``python3 -I -S runner.py FD``, what to run as JSON on standard
input.

A process of its own per program, so that programs outlive a restart of virtgridd. FD is the pilot's
connection: first comes ``answer``, the line that answers its request, then frames
(virtgrid.grid.messages.frames). A pilot that takes nothing makes the write wait, and so the program; a
pilot that hangs up ends the program. Only the standard library.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def _frames() -> Any:
    """virtgrid.grid.messages.frames by its path: the package would bring everything else with it."""
    path = Path(__file__).parents[1] / "grid" / "messages" / "frames.py"
    spec = importlib.util.spec_from_file_location("virtgrid_frames", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks its module up
    spec.loader.exec_module(module)
    return module


frames = _frames()


def _stream(line: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """Carry output until the program has ended and what it wrote is through.

    A child it left behind may hold the pipes open for ever: it is not waited for.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    kinds = {process.stdout.fileno(): frames.STDOUT, process.stderr.fileno(): frames.STDERR}
    end = os.pidfd_open(process.pid)
    poller = select.poll()
    for descriptor in kinds:
        os.set_blocking(descriptor, False)
        poller.register(descriptor, select.POLLIN)
    poller.register(end, select.POLLIN)
    poller.register(line, select.POLLIN | select.POLLRDHUP)
    ended = False
    while True:
        ready = {descriptor for descriptor, _ in poller.poll(0 if ended else None)}
        if line.fileno() in ready and not line.recv(4096):
            raise BrokenPipeError("the pilot has hung up")
        moved = False
        for descriptor in ready & kinds.keys():
            data = os.read(descriptor, frames.PIECE_BYTES)
            if data:
                line.sendall(frames.pack(kinds[descriptor], data))
                moved = True
            else:
                poller.unregister(descriptor)
        if ended and not moved:
            return
        ended = ended or end in ready


def _end(process: subprocess.Popen[bytes], began_s: float) -> Any:
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = code = os.waitstatus_to_exitcode(status)  # it is waited for
    return frames.End(
        status=code if code >= 0 else 128 - code,
        user_s=usage.ru_utime,
        system_s=usage.ru_stime,
        max_rss_bytes=usage.ru_maxrss * 1024,  # getrusage(2): kilobytes
        elapsed_s=time.monotonic() - began_s,
    )


def main() -> int:
    line = socket.socket(fileno=int(sys.argv[1]))
    line.setblocking(True)
    order = json.load(sys.stdin)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    began_s = time.monotonic()
    try:
        process = subprocess.Popen(
            order["argv"],
            env=order["env"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        line.sendall(order["answer"].encode())
        line.sendall(frames.pack_end(frames.End(status=None, problem=f"it could not be started: {error}")))
        return 1
    try:
        line.sendall(order["answer"].encode())
        _stream(line, process)
        line.sendall(frames.pack_end(_end(process, began_s)))
    except OSError:
        process.kill()
        process.wait()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
