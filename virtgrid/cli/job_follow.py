"""Following a job: its journal as it grows, over as many lines to the coordinator as it takes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from virtgrid.core.errors import (
    AbortedError,
    InterruptedByUserError,
    OutcomeUnknownError,
    PeerUnreachableError,
    RefusedError,
    VirtgridError,
)
from virtgrid.grid.messages.common import parse
from virtgrid.grid.messages.job import (
    FOLLOW,
    JOB,
    JOURNAL_LINE,
    STOP,
    SUBMIT,
    AskJournal,
    Finished,
    JobState,
    JobTold,
    JobView,
    Journal,
    NodeTold,
    SiteTold,
    Submit,
    Verdict,
    Wrote,
)
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.line import Line, deaf
from virtgrid.wire.message import RemoteError

JournalLine = JobTold | NodeTold | SiteTold | Wrote | Finished

_AWAY_S: Final = 60.0
"""How long a coordinator that is being restarted is waited for."""
_GIVEN_BACK_S: Final = 20.0
"""How long it is waited for that everything is given back, once it is known how a job ended."""
_ASK_S: Final = 40.0


class Grc:
    """A coordinator that may go away and come back. A context manager."""

    def __init__(self, where: Endpoint, id_: str) -> None:
        self._where, self._id = where, id_
        self._line: Line | None = None

    async def __aenter__(self) -> Grc:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._line is not None:
            await self._line.close()

    async def ask(self, method: str, params: dict[str, Any]) -> Any:
        """A question that may be asked twice. Errors: the coordinator's; PeerUnreachableError when it never
        was there; OutcomeUnknownError when it went away and did not come back.
        """
        until_s = time.monotonic() + _AWAY_S
        while True:
            try:
                if self._line is None or self._line.lost is not None:
                    self._line = await dial(self._where, deaf, name="the coordinator")
                return await self._line.call(method, params, deadline_s=_ASK_S)
            except RemoteError as error:
                raise RefusedError(error.what) from error
            except PeerUnreachableError as error:
                if self._line is None:
                    raise
                if time.monotonic() > until_s:
                    raise OutcomeUnknownError(
                        f"it is not known what becomes of job {self._id}",
                        cause=error.cause or error.what,
                        hint=f"ask again: virtgrid job show {self._id}",
                    ) from error
                await asyncio.sleep(0.5)

    async def view(self) -> JobView:
        return parse(JobView, JOB, await self.ask(JOB, {"id": self._id}))

    async def stop(self) -> JobView:
        return parse(JobView, STOP, await self.ask(STOP, {"id": self._id}))

    async def lines(
        self, *, wait: bool, stop: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[JournalLine]:
        """The journal from its beginning; to its end with ``wait``, else what there is."""
        after = 0
        while not stop():
            asked = AskJournal(id=self._id, after=after, wait_s=1.0 if wait else 0.0)
            answer = parse(Journal, FOLLOW, await self.ask(FOLLOW, asked.model_dump()))
            for text in answer.lines.split("\n")[:-1]:  # a text may hold other separators
                yield JOURNAL_LINE.validate_json(text)
            if answer.over or (not wait and answer.next == after):
                return
            after = answer.next


class Teller:
    """A job for a terminal: what happens to standard error, output to where it belongs.

    quiet: only the output. as_json: every line of the journal as it is, on standard output.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self._quiet, self._json = quiet, as_json
        self._began_s: float | None = None
        self.decided_s: float | None = None

    def tell(self, line: JournalLine) -> None:
        self._began_s = line.at_s if self._began_s is None else self._began_s
        if isinstance(line, JobTold) and line.state in (JobState.DISMISSING, JobState.OVER):
            self.decided_s = self.decided_s or time.monotonic()
        if self._json:
            print(line.model_dump_json(), flush=True)
        elif isinstance(line, Wrote):
            write(line)
        elif not self._quiet and (text := words(line)):
            print(f"{line.at_s - self._began_s:8.2f} s  {text}", file=sys.stderr, flush=True)

    @property
    def waited_enough(self) -> bool:
        """It is known how the job ended, and giving back takes long."""
        return self.decided_s is not None and time.monotonic() - self.decided_s > _GIVEN_BACK_S


