"""``virtgrid sandbox``: make, look at, enter and end sandboxes of this host."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import typer

from virtgrid.cli.output import print_json, print_table, run
from virtgrid.core.errors import NotFoundError, RefusedError, UsageError, VirtgridError
from virtgrid.core.units import format_size, parse_duration, parse_size
from virtgrid.grid.node.sandbox import DEFAULT_URI, Sandbox, Sandboxes
from virtgrid.grid.node.spec import DEFAULT_TEMPLATE, SandboxLimits, SandboxSpec

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Disposable sandboxes: LXC domains over a shared template.",
)

Json = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]
Name = Annotated[str, typer.Argument(metavar="NAME")]
Connect = Annotated[str, typer.Option("--connect", "-c", metavar="URI", help="libvirt's LXC driver.")]
_DEFAULTS = SandboxLimits()


def _with(uri: str, work: Callable[[Sandboxes], Awaitable[T]]) -> T:
    """Run ``work`` with the sandboxes of this host."""
    if os.geteuid() != 0:
        raise RefusedError("sandboxes are made and entered by root", hint="run it with sudo")

    async def main() -> T:
        async with await Sandboxes.open(uri) as sandboxes:
            return await work(sandboxes)

    return asyncio.run(main())


@app.command()
@run
def create(
    name: Name,
    user: Annotated[str, typer.Option(metavar="USER", help="Its user, by the name inside.")],
    address: Annotated[str, typer.Option(metavar="ADDRESS/PREFIX", help="Of its one interface.")],
    bridge: Annotated[str, typer.Option(metavar="BRIDGE", help="The segment it is connected to.")],
    account: Annotated[
        str | None,
        typer.Option(metavar="ACCOUNT", help="The host's account it shares, when named differently."),
    ] = None,
    gateway: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Its default route.")] = None,
    mtu: Annotated[int, typer.Option(metavar="BYTES", help="1450 over a VXLAN on 1500.")] = 1500,
    template: Annotated[str, typer.Option(metavar="NAME")] = DEFAULT_TEMPLATE,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Of its processes and its layer.")] = "512MiB",
    layer: Annotated[
        str, typer.Option(metavar="SIZE", help="For what it writes outside of home.")
    ] = "256MiB",
    processes: Annotated[int, typer.Option(metavar="N", help="At one time.")] = _DEFAULTS.processes,
    cpuset: Annotated[str | None, typer.Option(metavar="LIST", help="Processors: 0-3,6.")] = None,
    walltime: Annotated[
        str | None, typer.Option(metavar="TIME", help="After which it ends by itself.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Without a user namespace: its root is the host's.")
    ] = False,
    connect: Connect = DEFAULT_URI,
    as_json: Json = False,
) -> None:
    """Make a sandbox and wait until its sshd answers."""
    spec = SandboxSpec(
        name=name,
        user=user,
        address=address,
        bridge=bridge,
        account=account,
        gateway=gateway,
        mtu=mtu,
        template=template,
        user_namespace=not plain,
        limits=SandboxLimits(
            memory_bytes=parse_size(memory),
            layer_bytes=parse_size(layer),
            processes=processes,
            cpuset=cpuset,
            walltime_s=None if walltime is None else max(1, round(parse_duration(walltime))),
        ),
    )

    async def work(sandboxes: Sandboxes) -> dict[str, Any]:
        return await _shown(sandboxes, await sandboxes.make(spec))

    found = _with(connect, work)
    if as_json:
        print_json(found)
    else:
        print(f"sandbox '{name}' is up at {spec.ip} for {user}")


@app.command("list")
@run
def list_(connect: Connect = DEFAULT_URI, as_json: Json = False) -> None:
    """Show all sandboxes of this host."""
    found = _with(connect, lambda sandboxes: sandboxes.list())
    if as_json:
        print_json([_plain(box) for box in found])
        return
    rows = [
        (box.name, box.state, box.spec.user, box.spec.host_account, box.spec.address, box.spec.bridge)
        for box in found
    ]
    print_table(("NAME", "STATE", "USER", "ACCOUNT", "ADDRESS", "BRIDGE"), rows)


@app.command()
@run
def show(name: Name, connect: Connect = DEFAULT_URI, as_json: Json = False) -> None:
    """Show one sandbox: its limits, its first process, its public keys."""

    async def work(sandboxes: Sandboxes) -> dict[str, Any]:
        return await _shown(sandboxes, await sandboxes.find(name))

    found = _with(connect, work)
    if as_json:
        print_json(found)
        return
    limits = found["limits"]
    print(f"sandbox {found['name']}   {found['state']}   {found['address']} on {found['bridge']}")
    print(f"user       {found['user']}, account {found['account']}, uid {found['uid']}")
    print(f"isolation  {'user namespace' if found['user_namespace'] else 'plain: root is the host root'}")
    print(
        f"memory     {format_size(limits['memory_bytes'])}, of it layer {format_size(limits['layer_bytes'])}"
    )
    print(f"processes  {limits['processes']}   processors {limits['cpuset'] or 'all'}")
    print(f"ends       {_ends(limits['walltime_s'])}")
    if found["init_pid"]:
        print(f"process    {found['init_pid']}")
    if found["keys"]:
        print(f"host key   {found['keys']['host']}\nuser key   {found['keys']['user']}")


@app.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@run
def exec_(
    name: Name,
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...")],
    connect: Connect = DEFAULT_URI,
    root: Annotated[bool, typer.Option("--root", help="As the sandbox's root.")] = False,
) -> None:
    """Run a command inside: its input, output and exit status are yours."""
    if command[0] == "--":
        command = command[1:]
    if not command:
        raise UsageError("there is no command", hint="virtgrid sandbox exec NAME COMMAND...")
    _run_inside(connect, name, command, as_root=root, terminal=False)


@app.command()
@run
def shell(
    name: Name,
    connect: Connect = DEFAULT_URI,
    root: Annotated[bool, typer.Option("--root", help="As the sandbox's root.")] = False,
) -> None:
    """A login shell inside, with a terminal."""
    _run_inside(connect, name, ["/bin/bash", "-l"], as_root=root, terminal=sys.stdin.isatty())


def _run_inside(uri: str, name: str, argv: list[str], *, as_root: bool, terminal: bool) -> None:
    async def work(sandboxes: Sandboxes) -> tuple[tuple[str, ...], dict[str, str]]:
        found = sandboxes.command(await sandboxes.find(name), argv, as_root=as_root, terminal=terminal)
        return found.argv, dict(found.env)

    argv_outside, env = _with(uri, work)
    child = subprocess.Popen(argv_outside, env=env)
    while True:
        try:
            raise SystemExit(child.wait())
        except KeyboardInterrupt:  # the command has it too, and decides
            continue


@app.command()
@run
def destroy(
    names: Annotated[list[str], typer.Argument(metavar="NAME...")], connect: Connect = DEFAULT_URI
) -> None:
    """End sandboxes and remove everything of them."""

    async def work(sandboxes: Sandboxes) -> list[str]:
        missing, first = [], None
        for name in names:
            try:
                if not await sandboxes.destroy(name):
                    missing.append(name)
            except VirtgridError as error:  # the others go all the same
                first = first or error
        if first is not None:
            raise first
        return missing

    if missing := _with(connect, work):
        raise NotFoundError(f"there is no sandbox '{missing[0]}'", hint="virtgrid sandbox list")


def _plain(box: Sandbox) -> dict[str, Any]:
    spec = box.spec.as_dict()
    return {
        **spec,
        "account": box.spec.host_account,
        "mac": box.spec.mac,
        "state": box.state,
        "uuid": box.uuid,
        "uid": box.uid,
        "gid": box.gid,
        "init_pid": None if box.init is None else box.init.pid,
    }


async def _shown(sandboxes: Sandboxes, box: Sandbox) -> dict[str, Any]:
    try:
        keys = await sandboxes.keys(box.name)
    except NotFoundError:  # made inside, a moment from now
        return {**_plain(box), "keys": None}
    return {**_plain(box), "keys": {"host": keys.host, "user": keys.user}}


def _ends(walltime_s: int | None) -> str:
    return "when told" if walltime_s is None else f"by itself after {walltime_s} s"
