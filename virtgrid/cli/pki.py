"""``virtgrid pki``: certificates: asked for on a host, signed by an authority, put where they are used."""

from __future__ import annotations

import getpass
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from cryptography import x509

from virtgrid.cli.output import print_json, print_table, run
from virtgrid.core.errors import NotFoundError, RefusedError, UsageError
from virtgrid.report.model import clean
from virtgrid.wire.certificates import exists, read_certificates, read_pem
from virtgrid.wire.identity import Identity, Role
from virtgrid.wire.pki import bundle, places, request
from virtgrid.wire.pki.authority import Authority
from virtgrid.wire.pki.files import put
from virtgrid.wire.pki.places import Places
from virtgrid.wire.pki.signing import SERVING, fingerprint
from virtgrid.wire.pki.standing import Standing, Validity, standing

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Certificates: who is who in the grid, and for libvirt's TLS.",
)

AUTHORITY: Final = Path("/var/lib/virtgrid/authority")
Where = Annotated[
    Path | None, typer.Option("--directory", metavar="DIR", help="Default: /etc/pki; of users ~/.pki.")
]
Signing = Annotated[Path, typer.Option("--authority", metavar="DIR", help="The authority's directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_COLUMNS: Final = ("WHO", "CALLED AT", "UNTIL", "DAYS", "STATE", "SERIAL")


def _now() -> datetime:
    return datetime.now(UTC)


@app.command()
@run
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the grid, for people.")],
    authority: Signing = AUTHORITY,
) -> None:
    """Make the authority that signs the grid's certificates; once, on a host few may enter."""
    if not 0 < len(name) <= 60 or not name.isprintable():
        raise UsageError(f"'{clean(name, 80)}' is no name for an authority", hint="at most 60 characters")
    made = Authority.create(authority, name, now=_now())
    print(f"the authority is in {authority}; whoever reads its keys can be anybody of the grid")
    _print_fingerprints(made.certificates)


@app.command("request")
@run
def ask(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="host, crm, nrm, grc or user.")],
    site: Annotated[
        str | None, typer.Option(metavar="SITE", help="Whose; without it, the one in use is renewed.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: this host's; a user's account.")
    ] = None,
    at: Annotated[
        list[str] | None, typer.Option("--at", metavar="HOST", help="Name or address others call. Repeat.")
    ] = None,
    directory: Where = None,
    force: Annotated[bool, typer.Option("--force", help="In place of a request under way.")] = False,
) -> None:
    """Make a key here, and a request for an authority to sign. The key never leaves this host."""
    chosen, here = places.role_of(role), Places(directory or places.default())
    if site is None:
        if name is not None:
            raise UsageError("--name goes with --site", hint="without both, what is in use is renewed")
        identity, hosts = here.ask_again(chosen)
        hosts = at or hosts
    else:
        identity = Identity(role=chosen, site=site, name=name or _own_name(chosen))
        hosts = at or (_own_hosts() if chosen in SERVING else [])
    file = here.ask(identity, hosts, again=force)
    _print_request(request.read(file))
    print(f"next: virtgrid pki sign {file} at the authority; then virtgrid pki install here what that wrote")


def _own_name(role: Role) -> str:
    return getpass.getuser() if role is Role.USER else socket.gethostname().partition(".")[0].lower()


def _own_hosts() -> list[str]:
    return sorted({socket.gethostname().lower(), socket.getfqdn().lower()})


