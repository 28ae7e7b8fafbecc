"""Running a load: in this process, or as a process of its own that a bench starts and stops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from virtgrid.core.errors import LabError
from virtgrid.lab.load import qos, records
from virtgrid.lab.load.client import Load, Target
from virtgrid.lab.load.profile import Profile
from virtgrid.lab.load.records import Request

_STOP_DEADLINE_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What a load did: its requests, and the window [begin_s, end_s] it was in full swing."""

    requests: tuple[Request, ...]
    begin_s: float
    end_s: float


def run_load(
    url: str, chosen: Profile, *, seed: int, duration_s: float, on_ready: Callable[[], None]
) -> LoadResult:
    """Run a load here until the time is up or SIGINT/SIGTERM comes; what was done is returned either way."""
    target = Target.parse(url)
    ready_s = 0.0

    async def main() -> list[Request]:
        nonlocal ready_s
        load, stop = Load(target, chosen, seed), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)

        async def announce() -> None:
            nonlocal ready_s
            await load.ready.wait()
            ready_s = time.monotonic()
            on_ready()

        announcing = asyncio.create_task(announce())
        try:
            await load.run(duration_s, stop)
        finally:
            announcing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await announcing
        return load.records

    done = asyncio.run(main())
    end_s = time.monotonic()
    return LoadResult(requests=tuple(done), begin_s=ready_s or end_s, end_s=end_s)


def summary(result: LoadResult) -> dict[str, Any]:
    """The figures of a run as JSON knows them."""
    window = (result.begin_s, result.end_s)
    quality = qos.quality(result.requests, window)
    return {
        "begin_s": result.begin_s,
        "end_s": result.end_s,
        "requests": len(result.requests),
        "quality": asdict(quality) | {"good_tolerable": quality.good_tolerable},
        "delayed": qos.delayed(result.requests, window),
        "times": {kind: asdict(qos.times(result.requests, kind)) for kind in ("page", "image", "download")},
        "outstanding": asdict(qos.burstiness(result.requests, window)),
        "errors": sorted({request.error for request in result.requests if request.error})[:10],
    }


class LoadProcess:
    """A load in a process of its own, started through ``argv_prefix`` (into a namespace).

    ``with LoadProcess(...) as load: load.wait_ready(30); …; result = load.stop()``. Leaving the
    block ends the process whatever happened.
    """

    def __init__(
        self,
        argv: Callable[[Sequence[str]], list[str]],
        url: str,
        *,
        sessions: int,
        shape: str = "bursty",
        seed: int = 1,
        duration_s: float = 3600.0,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="virtgrid-load-")
        self._out = Path(self._directory.name) / "requests.jsonl"
        self._ready = threading.Event()
        self._process = subprocess.Popen(
            argv(
                [
                    sys.executable, "-m", "virtgrid.cli.main", "lab", "load", "web", "--json",
                    "--url", url, "--sessions", str(sessions), "--load", shape, "--seed", str(seed),
                    "--duration", str(duration_s), "--out", str(self._out),
                ]
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )  # fmt: skip
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line)
            if line.strip() == "ready":
                self._ready.set()
        self._ready.set()  # the process ended: nobody shall wait for it

    def wait_ready(self, deadline_s: float = 60.0) -> None:
        """Until every session has begun. Errors: LabError when it ended or the deadline passed."""
        if not self._ready.wait(deadline_s):
            raise LabError(f"the load was not under way within {deadline_s:g} s")
        if self._process.poll() is not None:
            raise LabError("the load ended before it began", cause="".join(self._said)[-400:])

    def stop(self) -> LoadResult:
        """End it and read what it did. Errors: LabError when it does not end or left nothing."""
        self._process.send_signal(signal.SIGTERM)
        try:
            text, _ = self._process.communicate(timeout=_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise LabError(f"the load did not end within {_STOP_DEADLINE_S:g} s") from None
        try:
            told = json.loads(text)
            requests = records.read(self._out)
        except (ValueError, OSError) as error:
            raise LabError("the load left no result", cause="".join(self._said)[-400:]) from error
        return LoadResult(
            requests=tuple(requests), begin_s=float(told["begin_s"]), end_s=float(told["end_s"])
        )

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None and not pipe.closed:
                self._listener.join(timeout=5)
                pipe.close()
        self._directory.cleanup()

    def __enter__(self) -> LoadProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
