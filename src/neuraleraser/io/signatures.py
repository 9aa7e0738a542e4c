"""Signatures of Ed25519 (RFC 8032), by the package `cryptography`: keys as PEM files, the rest in base64."""

from __future__ import annotations

import base64
import os
from typing import Any

from neuraleraser.errors import FileError
from neuraleraser.io.dependencies import import_optional
from neuraleraser.io.reading import read_bytes

_MAX_KEY_BYTES = 2**16


def sign(data: bytes, key: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the signature of `data` and the public key.

    key: a private key without a password. Raises FileError for another, MissingDependencyError without the package.
    """
    keys, serialization = _cryptography()
    advice = "pass one that `openssl genpkey -algorithm ed25519 -out key.pem` makes"
    try:
        private = serialization.load_pem_private_key(read_bytes(key, _MAX_KEY_BYTES), password=None)
    except (ValueError, TypeError) as error:
        raise FileError(f"{key} is no private key in PEM without a password: {advice}") from error
    if not isinstance(private, keys.Ed25519PrivateKey):
        raise FileError(f"{key} is a key of another kind: {advice}")
    public = private.public_key().public_bytes_raw()
    return base64.b64encode(private.sign(data)).decode(), base64.b64encode(public).decode()


def read_public_key(path: str | os.PathLike[str]) -> str:
    """Return a public key. Raises FileError for another, MissingDependencyError without the package."""
    keys, serialization = _cryptography()
    try:
        public = serialization.load_pem_public_key(read_bytes(path, _MAX_KEY_BYTES))
    except ValueError as error:
        raise FileError(f"{path} is no public key in PEM: `openssl pkey -in key.pem -pubout` writes one") from error
    if not isinstance(public, keys.Ed25519PublicKey):
        raise FileError(f"{path} is a key of another kind: pass a public key of Ed25519")
    return base64.b64encode(public.public_bytes_raw()).decode()


def is_signature(signature: object, data: bytes, public_key: object) -> bool:
    """Return True if a signature is of `data` by a public key. Raises MissingDependencyError without the package."""
    keys, _ = _cryptography()
    invalid = import_optional("cryptography.exceptions", "a signature", "certify").InvalidSignature
    if not isinstance(signature, str) or not isinstance(public_key, str):
        return False
    try:
        key = keys.Ed25519PublicKey.from_public_bytes(base64.b64decode(public_key, validate=True))
        key.verify(base64.b64decode(signature, validate=True), data)
    except (invalid, ValueError):
        return False
    return True


def _cryptography() -> tuple[Any, Any]:
    """Return the modules of Ed25519's keys and of their forms."""
    name = "cryptography.hazmat.primitives"
    keys = import_optional(f"{name}.asymmetric.ed25519", "a signature", "certify")
    return keys, import_optional(f"{name}.serialization", "a signature", "certify")
