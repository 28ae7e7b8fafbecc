"""From the configuration and a domain's policy to the migration that is asked of a worker. Pure."""

from __future__ import annotations

import re
from typing import Final, get_args

from virtgrid.config import Config, DestinationSection, MigrationSection
from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.core.units import parse_duration, parse_rate, parse_size
from virtgrid.host.queue import Limits, Place
from virtgrid.migration.domainpolicy import DomainPolicy
from virtgrid.migration.plan import MigrationRequest, check_request
from virtgrid.migration.policy import Backoff, OnTimeout, PolicyConfig, PolicyName

#: As in xml-templates/metadata-policy.rng.
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def limits(config: Config) -> Limits:
    """How many migrations there may be at a time. Errors: RefusedError naming the key."""
    for name, slots in (
        ("queue.slots", config.queue.slots),
        ("queue.attempts", config.queue.attempts),
        *((f"queue.destination.{name}.slots", one.slots) for name, one in config.queue.destination.items()),
        *((f"queue.link.{name}.slots", one.slots) for name, one in config.queue.link.items()),
    ):
        if not 1 <= slots <= 1000:
            raise RefusedError(f"the configuration's {name} must be between 1 and 1000, not {slots}")
    for name, one in config.queue.destination.items():
        if not _NAME.fullmatch(name):
            raise RefusedError(
                f"the configuration's queue.destination.{name} is no name that a policy could say",
                hint="small letters, digits and hyphens, at most 63",
            )
        if one.link is not None and one.link not in config.queue.link:
            raise RefusedError(
                f"the configuration's queue.destination.{name}.link is '{one.link}', which is no link"
            )
        request(config, name, domain="any", source_uri="qemu:///system", policy=DomainPolicy())
    if config.queue.name is not None and config.queue.name in config.queue.destination:
        raise RefusedError(f"the configuration's queue.name is '{config.queue.name}', a destination: itself")
    if config.queue.to is not None and config.queue.to not in config.queue.destination:
        raise RefusedError(f"the configuration's queue.to is '{config.queue.to}', which is none")
    return Limits(
        here=config.queue.slots,
        places={
            name: Place(slots=one.slots, link=one.link) for name, one in config.queue.destination.items()
        },
        links={name: one.slots for name, one in config.queue.link.items()},
        attempts=config.queue.attempts,
        retry_s=parse_duration(config.queue.retry),
    )


def request(
    config: Config,
    to: str,
    *,
    domain: str,
    source_uri: str,
    policy: DomainPolicy,
    persistent: bool = False,
    reason: str | None = None,
) -> MigrationRequest:
    """As ``virtgrid migrate`` would ask it. persistent: the domain is, so it is defined over there, not here.

    Errors: RefusedError (no such destination), UsageError (a value out of range).
    """
    place = config.queue.destination.get(to)
    if place is None:
        raise RefusedError(f"the configuration has no destination '{to}'", hint="[queue.destination.NAME]")
    set_ = config.migration
    asked = MigrationRequest(
        domain=domain,
        dest_uri=place.uri,
        source_uri=source_uri,
        policy=_gate(set_, policy),
        copy_storage=None if place.copy_storage == "none" else place.copy_storage,
        persistent=persistent,
        undefine_source=persistent,
        bandwidth_bytes_s=_bandwidth(config, place, policy),
        max_downtime_s=parse_duration(set_.max_downtime),
        migrate_uri=place.migrate_uri,
        tls=place.tls,
        tls_destination=place.tls_destination,
        large_bytes=parse_size(set_.large),
        stall_timeout_s=parse_duration(set_.stall_timeout),
        verify_timeout_s=parse_duration(set_.verify_timeout),
        reason=reason,
    )
    check_request(asked)
    return asked


def _gate(set_: MigrationSection, policy: DomainPolicy) -> PolicyConfig:
    max_wait_s = policy.max_wait_s
    if max_wait_s is None and set_.max_wait not in ("forever", "never"):
        max_wait_s = parse_duration(set_.max_wait)
    name, then = policy.gate or set_.policy, policy.on_timeout or set_.on_timeout
    for value, kind, key in ((name, PolicyName, "policy"), (then, OnTimeout, "on_timeout")):
        if value not in get_args(kind):
            raise UsageError(f"the configuration's migration.{key} is '{value}', none of {get_args(kind)}")
    return PolicyConfig(
        name=name,  # type: ignore[arg-type]  # looked at above
        backoff=Backoff(
            start=set_.backoff.start,
            deferrals_per_step=set_.backoff.deferrals,
            steps=set_.backoff.steps,
            iteration_s=parse_duration(set_.backoff.iteration),
        ),
        max_wait_s=max_wait_s,
        on_timeout=then,  # type: ignore[arg-type]
        confidence=set_.adaptive.confidence,
        ceiling=set_.adaptive.ceiling,
        learn_s=parse_duration(set_.adaptive.learn),
        memory_s=parse_duration(set_.adaptive.memory),
    )


def _bandwidth(config: Config, place: DestinationSection, policy: DomainPolicy) -> float | None:
    """The least of: what the domain's policy says, what is set for all, and a slot's share of the link."""
    found = [policy.bandwidth_bytes_s]
    found += [parse_rate(config.migration.bandwidth)] if config.migration.bandwidth else []
    link = config.queue.link.get(place.link or "")
    if link is not None and link.bandwidth:
        found.append(parse_rate(link.bandwidth) / link.slots)
    return min((one for one in found if one is not None), default=None)
