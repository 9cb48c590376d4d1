"""Creates a certificate authority, and a certificate for e-mail protection under it."""

from __future__ import annotations

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM


def name(common: str) -> x509.Name:
    organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test")
    return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, common)])


def usage(**wanted: bool) -> x509.KeyUsage:
    keys = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
            "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    return x509.KeyUsage(**{key: wanted.get(key, False) for key in keys})


def write_chain(folder: Path) -> tuple[str, str]:
    """Paths of the chain and of the signer's key."""
    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)

    def begin(subject: str, public: ec.EllipticCurvePublicKey, is_ca: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name("root"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), critical=False)
        )

    above = begin("root", root.public_key(), True)
    above = above.add_extension(usage(key_cert_sign=True, crl_sign=True), critical=True)
    below = begin("signer", own.public_key(), False).add_extension(usage(digital_signature=True), critical=True)
    below = below.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=True)
    chain = [made.sign(root, hashes.SHA256()).public_bytes(PEM) for made in (below, above)]
    (folder / "chain.pem").write_bytes(b"".join(chain))
    (folder / "root.pem").write_bytes(chain[1])
    private = own.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(private)
    return str(folder / "chain.pem"), str(folder / "key.pem")
