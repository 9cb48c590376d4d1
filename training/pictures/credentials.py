"""Content Credentials (C2PA): a signature in a PNG that states that a model drew it, and reveals any later change.

Needs `c2pa-python`, the Content Authenticity Initiative's own library, and a certificate whose extended key usage is
e-mail protection or document signing, with its chain.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError, DataError

SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for pictures that a trained model drew."""
NO_THUMBNAIL = '{"builder": {"thumbnail": {"enabled": false}}}'
"""Disables thumbnails, which would make a small picture's file many times larger."""
ALGORITHMS = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


class Credentials:
    """A certificate and its key, to sign pictures with.

    Args:
        certificate: PEM file of the certificate chain, the signer's certificate first.
        key: PEM file of the signer's private key.

    Raises:
        ConfigError: the package is not installed, a file cannot be read, or signing with them fails.
    """

    def __init__(self, certificate: str, key: str) -> None:
        try:
            import c2pa
        except ModuleNotFoundError as error:
            raise ConfigError("sampling.certificate: it needs `pip install cascade-t2i[c2pa]`") from error
        chain, private = _read("sampling.certificate", certificate), _read("sampling.key", key)
        self.fingerprint = hashlib.sha256(chain).hexdigest()[:16]
        c2pa.load_settings(NO_THUMBNAIL)
        try:
            info = c2pa.C2paSignerInfo(
                alg=_algorithm(private, key).encode(), sign_cert=chain, private_key=private, ta_url=None
            )
            self._signer = c2pa.Signer.from_info(info)
            self.sign(_probe())
        except c2pa.C2paError as error:
            raise ConfigError(
                f"sampling.certificate={certificate}: it does not sign with sampling.key={key} ({error}); give a chain "
                "for e-mail protection or document signing, the signer's certificate first, and its own key"
            ) from error

    def sign(self, png: bytes) -> bytes:
        """Return the PNG file with a signed manifest added; its pixels and texts are unchanged."""
        import c2pa

        action = {"action": "c2pa.created", "digitalSourceType": SOURCE}
        manifest = {
            "claim_generator_info": [{"name": "cascade"}],
            "format": "image/png",
            "assertions": [{"label": "c2pa.actions", "data": {"actions": [action]}}],
        }
        signed = io.BytesIO()
        with c2pa.Builder(manifest) as builder:
            builder.sign(self._signer, "image/png", io.BytesIO(png), signed)
        return signed.getvalue()


def check_credentials(file: str | Path) -> dict[str, Any]:
    """Read and verify the credentials of a picture.

    Returns:
        `state` (`Valid`, `Trusted`, or `Invalid` if anything was changed after signing), `problems` (status codes) and
        `source` (SOURCE for a model's picture).

    Raises:
        DataError: the file has no credentials.
    """
    import c2pa

    try:
        with c2pa.Reader(str(file)) as reader:
            found = json.loads(reader.json())
    except c2pa.C2paError as error:
        raise DataError(f"{file}: it has no Content Credentials ({error})") from error
    manifest = found["manifests"][found["active_manifest"]]
    actions = [a for entry in manifest["assertions"] for a in entry["data"].get("actions", [])]
    return {
        "state": found["validation_state"],
        "problems": [status["code"] for status in found.get("validation_status", [])],
        "source": next((action["digitalSourceType"] for action in actions if "digitalSourceType" in action), None),
    }


def _read(key: str, file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}={file}: cannot be read ({error.strerror})") from error


def _algorithm(private: bytes, file: str) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(private, password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"sampling.key={file}: not an unencrypted private key in PEM format ({error})") from error
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    return ALGORITHMS.get(key.curve.name, "es256") if isinstance(key, ec.EllipticCurvePrivateKey) else "ps256"


def _probe() -> bytes:
    """Return a PNG of one pixel."""
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (1, 1)).save(data, "PNG")
    return data.getvalue()
