"""Types of the grid's messages. Every text is bounded, and none can break out of a file it is written
into.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from virtgrid.core.errors import UsageError
from virtgrid.wire.message import bad_parameters

M = TypeVar("M", bound=BaseModel)


class Model(BaseModel):
    """Frozen, exact about types, and without members nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def parse(model: type[M], method: str, params: Mapping[str, Any]) -> M:
    """Parameters as a model. Errors: BadMessageError that names the place."""
    try:
        # By way of JSON, where a list is a tuple and a text an enum's member; Python's objects are stricter.
        return model.model_validate_json(json.dumps(params))
    except ValidationError as error:
        raise bad_parameters(method, first_fault(error)) from None


def require(kind: Any, what: str, value: object) -> None:
    """A value that a person gave, by one of the types below. Errors: UsageError."""
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise UsageError(f"{what}: {first_fault(error)}, and not '{str(value)[:80]}'") from None


def first_fault(error: ValidationError) -> str:
    """The first thing a model had against its input, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])[:120]
    text = {"extra_forbidden": "is not known", "missing": "is missing"}.get(first["type"], first["msg"])
    text = text.removeprefix("Value error, ")  # pydantic's words, not ours
    return f"{where}: {text}" if where else text


def _ipv4(text: str) -> str:
    address = ipaddress.IPv4Address(text)
    if address.is_loopback or address.is_multicast or address.is_unspecified or address == _BROADCAST:
        raise ValueError("not an address a node can have")
    return str(address)


_BROADCAST: Final = ipaddress.IPv4Address("255.255.255.255")
_HOSTNAME: Final = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
#: The form of a public key in authorized_keys and known_hosts, without a comment: nothing else gets into
#: them.
PUBLIC_KEY: Final = re.compile(r"ssh-ed25519 [A-Za-z0-9+/]{68}")

#: A name of ours: reservations, sandboxes. The same rule as for libvirt domains we make.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
#: A user inside sandboxes (the form useradd(8) takes); root is nobody's choice.
UserName = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z_][a-z0-9_-]{0,31}$"),
    AfterValidator(lambda name: name if name != "root" else _refuse("root is no user of a sandbox")),
]
#: One label of a host's name.
HostName = Annotated[
    str,
    StringConstraints(pattern=rf"^{_HOSTNAME}$"),
    AfterValidator(lambda name: name if name != "localhost" else _refuse("that is everybody's name")),
]
Ipv4 = Annotated[str, StringConstraints(max_length=15), AfterValidator(_ipv4)]
PublicKey = Annotated[str, StringConstraints(pattern=rf"^{PUBLIC_KEY.pattern}$")]
#: Which isolated network of the site: a VLAN tag or a VXLAN number.
Tag = Annotated[int, Field(ge=1, le=(1 << 24) - 1)]
Key = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{8,64}$")]
#: An argument, a variable's value, a path: anything a program can be given, and no NUL, which it cannot.
Word = Annotated[str, StringConstraints(max_length=96 << 10, pattern=r"^[^\x00]*$")]
Number = Annotated[int, Field(ge=0, lt=1 << 53)]


def _refuse(text: str) -> str:
    raise ValueError(text)
