"""``virtgrid ticket``: what permits a pilot to have a sandbox, made by hand where no CRM does."""

from __future__ import annotations

import os
import pwd
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from virtgrid.cli.output import print_json, run
from virtgrid.core.errors import NotFoundError, UsageError
from virtgrid.core.units import parse_duration, parse_size
from virtgrid.grid.messages import ticket as tickets
from virtgrid.grid.messages.common import first_fault
from virtgrid.wire import seal

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Tickets: what permits a pilot to have a sandbox on a host.",
)


@app.command("new-key")
@run
def new_key(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The private key; FILE.pub is the public one.")
    ],
) -> None:
    """Make the pair of keys tickets are signed with; hosts get the public one."""
    key = seal.new_key()
    seal.write_private(file, seal.private_text(key))
    public = file.with_name(f"{file.name}.pub")
    public.write_text(seal.public_text(key.public_key()))
    print(f"{public} is for the hosts: /etc/virtgrid/crm.pub")


@app.command()
@run
def issue(
    sandbox: Annotated[str, typer.Argument(metavar="NAME", help="Of the sandbox, and of its host inside.")],
    key: Annotated[Path, typer.Option(metavar="FILE", help="The private key.")],
    user: Annotated[str, typer.Option(metavar="ACCOUNT", help="Of the host, that the pilot runs as.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write it; must not be there.")],
    reservation: Annotated[str, typer.Option(metavar="NAME")] = "by-hand",
    lasts: Annotated[str, typer.Option(metavar="TIME", help="From now on.")] = "1h",
    memory: Annotated[str, typer.Option(metavar="SIZE", help="The sandbox's limit.")] = "512MiB",
    processes: Annotated[int, typer.Option(help="The sandbox's limit.")] = 1024,
    cpus: Annotated[str | None, typer.Option(metavar="LIST", help="Processors it may use: 0-3,6.")] = None,
    site: Annotated[
        str | None, typer.Option(metavar="SITE", help="Whose pilot: with a certificate, to dial over TLS.")
    ] = None,
) -> None:
    """Write a ticket as a file only its pilot can read."""

    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise NotFoundError(f"this host has no account '{user}'") from None
    now_s = time.time()
    try:
        ticket = tickets.Ticket(
            id=tickets.new_id(),
            reservation=reservation,
            sandbox=sandbox,
            uid=account.pw_uid,
            begins_at_s=now_s,
            ends_at_s=now_s + parse_duration(lasts),
            memory_bytes=parse_size(memory),
            processes=processes,
            cpus=cpus,
        )
    except ValidationError as error:
        raise UsageError(f"such a ticket cannot be: {first_fault(error)}") from None
    signing = seal.read_private_key(key)
    if site is None:
        text = f"{tickets.issue(ticket, signing)}\n"
    else:
        text = tickets.issue_file(ticket, signing, site=site, now=datetime.fromtimestamp(now_s, UTC))
    seal.write_private(out, text)
    if os.geteuid() == 0:
        os.chown(out, account.pw_uid, account.pw_gid)


@app.command()
@run
def show(file: Annotated[Path, typer.Argument(metavar="FILE")]) -> None:
    """Say what a ticket says, as JSON. Whether it is genuine only a host can tell."""
    print_json(tickets.read(file)[1].model_dump())
