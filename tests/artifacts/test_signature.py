"""Tests of lissom.artifacts.signature: who made an artifact, checked by a key."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lissom
from lissom.artifacts.directory import read_directory, sign_directory
from lissom.artifacts.manifest import NAME, Content, read_manifest
from lissom.artifacts.signature import SIGNATURE
from lissom.cli.main import app
from lissom.errors import ArtifactError, InputError, UnsupportedError
from tests.artifacts.test_directory import rewrite
from tests.frontends.capture.test_kv_cache import llama
from tests.support.saving import compiled

pytest.importorskip("cryptography", reason="needs cryptography")


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key, as openssl writes them."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A private key, its public one, and the public one of somebody else."""
    folder = tmp_path_factory.mktemp("keys")
    return *write_keys(folder, "mine"), write_keys(folder, "other")[1]


@pytest.fixture(scope="module")
def original(tmp_path_factory, keys):
    path = tmp_path_factory.mktemp("signed") / "artifact"
    compiled("feed_forward").save(path)
    sign_directory(path, keys[0])
    return path


@pytest.fixture
def signed(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "artifact"))


def refusal(path: Path, *keys: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        lissom.load(path, trusted_keys=keys)
    return str(caught.value).replace(str(path), "DIR")


def test_signed_artifact_loads_with_key_of_who_signed_it(signed, keys):
    _, public, other = keys
    for trusted in ([public], [other, public], [str(public)]):
        assert lissom.load(signed, trusted_keys=trusted).backend == "eager"
    # Whom a signature does not matter is not kept from loading by it.
    assert lissom.load(signed).backend == "eager"
    assert (signed / SIGNATURE).stat().st_size == 64


def test_an_unsigned_artifact_is_refused_where_keys_are_given(signed, keys):
    (signed / SIGNATURE).unlink()
    assert refusal(signed, keys[1]) == "'DIR' is not signed, and trusted keys were given; sign it with `lissom sign`"
    assert refusal(signed) == "'DIR' is not signed, and trusted keys were given; sign it with `lissom sign`"


def test_another_s_signature_is_refused(signed, keys):
    assert refusal(signed, keys[2]) == (
        f"'DIR' is not signed by a trusted key ('{keys[2]}'), or its manifest was changed after it was signed; "
        f"do not use it, or trust the key of whoever signed it"
    )
    # No key trusts nobody.
    assert refusal(signed).startswith("'DIR' is not signed by a trusted key (no key), ")


def test_every_changed_byte_is_refused(signed, keys):
    for path in sorted(signed.iterdir()):
        whole = path.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert refusal(signed, keys[1])
        for other in (b"", whole[:-1], whole + b"x"):
            path.write_bytes(other)
            assert refusal(signed, keys[1])
        path.write_bytes(whole)
    assert lissom.load(signed, trusted_keys=[keys[1]]).backend == "eager"


def test_what_is_sealed_anew_is_refused(signed, keys):
    """Whoever can write an artifact can write its hashes, but not the signature."""
    path = signed / "weights.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    rewrite(signed, files={**read_manifest(signed / NAME).files, path.name: Content.of(path)})
    assert lissom.load(signed).backend == "eager"
    assert refusal(signed, keys[1]).startswith("'DIR' is not signed by a trusted key (")


def test_a_file_beside_those_that_are_signed_is_refused(signed, keys):
    (signed / "more.bin").write_bytes(b"")
    assert refusal(signed, keys[1]) == "'DIR' holds 'more.bin', which its manifest does not name; take it out, or save again"


def test_a_linked_signature_is_refused(signed, keys):
    (signed / SIGNATURE).rename(signed.parent / "elsewhere")
    (signed / SIGNATURE).symlink_to(signed.parent / "elsewhere")
    assert refusal(signed, keys[1]).startswith(f"'DIR/{SIGNATURE}' is a symbolic link; ")


@pytest.mark.parametrize("content", [b"", b"x" * 63, b"x" * 65])
def test_a_signature_of_another_length_is_told(signed, keys, content):
    (signed / SIGNATURE).write_bytes(content)
    assert refusal(signed, keys[1]) == (
        f"'DIR/{SIGNATURE}' is not a signature of 64 bytes; sign the artifact again with `lissom sign`"
    )


def test_what_is_saved_again_is_not_signed_any_more(signed, keys):
    compiled("feed_forward").save(signed)
    assert not (signed / SIGNATURE).exists()
    sign_directory(signed, keys[0])
    assert lissom.load(signed, trusted_keys=[keys[1]]).backend == "eager"


def test_a_damaged_artifact_is_not_signed(signed, keys):
    path = signed / "steps.json"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match=r"steps\.json' was changed after it was written"):
        sign_directory(signed, keys[0])


