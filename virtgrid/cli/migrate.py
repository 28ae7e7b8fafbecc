"""``virtgrid migrate``: one gated live migration, with virsh's option names."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer

from virtgrid import config
from virtgrid.cli.complete import domains
from virtgrid.cli.follow import follow
from virtgrid.cli.keys import Interrupts
from virtgrid.cli.output import console, print_json, run
from virtgrid.core.errors import NotFoundError, UsageError
from virtgrid.core.units import format_duration, format_size, parse_duration, parse_rate, parse_size
from virtgrid.migration import worker
from virtgrid.migration.naming import parse_request
from virtgrid.migration.plan import MigrationPlan, MigrationRequest, check_request
from virtgrid.migration.policy import Backoff, PolicyConfig
from virtgrid.migration.preflight import failures, preflight

T = TypeVar("T")

#: virsh options that are understood and refused, each with the reason.
REFUSED: Final = {
    "postcopy": "post-copy release is not supported yet; it has no way back once begun",
    "postcopy_after_precopy": "post-copy release is not supported yet",
    "timeout_postcopy": "post-copy release is not supported yet; --timeout suspends the guest instead",
    "compressed": "compression is not supported yet",
    "parallel": "parallel connections are not supported yet: they change what a clamped QEMU lets out",
    "auto_converge": "auto-converge would throttle the guest for as long as it is held",
    "p2p": "virtgrid drives the migration itself, so that the guest stays put should it die",
    "direct": "direct migration is not something QEMU domains have",
    "tunnelled": "tunnelled migration cannot copy storage; use qemu+tls:// or a VPN",
    "suspend": "a guest left paused could not be verified; suspend it with virsh afterwards",
    "offline": "an offline migration needs no gate: virsh migrate --offline",
    "rdma_pin_all": "RDMA is not supported",
    "zerocopy": "zero-copy needs parallel connections, which are not supported yet",
}

_Refused = Annotated[bool, typer.Option(hidden=True)]


def _bandwidth(text: str | None) -> float | None:
    """virsh counts MiB/s; a unit may be given instead."""
    if text is None:
        return None
    return float(text) * 2**20 if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else parse_rate(text)


def _percent(option: str, text: str) -> float:
    """``10%`` or ``10`` -> 0.1."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?%?", text):
        raise UsageError(f"{option}: '{text}' is not a percentage", hint="for instance 10%")
    return float(text.removesuffix("%")) / 100


