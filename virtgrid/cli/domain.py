"""``virtgrid domain policy``: a domain's wishes for its migrations, kept in its metadata."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from virtgrid.cli.complete import domains
from virtgrid.cli.output import print_json, run
from virtgrid.config import load
from virtgrid.core.errors import NotFoundError, UsageError
from virtgrid.migration import domainpolicy
from virtgrid.migration.domainpolicy import NAMESPACE, PREFIX, choose, parse
from virtgrid.virt.connection import Hypervisor
from virtgrid.virt.domain import Domain, Scope

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="A domain, as virtgrid sees it.",
)
policy = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Where a domain may be migrated, when it makes way, and how it is gated.",
)
app.add_typer(policy, name="policy")

Name = Annotated[
    str, typer.Argument(metavar="DOMAIN", autocompletion=domains, help="Name, id or UUID of a domain.")
]
Connect = Annotated[
    str,
    typer.Option("-c", "--connect", metavar="URI", envvar="LIBVIRT_DEFAULT_URI", help="The hypervisor."),
]
Config = Annotated[bool, typer.Option("--config", help="The domain as it will start next.")]
Live = Annotated[bool, typer.Option("--live", help="The running domain.")]
Current = Annotated[bool, typer.Option("--current", help="Running or not, as it is now (the default).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _scopes(config: bool, live: bool, current: bool) -> list[Scope]:
    if current and (config or live):
        raise UsageError("--current excludes --config and --live")
    return [scope for scope, asked in ((Scope.CONFIG, config), (Scope.LIVE, live)) if asked] or [
        Scope.CURRENT
    ]


def _one(config: bool, live: bool, current: bool) -> Scope:
    if config and live:
        raise UsageError("--config and --live exclude each other here: they may say different things")
    return _scopes(config, live, current)[0]


def _with(uri: str, reference: str, work: Callable[[Domain], Awaitable[T]]) -> T:
    async def main() -> T:
        async with await Hypervisor.open(uri, name=uri) as hypervisor:
            return await work(await Domain.find(hypervisor, reference))

    return asyncio.run(main())


def _stored(uri: str, reference: str, scope: Scope) -> bytes:
    text = _with(uri, reference, lambda domain: domain.metadata(NAMESPACE, scope))
    if text is None:
        raise NotFoundError(
            f"'{reference}' has no policy", hint=f"virtgrid domain policy set {reference} FILE"
        )
    return text.encode()


def _content(file: Path) -> bytes:
    limit = domainpolicy.LIMIT_BYTES + 1  # one more: what is too long is refused for that
    try:
        if str(file) == "-":
            return sys.stdin.buffer.read(limit)
        with file.open("rb") as opened:
            return opened.read(limit)
    except OSError as error:
        raise NotFoundError(f"{file} cannot be read", cause=error.strerror) from error


@policy.command()
@run
def get(
    domain: Name,
    connect: Connect = "qemu:///system",
    config: Config = False,
    live: Live = False,
    current: Current = False,
    as_json: Json = False,
) -> None:
    """Print a domain's policy as it stands in its metadata."""
    text = _stored(connect, domain, _one(config, live, current))
    if as_json:
        print_json(parse(text, what=f"policy of {domain}"))
    else:
        print(text.decode().strip())


@policy.command("set")
@run
def set_policy(
    domain: Name,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="The policy; - is standard input.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the policy away.")] = False,
    connect: Connect = "qemu:///system",
    config: Config = False,
    live: Live = False,
    current: Current = False,
) -> None:
    """Check a policy and put it into a domain's metadata."""
    if (file is None) is not remove:
        raise UsageError("give either a FILE or --remove")
    scopes, element = _scopes(config, live, current), None
    if file is not None:
        text = _content(file)
        parse(text, what=str(file))
        element = domainpolicy.bare(domainpolicy.read(text, what=str(file)))
    _with(connect, domain, lambda found: found.set_metadata(NAMESPACE, PREFIX, element, scopes))


@policy.command()
@run
def check(
    domain: Name,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Check this instead of what it has.")
    ] = None,
    connect: Connect = "qemu:///system",
    config: Config = False,
    live: Live = False,
    current: Current = False,
    as_json: Json = False,
) -> None:
    """Say whether a policy is well formed, and where the domain would go now; changes nothing."""
    scope = _one(config, live, current)
    text = _content(file) if file is not None else _stored(connect, domain, scope)
    found = parse(text, what=str(file) if file is not None else f"policy of {domain}")
    known = load().config.queue.destination
    choice = choose(found, {name: one.site for name, one in known.items()}, datetime.now(UTC))
    if as_json:
        print_json({"policy": found, "choice": choice})
        return
    print(f"well formed; {'makes way for jobs' if found.yields else 'does not make way for jobs'}")
    if found.follows:
        print("follows prices")
    print(f"goes to   {choice.reason}" if choice.to else f"goes nowhere: {choice.reason}")
