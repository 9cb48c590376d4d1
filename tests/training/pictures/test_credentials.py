"""Pictures signed with a certificate made here, and verified by the library itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.common.errors import ConfigError, DataError
from tests.training.pictures.certificates import write_chain
from tests.training.tiny import tiny_cascade
from training.commands import sample
from training.config.commands import SampleCommand
from training.config.experiment import BundleConfig, ClusterConfig, SamplingConfig
from training.pictures.credentials import SOURCE, Credentials, check_credentials


def test_samples_are_signed_and_a_change_is_seen(tmp_path: Path) -> None:
    tiny_cascade().save(str(tmp_path / "bundle"))
    certificate, key = write_chain(tmp_path)

    def draw(**sampling: str) -> dict:
        config = SampleCommand(
            bundle=BundleConfig(dir=str(tmp_path / "bundle")), cluster=ClusterConfig(gpus=False), steps=1,
            prompts=["a red circle"], output=str(tmp_path / "out"), sampling=SamplingConfig(**sampling),
        )  # fmt: skip
        return sample.main(config)

    plain = draw()
    file = tmp_path / "out" / plain["images"][0]["file"]
    with pytest.raises(DataError, match="it has no Content Credentials"):
        check_credentials(file)
    before = Image.open(file).convert("RGB").tobytes()
    assert draw(certificate=certificate, key=key)["drawn"] == 1, "unsigned ones are drawn again"
    assert draw(certificate=certificate, key=key)["kept"] == 1
    found = check_credentials(file)
    assert found == {"state": "Valid", "problems": ["signingCredential.untrusted"], "source": SOURCE}
    image = Image.open(file)
    assert image.info["prompt"] == "a red circle" and image.convert("RGB").tobytes() == before
    data = file.read_bytes()
    for part in (b"a red circle", b"IDAT"):
        at = data.index(part) + len(part) - 1
        (tmp_path / "changed.png").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        changed = check_credentials(tmp_path / "changed.png")
        assert changed["state"] == "Invalid" and "assertion.dataHash.mismatch" in changed["problems"], part


def test_what_does_not_sign_is_refused(tmp_path: Path) -> None:
    certificate, key = write_chain(tmp_path)
    with pytest.raises(ConfigError, match=r"sampling\.certificate=.*root\.pem: it does not sign"):
        Credentials(str(tmp_path / "root.pem"), key)
    with pytest.raises(ConfigError, match=r"sampling\.key=.*chain\.pem: not an unencrypted private key in PEM"):
        Credentials(certificate, certificate)
    with pytest.raises(ConfigError, match=r"sampling\.key=nowhere: cannot be read"):
        Credentials(certificate, "nowhere")
    with pytest.raises(ConfigError, match="signing needs both the certificate chain and its private key"):
        SamplingConfig(key=key)
