"""Connections to libvirt: one thread each, a deadline on every call, events delivered to asyncio.

Rules of this file, each bought with a hang:

* *A connection belongs to one thread.* While a thread sits in the blocking migrate call it owns
  the connection's RPC loop, and a second thread's call on the same connection may lose its
  wake-up. So a migration uses separate connections for the migrate call and for everything else.
* *Every call has a deadline.* Python cannot interrupt a thread inside libvirt; when the deadline
  passes the connection is given up: its thread is a daemon thread, later calls fail at once.
* *The event loop is libvirt's own, in a thread of its own.* Keep-alive and events then go on
  while asyncio is busy, and it survives several asyncio loops in one process, which libvirtaio
  (bound for ever to the first loop) does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import libvirt

from virtgrid.core.errors import DeadlineError, NotFoundError, PeerUnreachableError, VirtgridError

T = TypeVar("T")

#: Keep-alive: a peer silent for INTERVAL x COUNT seconds is dead and pending calls fail.
KEEPALIVE_INTERVAL_S: Final = 5
KEEPALIVE_COUNT: Final = 3
OPEN_DEADLINE_S: Final = 15.0
CALL_DEADLINE_S: Final = 10.0

_event_loop_lock = threading.Lock()
_event_loop_running = False


def _ensure_event_loop() -> None:
    """Register and run libvirt's event loop once per process; before the first open."""
    global _event_loop_running
    with _event_loop_lock:
        if _event_loop_running:
            return
        libvirt.registerErrorHandler(lambda *_: None, None)  # or it prints over the live view
        libvirt.virEventRegisterDefaultImpl()

        def run() -> None:
            while True:
                libvirt.virEventRunDefaultImpl()

        threading.Thread(target=run, name="libvirt-events", daemon=True).start()
        _event_loop_running = True


class LibvirtError(VirtgridError):
    """libvirt said no. ``number`` is libvirt's error code (virErrorNumber)."""

    code = "VG-LIBVIRT"

    def __init__(self, what: str, *, number: int, cause: str, hint: str | None = None) -> None:
        super().__init__(what, cause=cause, hint=hint)
        self.number = number

    @property
    def aborted(self) -> bool:
        """The operation was ended on request."""
        return bool(self.number == libvirt.VIR_ERR_OPERATION_ABORTED)


_UNREACHABLE_CODES: Final = frozenset(
    {
        libvirt.VIR_ERR_NO_CONNECT,
        libvirt.VIR_ERR_INVALID_CONN,
        libvirt.VIR_ERR_GNUTLS_ERROR,
        libvirt.VIR_ERR_NO_SERVER,
        libvirt.VIR_ERR_RPC,
        libvirt.VIR_ERR_AUTH_FAILED,
        libvirt.VIR_ERR_AUTH_CANCELLED,
        libvirt.VIR_ERR_AUTH_UNAVAILABLE,
        libvirt.VIR_ERR_LIBSSH,
        libvirt.VIR_ERR_SSH,
    }
)
_CLOSE_REASONS: Final = {
    libvirt.VIR_CONNECT_CLOSE_REASON_ERROR: "the connection broke",
    libvirt.VIR_CONNECT_CLOSE_REASON_EOF: "its libvirtd closed the connection",
    libvirt.VIR_CONNECT_CLOSE_REASON_KEEPALIVE: "it answers no keep-alive any more",
    libvirt.VIR_CONNECT_CLOSE_REASON_CLIENT: "closed by us",
}
# Errors of the client's own socket come as "system" or "internal" errors of these domains.
_TRANSPORT_DOMAINS: Final = frozenset({libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE})


