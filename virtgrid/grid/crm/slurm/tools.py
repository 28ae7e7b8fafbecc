"""Running Slurm's programs: argument lists, a clean environment, a deadline, bounded output.

They wait for a slurmctld or a munged that is away for 9 s and more; whoever asked us has given up by then. So
a program that has not answered in time is ended. What it had asked for may have been done all the same: not
known, ask again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from virtgrid.core.errors import DeadlineError, PeerUnreachableError, RefusedError

ANSWER_S: Final = 3.0
"""Less than a coordinator waits for the answer to HOLD: so it is told why there is none."""
OUTPUT_LIMIT_BYTES: Final = 16 << 20
_CHUNK_BYTES: Final = 1 << 16
_AT_ONCE: Final = 16
#: What the programs say when it is not known whether the controller has heard them.
_UNANSWERED: Final = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Zero Bytes were transmitted",
    "standby mode",
    "authentication error",
    "Munge",
    "temporarily unable",
    "Connection refused",
)


class Slurm:
    """The programs of one Slurm. configuration: its slurm.conf; None: where Slurm's own programs look."""

    def __init__(self, configuration: Path | None = None, *, answer_s: float = ANSWER_S) -> None:
        """Errors: RefusedError; Slurm's own programs would wait a minute for a file that is not there."""
        if configuration is not None and not configuration.is_file():
            raise RefusedError(f"there is no {configuration}", hint="slurm.conf of the Slurm to use")
        self._environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            # Nothing else: SQUEUE_FORMAT, SBATCH_… and their like would change what is asked and answered.
            **({"SLURM_CONF": str(configuration.absolute())} if configuration else {}),
        }
        self._answer_s = answer_s
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def ask(self, words: Sequence[str]) -> str:
        """Run a program; what it printed. Errors: RefusedError with its own words; PeerUnreachableError."""
        return await self._run(
            words, b"", {"TZ": "UTC", "LC_ALL": "C.UTF-8", "SLURM_TIME_FORMAT": "standard"}
        )

    async def submit(self, words: Sequence[str], script: bytes, environment: Mapping[str, str]) -> str:
        """sbatch with its script on standard input. environment: of the job."""
        return await self._run(words, script, environment)

    async def _run(self, words: Sequence[str], given: bytes, environment: Mapping[str, str]) -> str:
        async with self._room:
            try:
                process = await asyncio.create_subprocess_exec(
                    *words,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    cwd="/",
                    env={**self._environment, **environment},
                    start_new_session=True,  # Ctrl-C at our terminal is not meant for it
                )
            except FileNotFoundError:
                raise RefusedError(
                    f"{words[0]} is not on this host", hint="apt-get install slurm-client, and a slurm.conf"
                ) from None
            except OSError as error:
                raise RefusedError(f"{words[0]} cannot be run", cause=error.strerror) from error
            problems = bytearray()
            try:
                async with asyncio.timeout(self._answer_s):
                    out, _, _ = await asyncio.gather(
                        _read(process.stdout, bytearray()),
                        _read(process.stderr, problems),
                        _give(process.stdin, given),
                    )
                    status = await process.wait()
            except TimeoutError:
                raise DeadlineError(
                    f"Slurm did not answer within {self._answer_s:g} s", cause=_last_words(problems)
                ) from None
            except _TooLongError:
                raise RefusedError(
                    f"{words[0]} answered with more than {OUTPUT_LIMIT_BYTES >> 20} MiB"
                ) from None
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
        if status == 0:
            return out.decode(errors="replace")
        said = problems.decode(errors="replace")
        if any(words_ in said for words_ in _UNANSWERED):
            raise PeerUnreachableError("Slurm's controller does not answer", cause=_last_words(problems))
        raise RefusedError(f"Slurm refused: {_last_words(problems) or f'{words[0]} ended with {status}'}")


class _TooLongError(Exception):
    pass


async def _read(stream: asyncio.StreamReader | None, into: bytearray) -> bytearray:
    assert stream is not None
    while chunk := await stream.read(_CHUNK_BYTES):
        into += chunk
        if len(into) > OUTPUT_LIMIT_BYTES:
            raise _TooLongError
    return into


async def _give(stream: asyncio.StreamWriter | None, what: bytes) -> None:
    assert stream is not None
    with contextlib.suppress(ConnectionError):  # it has read enough, and says why
        stream.write(what)
        await stream.drain()
        stream.close()
        await stream.wait_closed()


def _last_words(said: bytes | bytearray) -> str | None:
    """The last line of standard error, without the program's name before it."""
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("sbatch: error: ")[:300] if lines else None
