"""``virtgrid doctor``: what a host lacks, with the command that mends it."""

from __future__ import annotations

from typing import Annotated

import typer

from virtgrid.cli.output import console, print_json, run
from virtgrid.host.doctor import findings
from virtgrid.migration.preflight import CheckVerdict

_WORDS = {CheckVerdict.PASS: "ok", CheckVerdict.WARN: "warn", CheckVerdict.FAIL: "FAIL"}


@run
def doctor(
    uri: Annotated[
        str | None, typer.Argument(metavar="URI", help="Another host's libvirt; default: this host.")
    ] = None,
    connect: Annotated[
        str,
        typer.Option("-c", "--connect", metavar="URI", envvar="LIBVIRT_DEFAULT_URI", help="This host's URI."),
    ] = "qemu:///system",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False,
) -> None:
    """Say what this host, or a URI's, lacks for migration and sandboxes; exit 3 when something fails."""
    found = findings(uri or connect, local=uri is None)
    failed = sum(check.verdict is CheckVerdict.FAIL for check in found)
    warned = sum(check.verdict is CheckVerdict.WARN for check in found)
    if as_json:
        print_json(found)
    else:
        out = console()
        for check in found:
            style = {CheckVerdict.FAIL: "bold red", CheckVerdict.WARN: "yellow"}.get(check.verdict)
            out.print(f" {_WORDS[check.verdict]:<5} {check.name}: {check.text}", style=style, soft_wrap=True)
            if check.hint and check.verdict is not CheckVerdict.PASS:
                out.print(f"       hint: {check.hint}", soft_wrap=True)
        print(f"{failed} failed, {warned} warning{'s' if warned != 1 else ''}")
    if failed:
        raise SystemExit(3)