def translate(error: libvirt.libvirtError, what: str) -> VirtgridError:
    """A libvirt error in our hierarchy; its text becomes the cause."""
    number, domain, text = error.get_error_code(), error.get_error_domain(), error.get_error_message() or ""
    if number in (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_NO_STORAGE_POOL, libvirt.VIR_ERR_NO_STORAGE_VOL):
        return NotFoundError(what, cause=text)
    gone = domain in _TRANSPORT_DOMAINS and number in (
        libvirt.VIR_ERR_SYSTEM_ERROR,
        libvirt.VIR_ERR_INTERNAL_ERROR,
    )
    if number in _UNREACHABLE_CODES or gone:
        hint = None
        if "ertificate" in text or "TLS" in text:
            hint = "check date, names and issuer of the certificates with virt-pki-validate on both hosts"
        return PeerUnreachableError(what, cause=text, hint=hint)
    return LibvirtError(what, number=number or 0, cause=text)


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleEvent:
    """A domain's lifecycle event; received_s on CLOCK_MONOTONIC of this process's host."""

    uuid: str
    event: int
    detail: int
    received_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuEvent:
    """A QMP event of one domain. clock_s: QEMU's own time stamp, seconds since the epoch."""

    uuid: str
    name: str
    clock_s: float
    received_s: float
    details: str


