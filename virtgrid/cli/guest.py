"""``virtgrid lab guest``: build images, boot guests in a lab, list and destroy them."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from virtgrid.cli.output import print_json, print_table, run
from virtgrid.core.units import format_duration, format_size, parse_rate, parse_size
from virtgrid.lab import guest as guests
from virtgrid.lab.guest import GuestSpec
from virtgrid.lab.image import GuestImage, ensure_image
from virtgrid.lab.lab import Lab
from virtgrid.lab.layout import DEFAULT_NAME

app = typer.Typer(no_args_is_help=True, help="Guests of a lab: build, boot, list, destroy.")

LabOption = Annotated[
    str, typer.Option("--lab", metavar="NAME", help="Which lab.", envvar="VIRTGRID_LAB_NAME")
]
SiteOption = Annotated[str, typer.Option("--site", metavar="SITE", help="Which site.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_DEFAULTS = GuestSpec(name="web")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _image_dict(image: GuestImage) -> dict[str, Any]:
    return {
        "kind": image.kind,
        "key": image.key,
        "directory": str(image.directory),
        "kernel_bytes": image.kernel.stat().st_size,
        "initrd_bytes": image.initrd.stat().st_size,
        "disk_bytes": image.disk_virtual_bytes,
        "disk_allocated_bytes": image.disk.stat().st_blocks * 512,
    }


@app.command()
@run
def build(
    kind: Annotated[str, typer.Argument(help="small (seconds) or debian (minutes).")] = "small",
    as_json: JsonOption = False,
) -> None:
    """Build a guest image, unless the cache has it."""
    told = _image_dict(ensure_image(kind, progress=_say))
    if as_json:
        print_json(told)
    else:
        boot_bytes = told["kernel_bytes"] + told["initrd_bytes"]
        print(
            f"{told['directory']}  kernel and initrd {format_size(boot_bytes)}, "
            f"disk {format_size(told['disk_allocated_bytes'])} of {format_size(told['disk_bytes'])}"
        )


@app.command()
@run
def boot(
    lab_name: LabOption = DEFAULT_NAME,
    site: SiteOption = "alice",
    name: Annotated[str, typer.Option("--name", metavar="DOMAIN", help="Name of the domain.")] = "web",
    image: Annotated[str, typer.Option("--image", metavar="KIND", help="small or debian.")] = _DEFAULTS.image,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="As 192MiB; default: what the image needs.")
    ] = None,
    vcpus: Annotated[int, typer.Option("--vcpus", help="Virtual processors.")] = _DEFAULTS.vcpus,
    address: Annotated[
        str, typer.Option("--address", metavar="IPV4", help="Its address.")
    ] = _DEFAULTS.address,
    disk_size: Annotated[
        str | None,
        typer.Option("--disk-size", metavar="SIZE", help="Virtual size, as 1GiB; default: the image's."),
    ] = None,
    disk_format: Annotated[
        str, typer.Option("--disk-format", metavar="FORMAT", help="raw or qcow2.")
    ] = _DEFAULTS.disk_format,
    memcheck: Annotated[
        int, typer.Option("--memcheck", help="Pages the guest checks in a tight loop.")
    ] = _DEFAULTS.memcheck_pages,
    dirty: Annotated[
        str | None, typer.Option("--dirty", metavar="RATE", help="Memory rewritten, as 8mbit or 1mbps.")
    ] = None,
    disk_write: Annotated[
        str | None, typer.Option("--disk-write", metavar="RATE", help="Disk rewritten, as 8mbit or 1mbps.")
    ] = None,
    wait: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds to wait for its first answer; 0: do not wait.")
    ] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Boot a guest on a site and wait until it answers the lab's client."""
    spec = GuestSpec(
        name=name,
        image=image,
        memory_mib=parse_size(memory) // 2**20 if memory else guests.DEFAULT_MEMORY_MIB.get(image, 0),
        vcpus=vcpus,
        address=address,
        disk_size_bytes=parse_size(disk_size) if disk_size else None,
        disk_format=disk_format,
        memcheck_pages=memcheck,
        dirty_bytes_s=round(parse_rate(dirty)) if dirty else 0,
        disk_write_bytes_s=round(parse_rate(disk_write)) if disk_write else 0,
    )
    lab = Lab.load(lab_name)
    lab.site(site)  # a wrong name is refused before minutes are spent on an image
    ensure_image(spec.image, progress=_say)  # not part of the time it takes to boot
    start_s = time.monotonic()
    booted = guests.boot(lab, site, spec, progress=_say)
    if wait > 0:
        guests.wait_answering(lab, spec, deadline_s=wait)
    took_s = time.monotonic() - start_s
    if as_json:
        told = {**asdict(spec), "mac": spec.mac, "site": site, "image_key": booted.key}
        print_json({**told, "answered_after_s": took_s if wait > 0 else None})
    else:
        state = f"answers after {format_duration(took_s)}" if wait > 0 else "started"
        print(f"{name} on {site}: {state}  (http://{address}/, {spec.mac}, {booted.kind} {booted.key})")


@app.command("list")
@run
def list_guests(lab_name: LabOption = DEFAULT_NAME, as_json: JsonOption = False) -> None:
    """List the domains of all sites."""
    lab = Lab.load(lab_name)
    found = [status for site in lab.sites for status in guests.guests(lab, site.name)]
    if as_json:
        print_json(found)
    else:
        rows = [(g.name, g.site, "running" if g.running else "shut off", g.address) for g in found]
        print_table(("NAME", "SITE", "STATE", "ADDRESS"), rows)


@app.command()
@run
def destroy(
    name: Annotated[str, typer.Argument(help="Name of the domain.")],
    lab_name: LabOption = DEFAULT_NAME,
    site: SiteOption = "alice",
) -> None:
    """Stop a guest at once, forget it and remove its disk."""
    guests.destroy(Lab.load(lab_name), site, name)
    print(f"{name} is gone from {site}")
