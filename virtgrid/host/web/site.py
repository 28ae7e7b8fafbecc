"""The page, the REST interface and the metrics of a host, over a unix socket or HTTPS.

Over a unix socket the file's mode says who may ask. Over the network everybody shows a certificate of the
grid, and a list says who may look and who may steer. Nothing is kept here: the journals are the record, and
whoever steers speaks to the migration's own driver, as ``virtgrid migration release`` does.

A browser sends a certificate along with whatever another page has it ask. So nothing is changed by what such
a page can send: only by a body of JSON, which a browser asks us about first, and we never allow it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from virtgrid.core import journal
from virtgrid.core.errors import (
    DeadlineError,
    NotFoundError,
    PeerUnreachableError,
    RefusedError,
    UsageError,
    VirtgridError,
)
from virtgrid.grid.messages.common import first_fault
from virtgrid.host.web import metrics, openapi
from virtgrid.host.web.grid import Grid
from virtgrid.host.web.model import (
    Host,
    Jobs,
    Migration,
    Migrations,
    Problem,
    Reservations,
    Steer,
    Steered,
    Unreadable,
    migration,
)
from virtgrid.host.web.shelf import Seen, Shelf
from virtgrid.migration import control
from virtgrid.report.files import load
from virtgrid.report.html import render_html
from virtgrid.wire.endpoint import Endpoint, bind
from virtgrid.wire.tls import Shown, Tls

#: Every browser asks once a second; the disk is asked for all of them together.
_FRESH_S: Final = 0.5
_BODY_BYTES_MAX: Final = 4096
_HANDSHAKE_S: Final = 10.0
#: A browser keeps some six connections; this is for dozens of them.
_CALLERS_MAX: Final = 256
_PAGE: Final = Path(__file__).parent / "page"
_PAGE_FILES: Final = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_NOTHING_FROM_OUTSIDE: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: A report is one file with its own style, and no script.
_REPORT_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_STATUS: Final[tuple[tuple[type[VirtgridError], int], ...]] = (
    (UsageError, 400),
    (NotFoundError, 404),
    (DeadlineError, 503),
    (PeerUnreachableError, 503),
    (RefusedError, 409),
)
_WHO: Final = web.RequestKey("who", str)
_STEERS: Final = web.RequestKey("steers", bool)

B = TypeVar("B", bound=BaseModel)
_log = logging.getLogger(__name__)


def _version() -> str:
    try:
        return version("virtgrid")
    except PackageNotFoundError:
        return "0"


class Web:
    """An async context manager: answers while it lasts. at: where, with the port that was free.

    readers, operators: who may look, and who may steer as well (``str(Identity)``), over the network; over
    the unix socket whoever can open it may do both.
    """

    def __init__(
        self,
        where: Endpoint,
        *,
        directory: Path | None = None,
        tls: Tls | None = None,
        readers: frozenset[str] = frozenset(),
        operators: frozenset[str] = frozenset(),
        grid: Grid | None = None,
        mode: int = 0o600,
    ) -> None:
        self.at = where
        self._tls = tls if where.is_network else None
        self._readers, self._operators, self._grid, self._mode = readers, operators, grid, mode
        self._directory = directory or journal.migrations_dir()
        self._shelf = Shelf(self._directory)
        self._seen: list[Seen] = []
        self._looked_s = float("-inf")
        self._looking = asyncio.Lock()
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Web:
        """Errors: RefusedError: cannot listen there, or no certificate."""
        if self.at.is_network and self._tls is None:
            raise RefusedError(f"{self.at} needs a certificate", hint="docs/reference/pki.md")
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._shelf.close)
            sock, self.at = await bind(self.at, mode=self._mode)
            stack.push_async_callback(self._unbind, sock)
            runner = web.AppRunner(self._app(), access_log=None, keepalive_timeout=30.0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            context = None if self._tls is None else _context(self._tls)
            place = web.SockSite(runner, sock, ssl_context=context, backlog=128)
            await place.start()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _unbind(self, sock: socket.socket) -> None:
        sock.close()
        if isinstance(self.at.place, Path):
            self.at.place.unlink(missing_ok=True)

    def _app(self) -> web.Application:
        app = web.Application(
            client_max_size=_BODY_BYTES_MAX, middlewares=[_answered, self._bounded(), self._known]
        )
        for path in _PAGE_FILES:
            app.router.add_get(path, self._page)
        app.router.add_get("/report/{reference}", self._report)
        app.router.add_get("/metrics", self._metrics)
        prefix = openapi.PREFIX
        app.router.add_get(f"{prefix}/openapi.json", self._described)
        handlers: Mapping[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
            "host": self._host,
            "listMigrations": self._migrations,
            "showMigration": self._migration,
            "releaseMigration": self._release,
            "abortMigration": self._abort,
            "listJobs": self._jobs,
            "listReservations": self._reservations,
        }
        for one in openapi.OPERATIONS:
            app.router.add_route(one.method.upper(), prefix + one.path, handlers[one.name])
        return app

    # -- who asks --------------------------------------------------------------------------------

    def _bounded(self) -> Any:
        """At most so many questions at a time."""
        places = asyncio.Semaphore(_CALLERS_MAX)

        @web.middleware
        async def bounded(request: web.Request, handler: Any) -> web.StreamResponse:
            async with places:
                found: web.StreamResponse = await handler(request)
                return found

        return bounded

    @property
    def _known(self) -> Any:
        @web.middleware
        async def known(request: web.Request, handler: Any) -> web.StreamResponse:
            request[_WHO], request[_STEERS] = self._who(request)
            found: web.StreamResponse = await handler(request)
            return found

        return known

    def _who(self, request: web.Request) -> tuple[str, bool]:
        """Who asks, and whether it may steer. Errors: _NotForYouError."""
        if self._tls is None:
            return "the socket on this host", True
        transport = request.transport
        ssl_object = None if transport is None else transport.get_extra_info("ssl_object")
        der = None if ssl_object is None else ssl_object.getpeercert(binary_form=True)
        if der is None:
            raise _NotForYouError("whoever asks shows a certificate of the grid")
        try:
            shown: Shown = self._tls.examine(der)
        except RefusedError as error:
            raise _NotForYouError(error.what) from error
        who = str(shown.identity)
        if who in self._operators:
            return who, True
        if who in self._readers:
            return who, False
        raise _NotForYouError(
            f"{who} is not among those this host was told of", hint=f"it is when started with --reader {who}"
        )

    # -- what is asked ---------------------------------------------------------------------------

    async def _look(self) -> list[Seen]:
        async with self._looking:
            if time.monotonic() - self._looked_s > _FRESH_S:
                self._seen = await asyncio.to_thread(self._shelf.look)
                self._looked_s = time.monotonic()
            return self._seen

    async def _find(self, request: web.Request) -> tuple[Seen, Path]:
        """Errors: NotFoundError; RefusedError when its journal cannot be read."""
        reference = request.match_info["reference"]
        path = await asyncio.to_thread(journal.find, reference, self._directory)
        for seen in await self._look():
            if seen.path == path:
                return seen, path
        raise NotFoundError(f"no migration '{reference[:80]}' here")

    async def _page(self, request: web.Request) -> web.StreamResponse:
        name, kind = _PAGE_FILES[request.path]
        return web.Response(
            body=await asyncio.to_thread((_PAGE / name).read_bytes),
            content_type=kind,
            charset="utf-8",
            headers={"Content-Security-Policy": _NOTHING_FROM_OUTSIDE},
        )

    async def _report(self, request: web.Request) -> web.StreamResponse:
        _, path = await self._find(request)
        text = await asyncio.to_thread(lambda: render_html(load(path)))
        return web.Response(
            text=text, content_type="text/html", headers={"Content-Security-Policy": _REPORT_POLICY}
        )

    async def _metrics(self, _: web.Request) -> web.StreamResponse:
        body = metrics.exposition(await self._look(), self._shelf.gone, datetime.now(UTC))
        return web.Response(body=body, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def _described(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(openapi.document(_version()))

    async def _host(self, request: web.Request) -> web.StreamResponse:
        return _said(
            Host(
                host=socket.gethostname(),
                version=_version(),
                who=request[_WHO],
                may_steer=request[_STEERS],
                grid=self._grid is not None,
                now_at=datetime.now(UTC),
            )
        )

    async def _migrations(self, request: web.Request) -> web.StreamResponse:
        limit = _limit(request)
        seen, now = await self._look(), datetime.now(UTC)
        shown = [one for one in seen if one.status is not None]
        return _said(
            Migrations(
                migrations=tuple(_migration(one, now) for one in shown[:limit]),
                unreadable=tuple(
                    Unreadable(journal=one.path.name, why=one.why) for one in seen if one.status is None
                )[:limit],
                more=self._shelf.more or len(shown) > limit,
            )
        )

    async def _migration(self, request: web.Request) -> web.StreamResponse:
        seen, _ = await self._find(request)
        return _said(_migration(seen, datetime.now(UTC)))

    async def _release(self, request: web.Request) -> web.StreamResponse:
        return await self._steer(request, "release")

    async def _abort(self, request: web.Request) -> web.StreamResponse:
        return await self._steer(request, "abort")

    async def _steer(self, request: web.Request, command: str) -> web.StreamResponse:
        if not request[_STEERS]:
            raise _NotForYouError(
                f"{request[_WHO]} may look, and not steer", hint=f"--operator {request[_WHO]} lets it"
            )
        asked = await _body(request, Steer)
        _, path = await self._find(request)
        by = " for ".join(part for part in (request[_WHO], asked.by) if part)
        answer = await asyncio.to_thread(control.steer, path, command, by=by)
        _log.info("%s of %s, asked by %s: %s", command, path.stem, by, answer.get("text", ""))
        if not answer.get("ok"):
            raise RefusedError(str(answer.get("text", "the migration's driver says no"))[:400])
        return _said(Steered(ok=True, text=str(answer.get("text", ""))[:400]))

    async def _jobs(self, _: web.Request) -> web.StreamResponse:
        if self._grid is None:
            return _said(Jobs(jobs=(), why=_NO_GRID))
        return _said(await self._grid.jobs())

    async def _reservations(self, _: web.Request) -> web.StreamResponse:
        if self._grid is None:
            return _said(Reservations(reservations=(), why=_NO_GRID))
        return _said(await self._grid.reservations())


_NO_GRID: Final = "this host was not told of a coordinator (--grc)"


class _NotForYouError(RefusedError):
    """The caller is known, or not, and may not."""


def _context(tls: Tls) -> ssl.SSLContext:
    """Ours for as long as we listen, and within it whatever certificate is ours at the time."""
    context = tls.server_context()

    def renewed(there: ssl.SSLObject | ssl.SSLSocket, _name: object, _context: ssl.SSLContext) -> None:
        there.context = tls.server_context()

    context.sni_callback = renewed  # asked at every handshake, whether or not a name is told
    return context


def _migration(seen: Seen, now: datetime) -> Migration:
    if seen.status is None:
        raise RefusedError(f"the journal {seen.path.name} cannot be read", cause=seen.why)
    return migration(seen.status, seen.path, now)


def _limit(request: web.Request) -> int:
    said = request.query.get("limit", "50")
    if not said.isascii() or not said.isdigit() or not 1 <= int(said[:6]) <= openapi.LIMIT_MAX:
        raise UsageError(f"limit: '{said[:40]}' is no number from 1 to {openapi.LIMIT_MAX}")
    return int(said)


async def _body(request: web.Request, model: type[B]) -> B:
    """What was sent. Errors: UsageError; HTTP 413 and 415."""
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType
    try:
        return model.model_validate_json(await request.read())
    except ValidationError as error:
        raise UsageError(f"what was sent: {first_fault(error)}") from error


def _said(answer: BaseModel) -> web.Response:
    return web.Response(text=answer.model_dump_json(), content_type="application/json")


@web.middleware
async def _answered(request: web.Request, handler: Any) -> web.StreamResponse:
    """Every end of a question in one form, and with what a browser needs to know."""
    try:
        found: web.StreamResponse = await handler(request)
    except web.HTTPException as error:
        found = _problem(error.status, "VG-HTTP", error.reason)
        if isinstance(error, web.HTTPMethodNotAllowed):
            found.headers["Allow"] = ",".join(sorted(error.allowed_methods))
    except _NotForYouError as error:
        found = _problem(403, error.code, error.what, error.cause, error.hint)
    except VirtgridError as error:
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
        found = _problem(status, error.code, error.what, error.cause, error.hint)
    except asyncio.CancelledError:
        raise
    except Exception:
        _log.exception("%s %s failed", request.method, request.path)
        found = _problem(500, "VG-BUG", "this should not happen; the log says more")
    found.headers["Server"] = "virtgrid"
    found.headers["Cache-Control"] = "no-store"
    found.headers["X-Content-Type-Options"] = "nosniff"
    found.headers["Referrer-Policy"] = "no-referrer"
    return found


def _problem(
    status: int, kind: str, title: str, detail: str | None = None, hint: str | None = None
) -> web.Response:
    said = Problem(type=kind, title=title, status=status, detail=detail, hint=hint)
    return web.Response(text=said.model_dump_json(), status=status, content_type="application/problem+json")