def write(line: Wrote) -> None:
    """A piece of output to where it belongs."""
    out = sys.stdout if line.stream == "stdout" else sys.stderr
    out.flush()
    out.buffer.write(base64.b64decode(line.data))
    out.buffer.flush()


def words(line: JournalLine) -> str:
    """A line of the journal for people; empty: nothing to tell."""
    match line:
        case JobTold():
            return f"{line.state.lower():<10}  {line.reason}"
        case NodeTold():
            why = f": {line.reason}" if line.state in ("FAILED", "LOST") else ""
            return f"  {line.site} {line.node}  {line.state}{why}  ({line.sandbox}, {line.address})"
        case SiteTold():
            return (
                f"  {line.site} {'answers again' if line.problem is None else f'is silent: {line.problem}'}"
            )
        case Finished():
            return ""
    return ""


async def follow(where: Endpoint, asked: Submit, teller: Teller) -> JobView:
    """Submit a job and follow it to its end, or until that is known and giving back takes long.

    Ctrl-C ends the job; twice leaves it.
    """
    id_ = asked.reserve.id
    interrupted = asyncio.Event()
    me = asyncio.current_task()
    assert me is not None

    def interrupt() -> None:
        if interrupted.is_set():
            me.cancel()
        interrupted.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        async with Grc(where, id_) as grc, Grc(where, id_) as other:
            stopping = asyncio.create_task(_stop_when(interrupted, other))
            try:
                # The same words again are the same job, so it does not matter how often they are said.
                await grc.ask(SUBMIT, asked.model_dump(mode="json"))
                async for line in grc.lines(wait=True, stop=lambda: teller.waited_enough):
                    teller.tell(line)
                view = await grc.view()
            finally:
                stopping.cancel()
                await asyncio.gather(stopping, return_exceptions=True)
    except asyncio.CancelledError:
        raise InterruptedByUserError(
            f"job {id_} is being ended", hint=f"look: virtgrid job show {id_}"
        ) from None
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    if interrupted.is_set() and view.verdict is Verdict.CANCELLED:
        raise InterruptedByUserError(f"job {id_} was cancelled")
    return view


async def _stop_when(interrupted: asyncio.Event, grc: Grc) -> None:
    await interrupted.wait()
    print("interrupted: the job is being ended; once more leaves it to itself", file=sys.stderr, flush=True)
    with contextlib.suppress(VirtgridError):
        await grc.stop()


def end(view: JobView) -> int:
    """The exit status of who waited for a job. Errors: what is not the program's own end."""
    left = None
    if view.state is not JobState.OVER:
        left = f"not everything is given back yet: virtgrid job show {view.id}"
    match view.verdict:
        case Verdict.FINISHED if view.status is not None:
            if left is not None:
                print(left, file=sys.stderr)
            return view.status
        case Verdict.FINISHED:
            raise OutcomeUnknownError(f"job {view.id}: {view.reason}", hint=left)
        case Verdict.REFUSED:
            raise RefusedError(f"job {view.id} was not run: {view.reason}", hint="nothing is kept for it")
        case Verdict.CANCELLED:
            raise AbortedError(f"job {view.id} was cancelled", hint=left)
        case Verdict.ENDED:
            raise VirtgridError(f"job {view.id} was ended with its window, before its program was", hint=left)
        case Verdict.BROKEN:
            raise VirtgridError(f"job {view.id} broke: {view.reason}", hint=left)
    raise OutcomeUnknownError(
        f"it is not known yet what becomes of job {view.id}", hint=f"ask again: virtgrid job show {view.id}"
    )