class Hypervisor:
    """One libvirt connection and the one thread that may use it.

    Open it with ``await Hypervisor.open(uri)``, close it with ``await close()``; as an async
    context manager it closes itself. ``call`` runs a function of the raw connection there.
    """

    def __init__(self, uri: str, name: str) -> None:
        self.uri = uri
        self.name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._raw: Any = None
        self._given_up: str | None = None
        #: Why the peer is gone (its libvirtd ended, keep-alive ran out), or None while it is there.
        self.lost: str | None = None
        #: Whether it was the peer that ended the connection: its libvirtd is not there any more.
        self.ended_by_peer = False
        self._callbacks: list[tuple[str, int]] = []
        self._thread = threading.Thread(target=self._work, name=f"libvirt-{name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    @classmethod
    async def open(
        cls, uri: str, *, name: str | None = None, deadline_s: float = OPEN_DEADLINE_S, readonly: bool = False
    ) -> Hypervisor:
        """Connect. Errors: PeerUnreachableError (TLS refused included), DeadlineError."""
        _ensure_event_loop()
        self = cls(uri, name or uri)

        def connect(_: Any) -> Any:
            raw = libvirt.openReadOnly(uri) if readonly else libvirt.open(uri)
            # Not every transport has keep-alive; where it is missing the deadlines remain.
            with contextlib.suppress(libvirt.libvirtError):
                raw.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
            with contextlib.suppress(libvirt.libvirtError):
                raw.registerCloseCallback(self._on_close, None)
            return raw

        try:
            self._raw = await self.call(connect, f"cannot connect to {uri}", deadline_s=deadline_s)
        except DeadlineError:
            raise
        except VirtgridError as error:
            self._jobs.put(None)
            hint = error.hint or "is libvirtd running there, and does the URI name the right host and driver?"
            raise PeerUnreachableError(error.what, cause=error.cause, hint=hint) from error
        return self

    def _on_close(self, _conn: Any, reason: int, _opaque: Any) -> None:
        self.ended_by_peer = reason == libvirt.VIR_CONNECT_CLOSE_REASON_EOF
        self.lost = _CLOSE_REASONS.get(reason, "the connection was closed")

    @property
    def usable(self) -> bool:
        """False once a call missed its deadline or the peer went away: nothing more is sent."""
        return self._given_up is None and self.lost is None

    async def call(
        self, fn: Callable[[Any], T], what: str, *, deadline_s: float | None = CALL_DEADLINE_S
    ) -> T:
        """Run ``fn(raw connection)`` in the connection's thread.

        what: the sentence of the error should it fail ("cannot look up domain web1").
        deadline_s: None only for the migrate call itself, which has its own watchdogs.
        Errors: DeadlineError; whatever ``translate`` makes of a libvirt error.
        """
        if self._given_up is not None:
            raise DeadlineError(what, cause=f"the connection to {self.name} was given up: {self._given_up}")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def deliver(result: T | None, error: BaseException | None) -> None:
            if future.done():  # the deadline was faster
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # T may itself be None

        def job() -> None:
            result: T | None = None
            failure: BaseException | None = None
            try:
                result = fn(self._raw)
            except libvirt.libvirtError as error:
                failure = translate(error, what)
            except Exception as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(deliver, result, failure)

        self._jobs.put(job)
        try:
            async with asyncio.timeout(deadline_s):
                return await future
        except TimeoutError as error:
            self._given_up = f"no answer within {deadline_s:g} s"
            raise DeadlineError(
                what,
                cause=f"{self.name} did not answer within {deadline_s:g} s",
                hint="is its libvirtd hanging?",
            ) from error

    async def close(self) -> None:
        """Close the connection, unless it hangs, in which case it is left to its daemon thread."""
        if self._raw is not None and self._given_up is None:

            def disconnect(raw: Any) -> None:
                for kind, number in self._callbacks:
                    with contextlib.suppress(libvirt.libvirtError):
                        if kind == "qemu":
                            _qemu().qemuMonitorEventDeregister(raw, number)
                        else:
                            raw.domainEventDeregisterAny(number)
                with contextlib.suppress(libvirt.libvirtError):
                    raw.close()

            with contextlib.suppress(VirtgridError):
                await self.call(disconnect, f"cannot close the connection to {self.name}", deadline_s=5)
        self._given_up = self._given_up or "closed"
        self._jobs.put(None)

    async def __aenter__(self) -> Hypervisor:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- facts about the host ---------------------------------------------------------

    async def hostname(self) -> str:
        """The name this hypervisor calls itself."""
        return str(await self.call(lambda raw: raw.getHostname(), f"cannot ask {self.name} for its name"))

    async def round_trip_s(self) -> float:
        """Seconds one small call takes: twice the way of an event, at the least."""

        def measure(raw: Any) -> float:
            best = float("inf")
            for _ in range(3):
                began = time.monotonic()
                raw.getLibVersion()
                best = min(best, time.monotonic() - began)
            return best

        return await self.call(measure, f"cannot reach {self.name}")

    # --- events -----------------------------------------------------------------------

    async def on_lifecycle(self, handler: Callable[[LifecycleEvent], None]) -> None:
        """Call ``handler`` on the asyncio loop for every lifecycle event of any domain."""
        loop = asyncio.get_running_loop()

        def callback(_conn: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
            heard = LifecycleEvent(
                uuid=domain.UUIDString(), event=event, detail=detail, received_s=time.monotonic()
            )
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(handler, heard)

        def register(raw: Any) -> int:
            return int(
                raw.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, callback, None)
            )

        number = await self.call(register, f"cannot listen to the events of {self.name}")
        self._callbacks.append(("libvirt", number))

    async def on_qemu_event(self, names: str, handler: Callable[[QemuEvent], None]) -> None:
        """Call ``handler`` on the asyncio loop for the QMP events matching the regex ``names``."""
        loop = asyncio.get_running_loop()

        def callback(
            _conn: Any, domain: Any, event: str, seconds: int, micros: int, details: str | None, _opaque: Any
        ) -> None:
            heard = QemuEvent(
                uuid=domain.UUIDString(),
                name=event,
                clock_s=seconds + micros / 1e6,
                received_s=time.monotonic(),
                details=details or "",
            )
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(handler, heard)

        def register(raw: Any) -> int:
            api = _qemu()
            flags = api.VIR_CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX
            return int(api.qemuMonitorEventRegister(raw, None, names, callback, None, flags))

        number = await self.call(register, f"cannot listen to QEMU's events on {self.name}")
        self._callbacks.append(("qemu", number))


def _qemu() -> Any:
    # Imported late: the QEMU half of the binding is absent where libvirt was built without it.
    import libvirt_qemu

    return libvirt_qemu