def _file(option: str, path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        if path.stat().st_size > 1 << 20:
            raise UsageError(f"{option}: {path} is too large for a domain XML")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NotFoundError(f"{option}: cannot read {path}", cause=str(error)) from error


def _steps(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--backoff-steps: '{text}' is not a list of numbers", hint="1,2,4,8,16") from None


def _or(given: T | None, configured: T) -> T:
    """What the command line says, else what the configuration says."""
    return configured if given is None else given


@contextlib.contextmanager
def _naming(configuration: Path | None) -> Iterator[None]:
    """A value out of range may have come from the configuration: say which file that is."""
    try:
        yield
    except UsageError as error:
        if configuration is not None:
            error.hint = f"{f'{error.hint}; ' if error.hint else ''}defaults come from {configuration}"
        raise


def _max_wait(text: str) -> float | None:
    return None if text in ("forever", "never") else parse_duration(text)


@run
def migrate(
    domain: Annotated[
        str,
        typer.Argument(
            metavar="DOMAIN", autocompletion=domains, help="Name, id or UUID of a running domain."
        ),
    ],
    desturi: Annotated[
        str, typer.Argument(metavar="DESTURI", help="libvirt URI of the destination, as for virsh migrate.")
    ],
    connect: Annotated[
        str | None,
        typer.Option(
            "-c",
            "--connect",
            metavar="URI",
            envvar="LIBVIRT_DEFAULT_URI",
            help="The source (qemu:///system).",
        ),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", show_default=False, help="Always on; taken so that virsh lines work.")
    ] = True,
    copy_storage_all: Annotated[
        bool, typer.Option("--copy-storage-all", help="Copy the disks in full.")
    ] = False,
    copy_storage_inc: Annotated[
        bool,
        typer.Option("--copy-storage-inc", help="Copy what differs from backing files both hosts have."),
    ] = False,
    migrate_disks: Annotated[str | None, typer.Option(metavar="vda,vdb", help="Only these disks.")] = None,
    persistent: Annotated[bool, typer.Option("--persistent", help="Define it on the destination.")] = False,
    undefinesource: Annotated[
        bool, typer.Option("--undefinesource", help="Undefine it on the source.")
    ] = False,
    bandwidth: Annotated[
        str | None, typer.Option(metavar="MiB/s", help="At most this; a number of MiB/s, or 100mbit.")
    ] = None,
    service_share: Annotated[
        str | None,
        typer.Option(metavar="PERCENT", help="The part of --bandwidth, the link's, that is the service's."),
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Suspend the guest when it is still here after this time."),
    ] = None,
    timeout_suspend: Annotated[bool, typer.Option("--timeout-suspend", hidden=True)] = True,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Migrate even if libvirt thinks it unsafe.")
    ] = False,
    abort_on_error: Annotated[
        bool, typer.Option("--abort-on-error", help="Give up on soft errors (a disk's I/O).")
    ] = False,
    migrateuri: Annotated[
        str | None, typer.Option(metavar="tcp://HOST[:PORT]", help="Where QEMU connects to.")
    ] = None,
    listen_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Where the destination's QEMU listens.")
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Encrypt memory and disks; each QEMU shows its certificate.")
    ] = False,
    tls_destination: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The name in the destination's certificate, with --tls."),
    ] = None,
    dname: Annotated[str | None, typer.Option(metavar="NAME", help="Its name on the destination.")] = None,
    xml: Annotated[Path | None, typer.Option(metavar="FILE", help="Domain XML for the destination.")] = None,
    persistent_xml: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Persistent XML for the destination.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="immediate (plain libvirt), strict, backoff or adaptive."),
    ] = None,
    max_wait: Annotated[
        str | None, typer.Option(metavar="TIME", help="Hold at most this long (40s); 'forever': no limit.")
    ] = None,
    on_timeout: Annotated[
        str | None, typer.Option(metavar="WHAT", help="Then: release, abort, or hold until told.")
    ] = None,
    max_downtime: Annotated[
        str | None, typer.Option(metavar="TIME", help="Release only when memory fits such a pause (300ms).")
    ] = None,
    backoff_start: Annotated[
        int | None, typer.Option(metavar="N", help="backoff: unsuitable connections permitted at first (0).")
    ] = None,
    backoff_deferrals: Annotated[
        int | None, typer.Option(metavar="N", help="backoff: deferrals before the next step (4).")
    ] = None,
    backoff_steps: Annotated[
        str | None, typer.Option(metavar="N,N…", help="backoff: permitted after each step (1,2,4,8,16).")
    ] = None,
    backoff_iteration: Annotated[
        str | None, typer.Option(metavar="TIME", help="backoff: one iteration (2.5s).")
    ] = None,
    large: Annotated[
        str | None, typer.Option(metavar="SIZE", help="A transfer of this size does not mind a pause (4MiB).")
    ] = None,
    tap: Annotated[
        str | None,
        typer.Option(metavar="INTERFACE", help="Follow the connections on this interface of the domain."),
    ] = None,
    flip: Annotated[
        str,
        typer.Option(metavar="WHAT", help="auto: its frames wait at the destination meanwhile; off: never."),
    ] = "auto",
    drain: Annotated[
        str,
        typer.Option(
            metavar="WHAT", help="auto: flip a little before the stop when requests end in it; off: never."
        ),
    ] = "auto",
    stall_timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="Give up when nothing moves for this long (30s).")
    ] = None,
    verify_timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="Ask the guest so long whether it answers (10s).")
    ] = None,
    dns: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=ADDRESS[,ADDRESS6]",
            help="Point this name to the guest's addresses at the destination.",
        ),
    ] = None,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="Why; written into the journal.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and estimate; change nothing.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Print the migration's id and return.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", hidden=True)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per event.")] = False,
    postcopy: _Refused = False,
    postcopy_after_precopy: _Refused = False,
    timeout_postcopy: _Refused = False,
    compressed: _Refused = False,
    parallel: _Refused = False,
    auto_converge: _Refused = False,
    p2p: _Refused = False,
    direct: _Refused = False,
    tunnelled: _Refused = False,
    suspend: _Refused = False,
    offline: _Refused = False,
    rdma_pin_all: _Refused = False,
    zerocopy: _Refused = False,
) -> None:
    """Migrate a running domain, and stop it only when its clients cannot notice."""
    asked = locals()
    for name, why in REFUSED.items():
        if asked[name]:
            raise UsageError(f"--{name.replace('_', '-')}: {why}")
    if copy_storage_all and copy_storage_inc:
        raise UsageError("--copy-storage-all and --copy-storage-inc exclude each other")
    loaded = config.load()
    set_ = loaded.config.migration
    with _naming(loaded.path):
        request = MigrationRequest(
            domain=domain,
            dest_uri=desturi,
            source_uri=connect or "qemu:///system",
            policy=PolicyConfig(
                name=_or(policy, set_.policy),  # type: ignore[arg-type]  # checked by PolicyConfig itself
                backoff=Backoff(
                    start=_or(backoff_start, set_.backoff.start),
                    deferrals_per_step=_or(backoff_deferrals, set_.backoff.deferrals),
                    steps=_steps(backoff_steps) if backoff_steps is not None else set_.backoff.steps,
                    iteration_s=parse_duration(_or(backoff_iteration, set_.backoff.iteration)),
                ),
                max_wait_s=_max_wait(_or(max_wait, set_.max_wait)),
                on_timeout=_or(on_timeout, set_.on_timeout),  # type: ignore[arg-type]
                confidence=set_.adaptive.confidence,
                ceiling=set_.adaptive.ceiling,
                learn_s=parse_duration(set_.adaptive.learn),
                memory_s=parse_duration(set_.adaptive.memory),
            ),
            copy_storage="all" if copy_storage_all else "inc" if copy_storage_inc else None,
            migrate_disks=tuple(migrate_disks.split(",")) if migrate_disks is not None else None,
            persistent=persistent,
            undefine_source=undefinesource,
            unsafe=unsafe,
            abort_on_error=abort_on_error,
            bandwidth_bytes_s=_bandwidth(_or(bandwidth, set_.bandwidth)),
            service_share=_percent("--service-share", service_share) if service_share is not None else None,
            timeout_s=parse_duration(timeout) if timeout is not None else None,
            max_downtime_s=parse_duration(_or(max_downtime, set_.max_downtime)),
            migrate_uri=migrateuri,
            listen_address=listen_address,
            destination_name=dname,
            destination_xml=_file("--xml", xml),
            persistent_xml=_file("--persistent-xml", persistent_xml),
            tls=tls,
            tls_destination=tls_destination,
            large_bytes=parse_size(_or(large, set_.large)),
            tap=tap,
            flip=flip,
            drain=drain,
            stall_timeout_s=parse_duration(_or(stall_timeout, set_.stall_timeout)),
            verify_timeout_s=parse_duration(_or(verify_timeout, set_.verify_timeout)),
            dns=parse_request(dns, server=loaded.config.dns.server, key_file=loaded.config.dns.key)
            if dns is not None
            else None,
            reason=reason,
        )
        check_request(request)
    if dry_run:
        raise SystemExit(_show_plan(asyncio.run(worker.dry_run(request)), as_json))
    # Counted from before there is anything to interrupt: one that fell in between would be lost.
    with Interrupts() as interrupts:
        started = worker.start(request, interrupted=lambda: interrupts.count > 0)
        if detach:
            print_json({"id": started.journal.stem, "journal": started.journal}) if as_json else print(
                started.journal.stem
            )
            return
        status = follow(started, as_json, interrupts)
    raise SystemExit(status)


