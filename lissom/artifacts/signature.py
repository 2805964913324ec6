"""Ed25519 signatures of artifacts, over the bytes of the manifest, which holds the hash of every other file.

A signature is a file with the 64 bytes of RFC 8032, which `openssl pkeyutl -verify -rawin` checks too. Keys are PEM files, as
`openssl genpkey -algorithm ed25519` writes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from lissom.errors import ArtifactError, InputError, UnsupportedError
from lissom.frontends.capture.failures import first_line
from lissom.io.files import read_plain, reason

SIGNATURE = "manifest.sig"
SIGNATURE_BYTES = 64
Key = TypeVar("Key")
TrustedKeys = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""The argument `trusted_keys=`: the path of a public key, or several paths."""


def key_files(trusted_keys: TrustedKeys | None) -> tuple[Path, ...] | None:
    """The paths in `trusted_keys=`; None if no signature is required.

    Raises:
        InputError: for anything but a path or several.
    """
    if trusted_keys is None:
        return None
    try:
        return tuple(map(Path, (trusted_keys,) if isinstance(trusted_keys, (str, os.PathLike)) else trusted_keys))
    except TypeError as error:
        raise InputError(f"trusted_keys= is {trusted_keys!r:.80}; give the path of a public key, or a list of paths") from error


def sign(message: bytes, private_key: Path) -> bytes:
    """The signature of a message by a key. Raises ArtifactError if the key cannot be read; UnsupportedError."""
    _check_installed()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = _read(private_key, Ed25519PrivateKey, "private", lambda text: load_pem_private_key(text, password=None))
    return key.sign(message)


def check_signature(message: bytes, directory: Path, trusted_keys: Sequence[Path]) -> None:
    """Refuse an artifact whose manifest is not signed by one of the keys.

    Args:
        message: the bytes of the manifest.
        trusted_keys: files of public keys; without any, every artifact is refused.

    Raises:
        ArtifactError: if it is not signed by one, or a key or the signature cannot be read.
        UnsupportedError: without the package `cryptography`.
    """
    _check_installed()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    keys = [_read(path, Ed25519PublicKey, "public", load_pem_public_key) for path in trusted_keys]
    path = directory / SIGNATURE
    # A broken link counts as existing, and is refused when it is opened.
    if not os.path.lexists(path):
        raise ArtifactError(f"'{directory}' is not signed, and trusted keys were given; sign it with `lissom sign`")
    signature = read_plain(path, SIGNATURE_BYTES)
    if len(signature) != SIGNATURE_BYTES:
        raise ArtifactError(
            f"'{path}' is not a signature of {SIGNATURE_BYTES} bytes; sign the artifact again with `lissom sign`"
        )
    for key in keys:
        try:
            key.verify(signature, message)
        except InvalidSignature:
            continue
        return
    named = ", ".join(f"'{path}'" for path in trusted_keys) or "no key"
    raise ArtifactError(
        f"'{directory}' is not signed by a trusted key ({named}), or its manifest was changed after it was signed; "
        f"do not use it, or trust the key of whoever signed it"
    )


def _check_installed() -> None:
    try:
        import_module("cryptography")
    except ImportError as error:
        raise UnsupportedError("signatures need the package cryptography: pip install 'lissom[sign]'") from error


def _read(path: Path, kind: type[Key], word: str, parse: Callable[[bytes], object]) -> Key:
    """The key in a PEM file. Raises ArtifactError if it holds no key of this kind."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        # Key files may be links, as secrets mounted into containers are.
        key = parse(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"the key '{path}' cannot be read: {reason(error)}; give the path of a PEM file") from error
    except TypeError as error:
        raise ArtifactError(f"the key '{path}' has a passphrase; write it without: openssl pkey -in KEY -out PLAIN") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ArtifactError(
            f"'{path}' is not a PEM file of a {word} key: {first_line(error)}; give the file that `openssl pkey` wrote"
        ) from error
    if not isinstance(key, kind):
        raise ArtifactError(
            f"'{path}' holds a key of another algorithm than Ed25519; make one: openssl genpkey -algorithm ed25519 -out KEY"
        )
    return key
