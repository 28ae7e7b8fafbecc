"""Run coroutines of this process as if it were at a site: one thread that is in the site's namespaces.

Threads and processes started from there are there too, so connections, subprocesses and
``asyncio.to_thread`` all belong to the site, while the rest of the process stays where it is.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Final, TypeVar

from virtgrid.core.errors import DeadlineError, LabError
from virtgrid.lab.site import Site
from virtgrid.net import syscalls

T = TypeVar("T")

_KINDS: Final = syscalls.CLONE_NEWNET | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWUTS


class Inside:
    """A thread with an event loop at a site. Use as a context manager."""

    def __init__(self, site: Site) -> None:
        pid = site.inhabitant()
        if pid is None:
            raise LabError(f"site {site.name} is not up", hint=f"virtgrid lab up --lab {site.layout.name}")
        self._site = site
        self._pid = pid
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name=f"inside-{site.name}", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise LabError(f"site {site.name} cannot be entered", cause=str(self._failure))

    def _work(self) -> None:
        try:
            descriptor = os.pidfd_open(self._pid)
            try:
                # A mount namespace is for those who share their file system state with nobody.
                syscalls.unshare(syscalls.CLONE_FS)
                syscalls.setns(descriptor, _KINDS)
            finally:
                os.close(descriptor)
            self._loop = asyncio.new_event_loop()
        except BaseException as error:  # carried over to the caller
            self._failure = error
            return
        finally:
            self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def call(self, work: Callable[[], Coroutine[Any, Any, T]], *, timeout_s: float = 60.0) -> T:
        """Run ``work()`` there and wait. Errors: its own; DeadlineError."""
        assert self._loop is not None
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            future.cancel()
            raise DeadlineError(f"no answer at {self._site.name} within {timeout_s:g} s") from error

    def close(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def __enter__(self) -> Inside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