# --- the dry run --------------------------------------------------------------------------


def _show_plan(plan: MigrationPlan, as_json: bool) -> int:
    checks = preflight(plan)
    failed = failures(checks)
    estimate = plan.estimate
    if as_json:
        print_json(
            {
                "domain": plan.name,
                "source": plan.facts.source.hostname,
                "destination": plan.facts.destination.hostname,
                "checks": checks,
                "create": [disk.path for disk in plan.to_create],
                "storage_bytes": estimate.storage_bytes,
                "memory_bytes": estimate.memory_bytes,
                "storage_s": estimate.storage_s,
                "memory_s": estimate.memory_s,
                "would_migrate": not failed,
            }
        )
        return 3 if failed else 0
    out = console()
    disks = ", ".join(f"{disk.target} {format_size(disk.capacity_bytes)}" for disk in plan.facts.disks)
    out.print(
        f"plan      {plan.name} ({format_size(estimate.memory_bytes)} RAM{', ' + disks if disks else ''})"
        f" {plan.facts.source.hostname} → {plan.facts.destination.hostname}",
        soft_wrap=True,
    )
    if estimate.storage_s is not None and estimate.memory_s is not None:
        out.print(
            f"estimate  storage {format_duration(estimate.storage_s)},"
            f" memory {format_duration(estimate.memory_s)} at the bandwidth given"
        )
    else:
        out.print(
            f"estimate  {format_size(estimate.storage_bytes)} of storage and"
            f" {format_size(estimate.memory_bytes)} of memory; --bandwidth gives times"
        )
    wait_s = plan.request.policy.max_wait_s
    waits = "without limit" if wait_s is None else f"at most {format_duration(wait_s)}"
    hold = f"hold      {plan.request.policy.name}, {waits}, then: {plan.request.policy.on_timeout}"
    out.print(hold if plan.request.gated else "hold      none (policy immediate)")
    for check in checks:
        out.print(f" {check.verdict.value:<5} {check.name:<12} {check.text}", soft_wrap=True)
        if check.hint and check.verdict.value != "PASS":
            out.print(f"       hint: {check.hint}", soft_wrap=True)
    out.print("nothing was changed")
    return 3 if failed else 0