def test_files_that_are_no_keys_are_told(signed, keys, tmp_path):
    private, public, _ = keys
    (tmp_path / "text").write_text("no key")
    openssl = shutil.which("openssl")
    said = {
        tmp_path / "nowhere": "cannot be read: No such file or directory; give the path of a PEM file",
        tmp_path / "text": "; give the file that `openssl pkey` wrote",
        private: "is not a PEM file of a public key",
    }
    if openssl is not None:
        rsa, encrypted = tmp_path / "rsa.pem", tmp_path / "encrypted.pem"
        for arguments in (
            ["genpkey", "-algorithm", "rsa", "-out", tmp_path / "rsa.key"],
            ["pkey", "-in", tmp_path / "rsa.key", "-pubout", "-out", rsa],
            ["pkey", "-in", private, "-aes256", "-passout", "pass:x", "-out", encrypted],
        ):
            subprocess.run([openssl, *map(str, arguments)], check=True, capture_output=True)
        said[rsa] = "holds a key of another algorithm than Ed25519; make one: openssl genpkey -algorithm ed25519 -out KEY"
        with pytest.raises(ArtifactError, match=r"encrypted\.pem' has a passphrase; write it without: openssl pkey"):
            sign_directory(signed, encrypted)
    for path, sentence in said.items():
        assert sentence in refusal(signed, path)
    with pytest.raises(ArtifactError, match="is not a PEM file of a private key"):
        sign_directory(signed, public)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_openssl_signs_and_checks_the_same(signed, keys):
    private, public, _ = keys
    files = ["-in", str(signed / NAME)]
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-rawin", "-inkey", str(public), *files]
    subprocess.run([*check, "-sigfile", str(signed / SIGNATURE)], check=True, capture_output=True)
    (signed / SIGNATURE).unlink()
    sign = ["openssl", "pkeyutl", "-sign", "-rawin", "-inkey", str(private), *files]
    subprocess.run([*sign, "-out", str(signed / SIGNATURE)], check=True, capture_output=True)
    assert read_directory(signed, trusted_keys=[public]).backend == "eager"


def test_the_commands_sign_and_verify(signed, keys):
    private, public, other = keys
    (signed / SIGNATURE).unlink()
    runner = CliRunner()
    assert isinstance(runner.invoke(app, ["verify", str(signed), "--key", str(public)]).exception, ArtifactError)
    assert runner.invoke(app, ["sign", str(signed), "--key", str(private)]).stdout == f"signed {signed}\n"
    shown = runner.invoke(app, ["verify", str(signed), "--key", str(other), "--key", str(public)]).stdout
    assert shown == f"{signed} is whole, and signed by a trusted key\n"
    assert isinstance(runner.invoke(app, ["verify", str(signed), "--key", str(other)]).exception, ArtifactError)
    assert runner.invoke(app, ["verify", str(signed)]).exit_code == 2


def test_without_the_package_it_says_what_to_install(signed, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert lissom.load(signed).backend == "eager"
    with pytest.raises(UnsupportedError, match=r"signatures need the package cryptography: pip install 'lissom\[sign\]'"):
        lissom.load(signed, trusted_keys=[keys[1]])


def test_trusted_keys_are_a_path_or_several(signed, keys):
    _, public, other = keys
    for trusted in (public, str(public), (public,), {str(public)}, iter([other, public])):
        assert lissom.load(signed, trusted_keys=trusted).backend == "eager"
    for trusted in (3, False, [3], bytes(public), [bytes(public)]):
        with pytest.raises(InputError, match=r"^trusted_keys= is .*; give the path of a public key, or a list of paths$"):
            lissom.load(signed, trusted_keys=trusted)


def test_a_decoder_takes_a_path_of_a_key(tmp_path, keys):
    private, public, other = keys
    lissom.compile_generation(llama(), max_length=8, checks="off").save(tmp_path / "decoder")
    with pytest.raises(ArtifactError, match="is not signed, and trusted keys were given"):
        lissom.load_generation(tmp_path / "decoder", trusted_keys=public)
    sign_directory(tmp_path / "decoder", private)
    assert lissom.load_generation(tmp_path / "decoder", trusted_keys=public).max_length == 8
    with pytest.raises(ArtifactError, match="is not signed by a trusted key"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", trusted_keys=other)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", trusted_keys=str(public)).max_length == 8


def test_commands_load_what_a_trusted_key_signed(signed, keys, tmp_path):
    _, public, other = keys
    np.savez(tmp_path / "data.npz", x=np.ones((2, 5, 8), np.float32))
    runner = CliRunner()
    for command in (["show"], ["run", "--input", str(tmp_path / "data.npz")], ["bench", "--seconds", "0"]):
        done = runner.invoke(app, [*command, str(signed), "--trusted-key", str(other), "--trusted-key", str(public)])
        assert done.exit_code == 0, done.output
        refused = runner.invoke(app, [*command, str(signed), "--trusted-key", str(other)]).exception
        assert "is not signed by a trusted key" in str(refused)


@pytest.mark.parametrize("command", [["show"], ["bench"], ["generate", "prompt"]])
def test_a_trusted_key_goes_with_a_saved_model(command, keys, tmp_path):
    arguments = [command[0], str(tmp_path), *command[1:], "--trusted-key", str(keys[1])]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert done.exit_code == 2 and "--trusted-key goes with a saved model" in done.output
