"""One hierarchy of errors; the class decides the code and the exit status.

Every error can say four things, in the order a person wants them: what happened, where the
domain (or whatever was worked on) is *now*, the cause, and what to do about it. Effects at
the rim translate foreign errors (libvirt, OSError) into these; a bare foreign error that
reaches the command line is a bug.
"""

from __future__ import annotations

from typing import ClassVar


class VirtgridError(Exception):
    """Something virtgrid tells its user about.

    what: one sentence, what happened.
    where: where the domain is now, when one is concerned.
    cause: the underlying message, for instance libvirt's.
    hint: what to do, ideally a command.
    """

    code: ClassVar[str] = "VG-FAILED"
    exit_status: ClassVar[int] = 1

    def __init__(
        self, what: str, *, where: str | None = None, cause: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.cause = cause
        self.hint = hint

    def lines(self) -> list[str]:
        """The message as lines: the sentence, then where, cause and hint, indented."""
        head = f"error: {self.what}"
        if self.where:
            head = f"{head.rstrip('.')}; {self.where}."
        out = [f"{head}  [{self.code}]"]
        out += [f"  {label}: {text}" for label, text in (("cause", self.cause), ("hint", self.hint)) if text]
        return out

    def as_dict(self) -> dict[str, str | int | None]:
        """The same for ``--json``."""
        return {
            "error": self.code,
            "what": self.what,
            "where": self.where,
            "cause": self.cause,
            "hint": self.hint,
            "exit_status": self.exit_status,
        }


class MigrationFailedError(VirtgridError):
    """The migration failed and the domain is safe on the source."""

    code = "VG-MIGRATION-FAILED"


class LabError(VirtgridError):
    """The lab could not do what was asked."""

    code = "VG-LAB"


class UsageError(VirtgridError):
    """The call's words are wrong: an option out of range, options that exclude each other."""

    code = "VG-USAGE"
    exit_status = 2


class RefusedError(VirtgridError):
    """Refused before anything was touched: preflight, configuration, a malformed definition."""

    code = "VG-REFUSED"
    exit_status = 3


class NotHeardError(RefusedError):
    """The other side does not listen to us: our certificate, our rights or our clock. It did nothing."""

    code = "VG-NOT-HEARD"


class NotFoundError(VirtgridError):
    """No such domain, migration, lab or file."""

    code = "VG-NOT-FOUND"
    exit_status = 4


class HoldTimeoutError(VirtgridError):
    """The hold's time was up and the policy said not to switch; still on the source."""

    code = "VG-HOLD-TIMEOUT"
    exit_status = 5


class AbortedError(VirtgridError):
    """Somebody asked for the end; still on the source."""

    code = "VG-ABORTED"
    exit_status = 6


class PositionUnknownError(VirtgridError):
    """It cannot be told on which host the domain is; ``virtgrid migration recover``."""

    code = "VG-POSITION-UNKNOWN"
    exit_status = 7


class OutcomeUnknownError(VirtgridError):
    """It was asked for, and what became of it is not known (yet); the hint says how to ask again."""

    code = "VG-OUTCOME-UNKNOWN"
    exit_status = 7


class PeerUnreachableError(VirtgridError):
    """The other side does not answer, or TLS was refused."""

    code = "VG-PEER-UNREACHABLE"
    exit_status = 8


class NotAdmittedError(PeerUnreachableError):
    """One side does not admit the other, for its certificate, rights or clock. Nothing was asked or done."""

    code = "VG-NOT-ADMITTED"


class DeadlineError(PeerUnreachableError):
    """A call did not answer within its deadline; the connection it ran on is given up."""

    code = "VG-DEADLINE"


class InterruptedByUserError(VirtgridError):
    """Ctrl-C."""

    code = "VG-INTERRUPTED"
    exit_status = 130
