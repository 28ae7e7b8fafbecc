"""What a ticket says. The CRM of a site signs it; the hosts of the site know the CRM's public key.

A ticket permits one pilot, running as one user of the host, to have one sandbox for one window of time.
The queueing system hands it to the pilot as a file of mode 0600, never as an argument.

To dial in over TLS a pilot needs a certificate, and gets one with its ticket, in the same file: for its
window, and signed with the same key. Only the CRM that issued it trusts that key, and for pilots only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, StringConstraints, ValidationError, model_validator

from virtgrid.core.errors import RefusedError
from virtgrid.grid.messages.common import HostName, Key, Model, Name, first_fault
from virtgrid.wire import seal
from virtgrid.wire.identity import Identity, LocalUser, Peer, Role
from virtgrid.wire.pki.signing import FOR_EVER, Signer, authority_name, key_pem, new_key, pem

_LONG_AGO: Final = datetime(2000, 1, 1, tzinfo=UTC)
_FAREWELL: Final = timedelta(hours=1)
"""So long after its window a pilot may still tell, on the line it has, how it ended."""

CpuSet = Annotated[str, StringConstraints(max_length=200, pattern=r"^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$")]


class Ticket(Model):
    """begins_at_s, ends_at_s: the reservation's window, seconds since the epoch.

    sandbox: its name, and what its host is called inside; unique in the whole cluster. uid: who the pilot
    runs as; its home is the one that is shared. memory_bytes, processes: the sandbox's limits; cpus: the
    processors it may use (None: all).
    """

    v: Literal[1] = 1
    id: Key
    reservation: Name
    sandbox: HostName
    uid: Annotated[int, Field(ge=1, lt=65535)]
    begins_at_s: Annotated[float, Field(ge=0, lt=1e11)]
    ends_at_s: Annotated[float, Field(ge=0, lt=1e11)]
    memory_bytes: Annotated[int, Field(ge=16 << 20, le=1 << 50)]
    processes: Annotated[int, Field(ge=16, le=1 << 22)] = 4096
    cpus: CpuSet | None = None

    @model_validator(mode="after")
    def _window(self) -> Ticket:
        if self.ends_at_s <= self.begins_at_s:
            raise ValueError("the window ends before it begins")
        return self


def issue(ticket: Ticket, key: Ed25519PrivateKey) -> str:
    """The ticket as its text, one line."""
    return seal.seal(ticket.model_dump_json().encode(), key)


def issuer(key: Ed25519PrivateKey, site: str) -> Signer:
    """Who signs the pilots of a site: the key that signs their tickets. The same as long as the key is."""
    who = authority_name(f"pilots of {site}", "virtgrid tickets")
    return Signer.create(who, now=_LONG_AGO, key=key, until=FOR_EVER)


def issue_file(ticket: Ticket, key: Ed25519PrivateKey, *, site: str, now: datetime) -> str:
    """The ticket, and below it a certificate and its key for dialling in over TLS."""
    own = new_key()
    certificate = issuer(key, site).identify(
        own.public_key(),
        Identity(role=Role.PILOT, site=site, name=ticket.sandbox),
        (),
        now=now,
        until=datetime.fromtimestamp(ticket.ends_at_s, UTC) + _FAREWELL,
    )
    return f"{issue(ticket, key)}\n{pem(certificate).decode()}{key_pem(own).decode()}"


def admit(text: str, keys: Iterable[Ed25519PublicKey], *, bearer: Peer, now_s: float) -> Ticket:
    """The ticket, if it is genuine, the caller's own, and its window has not ended. Pure.

    now_s: seconds since the epoch. Errors: RefusedError.
    """
    ticket = _parse(seal.unseal(text, keys))
    match bearer:
        case LocalUser() if bearer.uid != ticket.uid:
            raise RefusedError(f"this ticket is of user {ticket.uid}, and user {bearer.uid} brings it")
        case Identity() if bearer.role is not Role.PILOT or bearer.name != ticket.sandbox:
            raise RefusedError(f"this ticket is of the pilot {ticket.sandbox}, and {bearer} brings it")
    if now_s >= ticket.ends_at_s:
        raise RefusedError(f"reservation {ticket.reservation} has ended")
    return ticket


def read(path: Path) -> tuple[str, Ticket]:
    """A pilot's own ticket: its text, and what it says. Errors: RefusedError (mode, owner, form)."""
    text = seal.read_private(path, what="the ticket").strip().partition("\n")[0]
    return text, _parse(seal.peek(text))


def _parse(body: bytes) -> Ticket:
    try:
        return Ticket.model_validate_json(body)
    except ValidationError as error:
        raise RefusedError(f"the ticket says something impossible: {first_fault(error)}") from None


def new_id() -> str:
    """An id no other ticket has."""
    import secrets

    return re.sub(r"[^A-Za-z0-9_-]", "_", secrets.token_urlsafe(18))
