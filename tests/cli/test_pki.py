"""``virtgrid pki``: from a request to a certificate in place, and bad words that change nothing."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from typer.testing import CliRunner

from virtgrid.cli import pki as command
from virtgrid.host import doctor
from virtgrid.migration.preflight import CheckVerdict
from virtgrid.wire.identity import Identity, Role
from virtgrid.wire.pki.places import Places
from virtgrid.wire.pki.signing import alternative_names, pem, subject
from virtgrid.wire.tls import Tls

Call = Callable[..., Result]


def call(*words: object) -> Result:
    return CliRunner().invoke(command.app, [str(word) for word in words])


def done(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: object, status: int = 3) -> str:
    """The message: a sentence, and at most a cause and a hint, indented."""
    result = call(*words)
    assert result.exit_code == status, result.output
    assert result.stderr.startswith("error: "), result.output
    assert len(result.stderr.splitlines()) <= 3
    assert "bug" not in result.output
    return result.stderr


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    done("init", "tests", "--authority", tmp_path / "ca")
    return tmp_path / "ca"


def enrol(authority: Path, here: Path, role: str, *words: str) -> Path:
    """Request, sign, install; returns what the authority gave."""
    done("request", role, "--directory", here, *words)
    csr, given = here / f"virtgrid/{role}.csr", here / f"{role}.pem"
    given.unlink(missing_ok=True)
    done("sign", csr, "--authority", authority, "--out", given, "--yes")
    done("install", given, "--directory", here)
    return given


def test_a_host_is_furnished_for_libvirt_qemu_and_the_grid(authority: Path, tmp_path: Path) -> None:
    here = tmp_path / "pki"
    enrol(authority, here, "host", "--site", "a", "--name", "n1", "--at", "n1.example", "--at", "10.0.0.2")
    for name in (
        "CA/cacert.pem", "libvirt/servercert.pem", "libvirt/clientcert.pem", "libvirt/private/serverkey.pem",
        "libvirt/private/clientkey.pem", "qemu/ca-cert.pem", "qemu/server-cert.pem", "qemu/server-key.pem",
        "qemu/client-cert.pem", "qemu/client-key.pem", "virtgrid/trust.pem",
    ):  # fmt: skip
        mode = stat.S_IMODE((here / name).stat().st_mode)
        assert mode == (0o600 if "key" in name else 0o644), name
    shown = json.loads(done("show", "--directory", here, "--json"))
    assert shown[0]["identity"] == "virtgrid://a/host/n1"
    assert shown[0]["hosts"] == ["n1.example", "10.0.0.2"]
    assert shown[0]["validity"] == "good"
    assert str(Tls(Places(here).files(Role.HOST)).identity) == "virtgrid://a/host/n1"


def test_libvirt_is_shown_no_authority_that_signs_users(authority: Path, tmp_path: Path) -> None:
    here = tmp_path / "pki"
    enrol(authority, here, "host", "--site", "a", "--at", "n1")
    enrol(authority, here, "user", "--site", "a", "--name", "kenji")
    libvirts = x509.load_pem_x509_certificates((here / "CA/cacert.pem").read_bytes())
    users = x509.load_pem_x509_certificate(Places(here).certificate(Role.USER).read_bytes())
    hosts = x509.load_pem_x509_certificate(Places(here).certificate(Role.HOST).read_bytes())
    assert [one.subject for one in libvirts] == [hosts.issuer]
    assert users.issuer != hosts.issuer


def test_the_key_never_leaves_its_host(authority: Path, tmp_path: Path) -> None:
    here = tmp_path / "pki"
    given = enrol(authority, here, "crm", "--site", "a", "--at", "crm.example")
    key = Places(here).key(Role.CRM).read_bytes()
    assert key.startswith(b"-----BEGIN PRIVATE KEY-----")
    for path, data in tree(authority).items():
        assert key not in data, path
    assert b"PRIVATE" not in given.read_bytes()


def test_renewal_keeps_who_and_where_and_takes_a_new_key(authority: Path, tmp_path: Path) -> None:
    here, places = tmp_path / "pki", Places(tmp_path / "pki")
    enrol(authority, here, "crm", "--site", "a", "--name", "crm", "--at", "crm.example", "--at", "10.1.0.1")
    before = places.key(Role.CRM).read_bytes()
    enrol(authority, here, "crm")
    assert places.key(Role.CRM).read_bytes() != before
    own = json.loads(done("show", "--directory", here, "--json"))[0]
    assert (own["identity"], own["hosts"]) == ("virtgrid://a/crm/crm", ["crm.example", "10.1.0.1"])
    assert not places.next_key(Role.CRM).exists()
    assert len(json.loads(done("list", "--authority", authority, "--json"))) == 2


def test_a_group_that_was_let_in_may_still_read_after_renewal(authority: Path, tmp_path: Path) -> None:
    here = tmp_path / "pki"
    enrol(authority, here, "host", "--site", "a", "--at", "n1")
    (here / "qemu/server-key.pem").chmod(0o640)
    enrol(authority, here, "host")
    assert stat.S_IMODE((here / "qemu/server-key.pem").stat().st_mode) == 0o640
    assert stat.S_IMODE((here / "libvirt/private/serverkey.pem").stat().st_mode) == 0o600


def test_what_is_revoked_is_listed_so_and_the_list_is_installed(authority: Path, tmp_path: Path) -> None:
    here = tmp_path / "pki"
    enrol(authority, here, "host", "--site", "a", "--name", "n1", "--at", "n1")
    assert "revoked: virtgrid://a/host/n1" in done("revoke", "virtgrid://a/host/n1", "--authority", authority)
    assert json.loads(done("list", "--authority", authority, "--json"))[0]["validity"] == "revoked"
    done("install", authority / "revoked.pem", "--directory", here)
    assert b"X509 CRL" in (here / "CA/cacrl.pem").read_bytes()
    first = (here / "virtgrid/revoked.pem").read_bytes()
    (tmp_path / "older.pem").write_bytes(first)
    enrol(authority, here, "host")
    done("revoke", "virtgrid://a/host/n1", "--authority", authority)
    done("install", authority / "revoked.pem", "--directory", here)
    newer = (here / "virtgrid/revoked.pem").read_bytes()
    assert newer != first
    # An older list that turns up again pardons nobody.
    done("install", tmp_path / "older.pem", "--directory", here)
    assert (here / "virtgrid/revoked.pem").read_bytes() == newer
    assert "no good certificate" in refused(
        "revoke", "virtgrid://a/host/n1", "--authority", authority, status=4
    )


def test_a_request_shows_what_it_asks_for(authority: Path, tmp_path: Path) -> None:
    said = done("request", "user", "--site", "a", "--name", "kenji", "--directory", tmp_path / "u")
    shown = done("show", tmp_path / "u/virtgrid/user.csr")
    assert "virtgrid://a/user/kenji" in shown
    key = next(line for line in said.splitlines() if line.startswith("key: "))
    assert key in shown


def test_a_coordinator_on_a_host_with_another_authoritys_libvirt_leaves_that_alone(
    authority: Path, tmp_path: Path
) -> None:
    here, other = tmp_path / "pki", tmp_path / "other"
    done("init", "libvirt's own", "--authority", other)
    enrol(other, here, "host", "--site", "a", "--at", "n1")
    (here / "virtgrid/trust.pem").unlink()
    before = {path: data for path, data in tree(here).items() if "virtgrid" not in path}
    enrol(authority, here, "crm", "--site", "a", "--at", "n1")
    done("revoke", "virtgrid://a/crm/" + _own_name(here), "--authority", authority)
    done("install", authority / "revoked.pem", "--directory", here)
    assert before.items() <= tree(here).items()
    assert not (here / "CA/cacrl.pem").exists()


def _own_name(here: Path) -> str:
    return str(json.loads(done("show", "--directory", here, "--json"))[0]["identity"]).rpartition("/")[2]


def test_authorities_that_were_added_by_hand_stay(authority: Path, tmp_path: Path) -> None:
    here, other = tmp_path / "pki", tmp_path / "other"
    done("init", "friends", "--authority", other)
    enrol(authority, here, "host", "--site", "a", "--at", "n1")
    for name in ("virtgrid/trust.pem", "CA/cacert.pem"):
        with (here / name).open("ab") as file:
            file.write((other / "hosts.cert.pem").read_bytes())
    before = [(here / name).read_bytes() for name in ("virtgrid/trust.pem", "CA/cacert.pem")]
    enrol(authority, here, "host")
    assert before == [(here / name).read_bytes() for name in ("virtgrid/trust.pem", "CA/cacert.pem")]


def test_a_strict_umask_keeps_nobody_from_reading_whom_to_trust(authority: Path, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        enrol(authority, tmp_path / "a/pki", "crm", "--site", "a", "--at", "n1")
    finally:
        os.umask(before)
    for name in ("a", "a/pki", "a/pki/virtgrid", "a/pki/virtgrid/trust.pem", "a/pki/virtgrid/crmcert.pem"):
        assert (tmp_path / name).stat().st_mode & 0o044 == 0o044, name
    assert stat.S_IMODE((tmp_path / "a/pki/virtgrid/private").stat().st_mode) == 0o700


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("request", "king", "--site", "a"), 2, "'king' is no role"),
        (("request", "pilot", "--site", "a"), 2, "'pilot' is no role"),
        (("request", "crm", "--site", "A b"), 3, "no name of a site"),
        (("request", "crm", "--site", "x" * 64), 3, "no name of a site"),
        (("request", "crm", "--site", "a", "--name", "x/y"), 3, "no name of a crm"),
        (("request", "crm", "--site", "a", "--at", "*.example"), 3, "no host's name or address"),
        (("request", "crm", "--site", "a", "--at", "10.0.0.256/8"), 3, "no host's name or address"),
        (("request", "crm", "--site", "a", "--at", ""), 3, "no host's name or address"),
        (("request", "crm", "--site", "a", *(["--at", "h"] * 33)), 3, "are too many"),
        (("request", "user", "--site", "a", "--name", "u", "--at", "h"), 3, "is called by nobody"),
        (("request", "crm", "--name", "x"), 2, "--name goes with --site"),
        (("request", "crm"), 4, "there is no certificate of a crm"),
        (("install", "/nowhere.pem"), 3, "cannot be read"),
        (("show",), 4, "there are no certificates"),
    ],
)
def test_bad_words_are_refused_and_nothing_is_written(
    words: tuple[str, ...], status: int, said: str, tmp_path: Path
) -> None:
    assert said in refused(*words, "--directory", tmp_path / "pki", status=status)
    assert not (tmp_path / "pki").exists()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("init", ""), 2, "no name for an authority"),
        (("init", "x\ny"), 2, "no name for an authority"),
        (("sign", "/nowhere.csr"), 4, "there is no authority"),
        (("list",), 4, "there is no authority"),
        (("revoke", "virtgrid://a/crm/x"), 4, "there is no authority"),
    ],
)
def test_where_there_is_no_authority(words: tuple[str, ...], status: int, said: str, tmp_path: Path) -> None:
    assert said in refused(*words, "--authority", tmp_path / "ca", status=status)
    assert not (tmp_path / "ca").exists()


def test_an_authority_is_never_overwritten(authority: Path) -> None:
    before = tree(authority)
    assert "there is an authority" in refused("init", "again", "--authority", authority)
    assert tree(authority) == before
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in authority.glob("*.key.pem"))
    assert stat.S_IMODE(authority.stat().st_mode) == 0o700


def test_a_key_that_waits_for_its_certificate_is_not_overwritten(authority: Path, tmp_path: Path) -> None:
    here, words = tmp_path / "pki", ("request", "crm", "--site", "a", "--at", "h", "--directory")
    done(*words, here)
    before = tree(here)
    assert "a request is under way already" in refused(*words, here)
    assert tree(here) == before
    done(*words, here, "--force")
    assert tree(here) != before


def test_a_request_is_signed_only_on_somebodys_word(authority: Path, tmp_path: Path) -> None:
    done("request", "grc", "--site", "a", "--at", "h", "--directory", tmp_path / "pki")
    before = tree(authority)
    csr = tmp_path / "pki/virtgrid/grc.csr"
    assert "nobody is here to be asked" in refused("sign", csr, "--authority", authority, status=2)
    assert tree(authority) == before
    done("sign", csr, "--authority", authority, "--yes")
    assert "is there already" in refused("sign", csr, "--authority", authority, "--yes")


def _strange_requests() -> dict[str, bytes]:
    who = Identity(role=Role.CRM, site="a", name="x")

    def csr(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, names: x509.GeneralNames) -> bytes:
        builder = x509.CertificateSigningRequestBuilder().subject_name(subject(who))
        return pem(builder.add_extension(names, critical=False).sign(key, hashes.SHA256()))

    good = ec.generate_private_key(ec.SECP256R1())
    uri = x509.UniformResourceIdentifier
    plain = csr(good, alternative_names(who, ["h"]))
    return {
        "no request": b"what?",
        "two identities": csr(
            good,
            x509.SubjectAlternativeName(
                [uri("virtgrid://a/crm/x"), uri("virtgrid://a/grc/y"), x509.DNSName("h")]
            ),
        ),
        "nobody": csr(good, x509.SubjectAlternativeName([x509.DNSName("h")])),
        "a pilot": csr(good, x509.SubjectAlternativeName([uri("virtgrid://a/pilot/n1"), x509.DNSName("h")])),
        "a wildcard": csr(good, x509.SubjectAlternativeName([uri(str(who)), x509.DNSName("*.h")])),
        "another kind of key": csr(
            rsa.generate_private_key(65537, 2048),
            alternative_names(who, ["h"]),
        ),
        "a torn one": plain[: len(plain) // 2],
        "too large": b"x" * (2 << 20),
    }


@pytest.mark.parametrize("kind", sorted(_strange_requests()))
def test_a_strange_request_is_not_signed(kind: str, authority: Path, tmp_path: Path) -> None:
    file = tmp_path / "strange.csr"
    file.write_bytes(_strange_requests()[kind])
    before = tree(authority)
    refused("sign", file, "--authority", authority, "--yes")
    assert tree(authority) == before


def test_what_does_not_belong_here_is_not_installed(authority: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    enrol(authority, here, "crm", "--site", "a", "--at", "h")
    given = enrol(authority, there, "crm", "--site", "a", "--at", "h")
    before = tree(here)
    assert "no key below" in refused("install", given, "--directory", here)
    other = tmp_path / "other"
    done("init", "other", "--authority", other)
    done("request", "crm", "--directory", here)
    foreign = tmp_path / "foreign.pem"
    done("sign", here / "virtgrid/crm.csr", "--authority", other, "--out", foreign, "--yes")
    waiting = tree(here)
    assert "trusts another authority" in refused("install", foreign, "--directory", here)
    assert tree(here) == waiting
    assert before.items() <= waiting.items()
    done("install", foreign, "--directory", here, "--force")


def test_a_list_that_nobody_trusted_has_signed_is_not_installed(authority: Path, tmp_path: Path) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    enrol(authority, here, "crm", "--site", "a", "--at", "h")
    done("init", "other", "--authority", other)
    enrol(other, tmp_path / "there", "crm", "--site", "a", "--name", "x", "--at", "h")
    done("revoke", "virtgrid://a/crm/x", "--authority", other)
    before = tree(here)
    said = refused("install", other / "revoked.pem", "--directory", here)
    assert "nobody trusted here has signed" in said
    assert tree(here) == before


def test_doctor_tells_of_certificates_about_to_end(
    authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "pki"
    enrol(authority, here, "host", "--site", "a", "--at", "n1")
    enrol(authority, here, "crm", "--site", "a", "--at", "h")
    monkeypatch.setattr(doctor, "_PKI", here)
    monkeypatch.setattr(
        doctor, "_CERTIFICATES", ((here / "CA/cacert.pem", "certificate authority"),
                                  (here / "libvirt/servercert.pem", "server certificate"))
    )  # fmt: skip

    def after(days: float) -> list[CheckVerdict]:
        class Then(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:
                return datetime.now(UTC) + timedelta(days=days)

        monkeypatch.setattr(doctor, "datetime", Then)
        return [check.verdict for check in doctor._certificates()]

    assert set(after(1)) == {CheckVerdict.PASS}
    assert after(340).count(CheckVerdict.WARN) == 2
    assert after(366).count(CheckVerdict.FAIL) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="root becomes somebody else here")
@pytest.mark.parametrize(
    "words",
    [
        ("show", "--directory"), ("request", "user", "--site", "a", "--directory"), ("list", "--authority"),
        ("init", "x", "--authority"), ("revoke", "x", "--authority"),
    ],
)  # fmt: skip
def test_what_one_may_not_look_at_is_told_so(words: tuple[str, ...], tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    os.seteuid(65534)
    try:
        said = refused(*words, private / "pki")
    finally:
        os.seteuid(0)
    assert "Permission denied" in said
