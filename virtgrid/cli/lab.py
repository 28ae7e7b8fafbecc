"""``virtgrid lab``: several sites on one machine."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from virtgrid.cli.output import print_json, print_table, run
from virtgrid.core.errors import LabError, UsageError
from virtgrid.core.units import (
    format_duration,
    format_rate,
    format_size,
    parse_duration,
    parse_rate,
    parse_size,
)
from virtgrid.lab import faults
from virtgrid.lab.lab import Lab, require_possible, take_down
from virtgrid.lab.layout import DEFAULT_NAME, LabConfig, LinkSpec, check_name, parse_sites

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Several sites on one machine: a libvirtd each, a WAN between.",
)
break_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Break something on purpose, and put it back."
)
app.add_typer(break_app, name="break")

LabName = Annotated[str, typer.Option("--lab", metavar="NAME", help="Which lab.", envvar="VIRTGRID_LAB_NAME")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
SiteName = Annotated[str, typer.Argument(metavar="SITE")]
Restore = Annotated[bool, typer.Option("--restore", help="Put it back as it was.")]


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_share(text: str) -> float:
    """``10%`` or ``0.1`` -> 0.1. Errors: UsageError."""
    number = text.removesuffix("%")
    try:
        value = float(number) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise UsageError(f"'{text}' is not a share", hint="write 10% or 0.1") from None
    if not 0 <= value <= 1:
        raise UsageError(f"'{text}' is not a share between 0% and 100%")
    return value


@app.command()
@run
def up(
    lab: LabName = DEFAULT_NAME,
    sites: Annotated[
        str, typer.Option(metavar="SITES", help="How many (2 to 4), or their names: alice,bob.")
    ] = "2",
    rate: Annotated[
        str, typer.Option(metavar="RATE", help="Of the WAN, each way; 0 is unlimited.")
    ] = "100mbit",
    rtt: Annotated[str, typer.Option(metavar="TIME", help="Of the WAN, there and back.")] = "0",
    queue: Annotated[
        str, typer.Option(metavar="TIME", help="How long a frame may wait before the WAN drops it.")
    ] = "100ms",
    client_rtt: Annotated[
        str, typer.Option(metavar="TIME", help="Between client and sites, there and back.")
    ] = "0",
    stretched: Annotated[
        bool,
        typer.Option(
            "--stretched", help="Clients reach the first site only; segments join the others to it."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring a lab up, or mend one that is."""
    spec = LinkSpec(
        rate_bytes_s=0.0 if rate == "0" else parse_rate(rate),
        rtt_s=parse_duration(rtt),
        queue_s=parse_duration(queue),
    )
    config = LabConfig(
        name=lab,
        sites=parse_sites(sites),
        wan=spec,
        client_rtt_s=parse_duration(client_rtt),
        stretched=stretched,
    )
    made = Lab.up(config, tell=_tell)
    if as_json:
        print_json(made.status())


@app.command()
@run
def down(lab: LabName = DEFAULT_NAME) -> None:
    """End and remove everything of a lab, whatever state it is in."""
    if not take_down(lab, tell=_tell):
        _tell(f"there is no lab '{lab}', nothing to take down")


@app.command()
@run
def status(lab: LabName = DEFAULT_NAME, as_json: Json = False) -> None:
    """Show what a lab is doing."""
    check_name(lab)
    require_possible()
    found = Lab.load(lab).status()
    if as_json:
        print_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    wan = found["wan"]
    print(f"lab {found['name']}   {found['directory']}")
    print(f"WAN: {_wan_words(wan)}\n")
    rows = [
        (
            site["name"],
            site["libvirtd"] + ("" if site["keeper_pid"] else ", keeper dead"),
            ", ".join(site["domains"]) or "none",
            site["wan_address"],
            site["segment_address"],
            site["uri"],
        )
        for site in found["sites"]
    ]
    print_table(("SITE", "LIBVIRTD", "DOMAINS", "WAN", "SEGMENT", "URI"), rows)
    ways = wan.get("directions", [])
    if ways:
        print()
        print_table(
            ("OVER THE WAN", "FRAMES", "BYTES", "DROPPED"),
            [
                (f"{way['from']} → {way['to']}", way["frames"], format_size(way["bytes"]), way["dropped"])
                for way in ways
            ],
        )


def _wan_words(wan: dict[str, Any]) -> str:
    if wan["kind"] == "dead":
        return "its process does not run; virtgrid lab up mends it"
    rate = "unlimited" if not wan["rate_bytes_s"] else f"{wan['rate_bytes_s'] * 8 / 1e6:g} Mbit/s"
    words = [rate, f"RTT {format_duration(wan['rtt_s'])}", f"queue {format_duration(wan['queue_s'])}"]
    if wan["loss"]:
        words.append(f"loss {wan['loss']:.1%}")
    if wan["cut"]:
        words.append("CUT")
    if wan["restored_in_s"] is not None:
        words.append(f"restored in {format_duration(wan['restored_in_s'])}")
    return f"{', '.join(words)} ({wan['kind']})"


