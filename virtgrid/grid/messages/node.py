"""The conversation of a NodeManager (the pilot on a node) with its CRM.

Source: Nakada et al. 2009, tables 4 and 5. The pilot dials in and says HELLO; from then on the CRM gives
commands, and the pilot tells what changes, in numbered notifications (``virtgrid.wire.outbox``).
"""

from __future__ import annotations

import base64
import json
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import Field, StringConstraints, model_validator

from virtgrid.grid.messages.common import (
    HostName,
    Ipv4,
    Key,
    Model,
    Name,
    Number,
    PublicKey,
    Tag,
    UserName,
    Word,
)


class State(StrEnum):
    """What a NodeManager is at (the paper's table 5)."""

    INITIAL = "INITIAL"
    INITIATING = "INITIATING"
    HOST_READY = "HOST_READY"
    KEYS_READY = "KEYS_READY"
    STARTING_UP = "STARTING_UP"
    RUNNING = "RUNNING"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    DONE = "DONE"
    FAILED = "FAILED"


class Command(StrEnum):
    """What a CRM may ask of a NodeManager (the paper's table 4)."""

    INIT = "INIT"
    GET_KEYS = "GET_KEYS"
    GET_STATUS = "GET_STATUS"
    SET_KEYS = "SET_KEYS"
    RUN = "RUN"
    EXEC = "EXEC"
    SHUT_DOWN = "SHUT_DOWN"


# -- commands ------------------------------------------------------------------------------------


class Keyed(Model):
    """key: idempotency; the same question with the same key gets the same answer, and is done once."""

    key: Key | None = None


class Init(Keyed):
    """What the sandbox is to be: its address on the isolated network of this tag, its user's name.

    Its own name, inside and outside, is the ticket's.
    """

    address: Ipv4
    prefix: Annotated[int, Field(ge=1, le=30)]
    tag: Tag
    user: UserName


class Nothing(Keyed):
    """GET_STATUS, GET_KEYS, RUN and SHUT_DOWN take nothing."""


class HostEntry(Model):
    """One node of the whole cluster. slots: how many processes a launcher should put there."""

    hostname: HostName
    address: Ipv4
    host_key: PublicKey
    user_key: PublicKey
    slots: Annotated[int, Field(ge=1, le=4096)] = 1


class SetKeys(Keyed):
    """Every node of the cluster, this one included, in the order of the hostfile."""

    hosts: Annotated[tuple[HostEntry, ...], Field(min_length=1, max_length=4096)]

    @model_validator(mode="after")
    def _unique(self) -> SetKeys:
        for what in ("hostname", "address"):
            seen = [getattr(host, what) for host in self.hosts]
            if len(set(seen)) != len(seen):
                raise ValueError(f"two hosts have the same {what}")
        return self


VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]


class Exec(Keyed):
    """A program to run as the sandbox's user, in its home: arguments (the first names it) and variables."""

    argv: Annotated[tuple[Word, ...], Field(min_length=1, max_length=4096)]
    env: Annotated[dict[VariableName, Word], Field(max_length=256)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> Exec:
        # The kernel's limit is 128 KiB for one word, and they travel in one.
        if len(json.dumps([self.argv, self.env])) > 96 << 10:
            raise ValueError("arguments and variables are longer than 96 KiB together, written as JSON")
        return self


PARAMS: Final[dict[Command, type[Keyed]]] = {
    Command.INIT: Init,
    Command.GET_KEYS: Nothing,
    Command.GET_STATUS: Nothing,
    Command.SET_KEYS: SetKeys,
    Command.RUN: Nothing,
    Command.EXEC: Exec,
    Command.SHUT_DOWN: Nothing,
}


# -- answers and what is told unasked ------------------------------------------------------------


class Keys(Model):
    """GET_KEYS: the public halves; the private ones are in the sandbox and nowhere else."""

    user_key: PublicKey
    host_key: PublicKey


class Status(Model):
    """GET_STATUS, and in HELLO. reason: why this state, for people. execs: programs that run."""

    state: State
    reason: str
    since: str
    reservation: Name
    sandbox: Name
    ends_at: str
    execs: tuple[str, ...] = ()


class Usage(Model):
    """What a program and its children used, by getrusage(2); max_rss_bytes: of the largest process."""

    user_s: float
    system_s: float
    max_rss_bytes: Number
    elapsed_s: float


class Started(Model):
    """EXEC's answer. Output and end come as notifications with this name."""

    exec: str


class StateChanged(Model):
    """Notification ``state``."""

    state: State
    before: State
    reason: str
    at: str


class Output(Model):
    """Notification ``output``: a piece of what the program wrote; data: base64, since it may be anything."""

    exec: str
    stream: Literal["stdout", "stderr"]
    data: str

    @staticmethod
    def of(exec_: str, stream: Literal["stdout", "stderr"], data: bytes) -> Output:
        """A piece from its bytes."""
        return Output(exec=exec_, stream=stream, data=base64.b64encode(data).decode())


class Finished(Model):
    """Notification ``finished``: how a program ended.

    status: what a shell would say (128 + n for signal n; 127 and 125 when it could not be started), None when
    it is not known; then problem says why.
    """

    exec: str
    status: int | None
    usage: Usage | None = None
    problem: str | None = None


NOTES: Final[dict[str, type[Model]]] = {"state": StateChanged, "output": Output, "finished": Finished}


class Hello(Model):
    """The pilot's first words on every line.

    ticket: its text. session: what the pilot made up at its first start; a ticket that was used is good for
    nobody who cannot repeat it. incarnation, base, acknowledged: ``virtgrid.wire.outbox.Standing``.
    """

    protocol: Literal[1] = 1
    ticket: Annotated[str, StringConstraints(max_length=16 << 10)]
    session: Key
    incarnation: Annotated[int, Field(ge=1, lt=1 << 31)]
    base: Number
    acknowledged: Number
    status: Status


class Welcome(Model):
    """HELLO's answer. after: the pilot goes on with the notifications after this number."""

    protocol: Literal[1] = 1
    after: Number


class Tell(Model):
    """TELL: one numbered notification of the pilot."""

    number: Annotated[int, Field(ge=1, lt=1 << 53)]
    kind: Literal["state", "output", "finished"]
    body: dict[str, Any]


class Acknowledge(Model):
    """ACK: the CRM has taken all notifications up to this number."""

    number: Number