@app.command()
@run
def sign(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The request.")],
    authority: Signing = AUTHORITY,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: beside the request, .pem for .csr.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Sign a request: say that this key is who it says it is."""
    signer = Authority.load(authority)
    asked = request.read(file)
    target = out or file.with_suffix(".pem")
    if exists(target):
        raise RefusedError(f"{target} is there already", hint="--out names another, or remove it")
    _print_request(asked)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody is here to be asked whether this is right", hint="--yes says it is")
        if not typer.confirm("the key is the one that virtgrid pki request printed there?"):
            raise RefusedError("not signed")
    given = signer.sign(asked, now=_now())
    put(target, given.pem())
    assert given.own is not None
    print(f"{target} is good until {given.own.not_valid_after_utc:%Y-%m-%d}; virtgrid pki install it there")


@app.command()
@run
def install(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What the authority gave: .pem.")],
    directory: Where = None,
    force: Annotated[bool, typer.Option("--force", help="Trust another authority than before.")] = False,
) -> None:
    """Put a certificate, or the list of revoked ones, in place. Services take it up by themselves."""
    here = Places(directory or places.default())
    found = bundle.read(file)
    for path in here.install(found, now=_now(), force=force):
        print(path)
    if found.own is not None:
        _print_fingerprints(found.authorities)
    if found.own is not None and Role.HOST in here.roles():
        print("libvirtd takes it up with: virt-admin server-update-tls libvirtd")


@app.command()
@run
def show(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A request, or what the authority gave.")
    ] = None,
    directory: Where = None,
    as_json: Json = False,
) -> None:
    """Show the certificates of this host or user, or what is in a file, and how long they are good."""
    if file is not None and b"CERTIFICATE REQUEST" in read_pem(file):
        asked = request.read(file)
        if as_json:
            print_json({"who": str(asked.identity), "hosts": asked.hosts, "key": fingerprint(asked.key)})
        else:
            _print_request(asked)
        return
    now = _now()
    if file is not None:
        found = bundle.read(file)
        certificates = [*([found.own] if found.own else []), *found.authorities]
    else:
        certificates = _in_use(Places(directory or places.default()))
    _print_standings([standing(one, now=now) for one in certificates], as_json)


def _in_use(here: Places) -> list[x509.Certificate]:
    files = [here.certificate(role) for role in here.roles()]
    if exists(here.trust):
        files.append(here.trust)
    if not files:
        raise NotFoundError(f"there are no certificates below {here.directory}", hint="virtgrid pki request")
    return [one for path in files for one in read_certificates(path)]


@app.command("list")
@run
def list_(authority: Signing = AUTHORITY, as_json: Json = False) -> None:
    """List what the authority has signed, and whom to remind."""
    _print_standings(Authority.load(authority).standings(now=_now()), as_json)


@app.command()
@run
def revoke(
    who: Annotated[
        str, typer.Argument(metavar="WHO", help="virtgrid://SITE/ROLE/NAME, or a serial number of list.")
    ],
    authority: Signing = AUTHORITY,
) -> None:
    """Take back what was signed; for good. Hosts must be given the new list."""
    signer = Authority.load(authority)
    for one in signer.revoke(who, now=_now()):
        print(f"revoked: {one.identity}, serial {one.serial}")
    print(f"next: virtgrid pki install {signer.revoked_file} on every host and of every coordinator")


# -- how it is told ------------------------------------------------------------------------------


def _print_standings(found: list[Standing], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    rows = [
        (one.identity, ", ".join(one.hosts), f"{one.until:%Y-%m-%d}", one.days_left, one.validity, one.serial)
        for one in found
    ]
    print_table(_COLUMNS, rows, shrink="CALLED AT")
    late = [one.identity for one in found if one.validity in (Validity.ENDS_SOON, Validity.ENDED)]
    if late:
        print(f"renew with virtgrid pki request ROLE: {', '.join(late)}", file=sys.stderr)


def _print_request(asked: request.Request) -> None:
    print(f"{asked.identity}" + (f", called at {', '.join(asked.hosts)}" if asked.hosts else ""))
    print(f"key: {fingerprint(asked.key)}")


def _print_fingerprints(certificates: tuple[x509.Certificate, ...]) -> None:
    for one in certificates:
        key: Any = one.public_key()
        print(f"authority {clean(one.subject.rfc4514_string())}: {fingerprint(key)}")