@app.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@run
def exec_(
    place: Annotated[str, typer.Argument(metavar="SITE|client")],
    command: Annotated[list[str], typer.Argument(metavar="CMD…")],
    lab: LabName = DEFAULT_NAME,
) -> None:
    """Run a command at a site or the client: its status, its terminal."""
    require_possible()
    if command and command[0] == "--":
        command = command[1:]
    if not command:
        raise UsageError("no command to run")
    argv = Lab.load(lab).place(place).argv(command)
    try:
        sys.stdout.flush()
        os.execvp(argv[0], argv)  # noqa: S606 - by argument list, and that is the point
    except OSError as error:
        raise LabError(f"'{argv[0]}' could not be run", cause=str(error)) from error


@break_app.command("wan")
@run
def break_wan(
    cut: Annotated[bool, typer.Option("--cut", help="Lose every frame.")] = False,
    rate: Annotated[str | None, typer.Option(metavar="RATE", help="Another rate.")] = None,
    rtt: Annotated[str | None, typer.Option(metavar="TIME", help="Another round-trip time.")] = None,
    loss: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Lose this share of the frames: 10%.")
    ] = None,
    for_: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="Put it back by itself after this time.")
    ] = None,
    restore: Restore = False,
    lab: LabName = DEFAULT_NAME,
) -> None:
    """Cut or slow the WAN while it runs."""
    wanted = cut or any(value is not None for value in (rate, rtt, loss))
    if restore == wanted or (restore and for_ is not None):
        raise UsageError("say what to do: --cut, --rate, --rtt, --loss (with --for TIME), or --restore alone")
    values: dict[str, float | None] = {
        "rate_bytes_s": None if rate is None else parse_rate(rate),
        "rtt_s": None if rtt is None else parse_duration(rtt),
        "loss": None if loss is None else parse_share(loss),
        "for_s": None if for_ is None else parse_duration(for_),
    }
    if values["for_s"] == 0:
        raise UsageError("--for needs a time longer than 0")
    LinkSpec(**{key: value for key, value in values.items() if value is not None and key != "for_s"})
    require_possible()
    found = Lab.load(lab)
    if restore:
        found.restore_wan()
        _tell("the WAN is as it was made")
        return
    found.change_wan(cut=True if cut else None, **values)
    words = [
        "cut" if cut else "",
        f"rate {format_rate(values['rate_bytes_s'])}" if values["rate_bytes_s"] else "",
        f"RTT {rtt}" if rtt else "",
        f"loss {loss}" if loss else "",
        f"for {for_}" if for_ else "until --restore",
    ]
    _tell(f"WAN: {', '.join(word for word in words if word)}")


@break_app.command("libvirtd")
@run
def break_libvirtd(
    site: SiteName,
    stop: Annotated[bool, typer.Option("--stop", help="SIGSTOP: it hangs.")] = False,
    cont: Annotated[bool, typer.Option("--cont", help="SIGCONT: it goes on.")] = False,
    restore: Annotated[bool, typer.Option("--restore", help="Start it again.")] = False,
    lab: LabName = DEFAULT_NAME,
) -> None:
    """Kill a site's libvirtd (kill -9), or stop it."""
    if stop + cont + restore > 1:
        raise UsageError("--stop, --cont and --restore exclude each other")
    require_possible()
    there = Lab.load(lab).site(site)
    if stop:
        faults.stop_libvirtd(there)
        _tell(f"libvirtd of {site} hangs; --cont lets it go on")
    elif cont:
        faults.continue_libvirtd(there)
        _tell(f"libvirtd of {site} goes on")
    elif restore:
        changed = faults.restore_libvirtd(there)
        _tell(f"libvirtd of {site} {'runs again' if changed else 'was running'}")
    else:
        faults.kill_libvirtd(there)
        _tell(f"libvirtd of {site} is dead; --restore starts it again")


@break_app.command("qemu")
@run
def break_qemu(
    site: SiteName,
    domain: Annotated[str, typer.Argument(metavar="DOMAIN")],
    lab: LabName = DEFAULT_NAME,
) -> None:
    """Kill the QEMU of a domain (kill -9)."""
    require_possible()
    pid = faults.kill_qemu(Lab.load(lab).site(site), domain)
    _tell(f"QEMU {pid} of domain {domain} at {site} is dead")


@break_app.command("disk")
@run
def break_disk(
    site: SiteName,
    free: Annotated[str | None, typer.Option(metavar="SIZE", help="Room left for new images: 1MiB.")] = None,
    restore: Restore = False,
    lab: LabName = DEFAULT_NAME,
) -> None:
    """Fill the disk of a site's images. The machine's own disk is not filled."""
    if restore == (free is not None):
        raise UsageError("say either --free SIZE or --restore")
    free_bytes = 0 if free is None else parse_size(free)
    require_possible()
    there = Lab.load(lab).site(site)
    if restore:
        limited = faults.unlimit_disk(there)
        _tell(f"disk of {site} {'has its room again' if limited else 'was not limited'}")
    else:
        faults.limit_disk(there, free_bytes)
        _tell(f"disk of {site} has {format_size(faults.disk_room(there).free_bytes)} left for new images")


@break_app.command("certificate")
@run
def break_certificate(site: SiteName, restore: Restore = False, lab: LabName = DEFAULT_NAME) -> None:
    """Give a site certificates of a foreign authority; its libvirtd is restarted."""
    require_possible()
    found = Lab.load(lab)
    there = found.site(site)
    if restore:
        faults.restore_certificate(found, there)
        _tell(f"{site} has the lab's certificates again")
    else:
        faults.foreign_certificate(there)
        _tell(f"{site} has certificates nobody trusts; --restore puts the lab's back")
