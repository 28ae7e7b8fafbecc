"""Making certificates: an authority's own, those it signs, and its list of revoked ones. Pure but for the
keys' randomness.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from virtgrid.core.errors import RefusedError
from virtgrid.wire.identity import Identity, Role

LIFETIME: Final = timedelta(days=365)
AUTHORITY_LIFETIME: Final = timedelta(days=3650)
BACKDATED: Final = timedelta(minutes=5)
"""A fresh certificate must be good on a host whose clock is two minutes behind."""
FOR_EVER: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""RFC 5280, 4.1.2.5: no end that is known."""
NAMES_LIMIT: Final = 32
_HOST_NAME: Final = re.compile(
    r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*"
)
SERVING: Final = frozenset({Role.GRC, Role.CRM, Role.NRM, Role.HOST})
"""Roles that are called, not only call."""

PrivateKey = ec.EllipticCurvePrivateKey | Ed25519PrivateKey
PublicKey = ec.EllipticCurvePublicKey | Ed25519PublicKey


def new_key() -> ec.EllipticCurvePrivateKey:
    """A key for TLS: P-256, which every version of GnuTLS and OpenSSL in use takes."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    """PKCS #8, not encrypted: a service has nobody to ask for a password."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def pem(what: x509.Certificate | x509.CertificateSigningRequest | x509.CertificateRevocationList) -> bytes:
    return what.public_bytes(serialization.Encoding.PEM)


def fingerprint(key: PublicKey) -> str:
    """Of a public key, to be compared by people: SHA-256, in groups of four."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    text = digest.finalize().hex()[:32]
    return " ".join(text[at : at + 4] for at in range(0, len(text), 4))


def general_name(text: str) -> x509.GeneralName:
    """A host's name or address. Errors: RefusedError."""
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    if not _HOST_NAME.fullmatch(text):
        raise RefusedError(f"'{text[:200]}' is no host's name or address", hint="small letters; no wildcards")
    return x509.DNSName(text)


def alternative_names(identity: Identity | None, hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    """Errors: RefusedError."""
    if len(hosts) > NAMES_LIMIT:
        raise RefusedError(
            f"{len(hosts)} names and addresses are too many for one certificate", hint="32 fit"
        )
    names = [general_name(host) for host in hosts]
    return x509.SubjectAlternativeName(
        [*([x509.UniformResourceIdentifier(str(identity))] if identity else []), *names]
    )


def subject(identity: Identity) -> x509.Name:
    """For people, and for libvirt's ``tls_allowed_dn_list``; we ourselves read the URI."""
    return x509.Name([
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, identity.site),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, identity.role),
        x509.NameAttribute(NameOID.COMMON_NAME, identity.name),
    ])  # fmt: skip


def authority_name(name: str, unit: str) -> x509.Name:
    """unit: what it signs for; tells the two authorities of one grid apart."""
    return x509.Name([
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
        x509.NameAttribute(NameOID.COMMON_NAME, name[:64]),
    ])  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """An authority's key and its own certificate."""

    key: PrivateKey
    certificate: x509.Certificate

    @staticmethod
    def create(
        who: x509.Name, *, now: datetime, key: PrivateKey | None = None, until: datetime | None = None
    ) -> Signer:
        """A new authority, or with ``key`` one that signs with it."""
        key = key or new_key()
        builder = _builder(who, who, key.public_key(), now - BACKDATED, until or now + AUTHORITY_LIFETIME)
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, _hash(key))
        )
        return Signer(key=key, certificate=certificate)

    def certify(
        self,
        key: PublicKey,
        *,
        name: x509.Name,
        names: x509.SubjectAlternativeName,
        serves: bool,
        now: datetime,
        until: datetime,
    ) -> x509.Certificate:
        """A certificate for calling others, and if it ``serves`` for being called. It never outlives us."""
        purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if serves:
            purposes.append(ExtendedKeyUsageOID.SERVER_AUTH)
        until = min(until, self.certificate.not_valid_after_utc)
        return (
            _builder(name, self.certificate.subject, key, now - BACKDATED, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
            .sign(self.key, _hash(self.key))
        )

    def identify(
        self, key: PublicKey, identity: Identity, hosts: Sequence[str], *, now: datetime, until: datetime
    ) -> x509.Certificate:
        """A certificate for somebody of the grid. Errors: RefusedError (names)."""
        return self.certify(
            key,
            name=subject(identity),
            names=alternative_names(identity, hosts),
            serves=identity.role in SERVING,
            now=now,
            until=until,
        )

    def revoke(
        self, revoked: Mapping[int, datetime], *, number: int, now: datetime
    ) -> x509.CertificateRevocationList:
        """The list of revoked certificates: serial number -> when.

        It is good as long as we are: who has no newer one must not be cut off from everybody.
        """
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - BACKDATED)
            .next_update(self.certificate.not_valid_after_utc)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False
            )
        )
        for serial, when in sorted(revoked.items()):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, _hash(self.key))


def _builder(
    name: x509.Name, issuer: x509.Name, key: PublicKey, since: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(since)
        .not_valid_after(until)
    )


def _hash(key: PrivateKey) -> hashes.SHA256 | None:
    return None if isinstance(key, Ed25519PrivateKey) else hashes.SHA256()


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        # GnuTLS, and so libvirt, asks for it whatever the key.
        key_encipherment=not signs,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def host_names(certificate: x509.Certificate | x509.CertificateSigningRequest) -> list[str]:
    """The host names and addresses it stands for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]
