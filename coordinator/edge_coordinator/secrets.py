"""The secrets with which devices and the coordinator log in at the broker, and the one form in which they are stored.

Not a general password store: `new_secret` draws 256 random bits, which no stretching makes harder to guess, so the
iteration count is Mosquitto's own default and a log-in costs a broker about 0.1 ms. Imports the standard library and
`edge_runtime.errors`; anything in edge_coordinator may import it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets

from edge_runtime.errors import UsageError

SECRET_BYTES = 32
SALT_BYTES = 12  # as mosquitto_passwd 2.0 writes it
DIGEST_BYTES = 64  # SHA-512
ITERATIONS = 101  # mosquitto_passwd's default
MAX_ITERATIONS = 1_000_000  # a stored hash that asks for more would block the broker: about 0.5 s
MAX_SECRET_BYTES = 1024


def new_secret() -> str:
    """A fresh secret of 256 random bits: 43 characters of the URL-safe base64 alphabet."""
    return secrets.token_urlsafe(SECRET_BYTES)


def hash_secret(secret: str) -> str:
    """The form in which a secret is stored: `$7$iterations$salt$hash`, PBKDF2-HMAC-SHA512, base64.

    It is what `mosquitto_passwd` writes after the colon (Mosquitto 2.0, `man mosquitto_passwd`), so the same string
    serves the embedded broker and Mosquitto's password file.

    Raises:
        UsageError: the secret is empty, longer than 1024 bytes or holds a line break or NUL.
    """
    encoded = secret.encode("utf-8", "surrogatepass")
    if not 0 < len(encoded) <= MAX_SECRET_BYTES or any(mark in secret for mark in "\n\r\0"):
        raise UsageError(
            f"a secret has 1 to {MAX_SECRET_BYTES} bytes without line breaks, this one has {len(encoded)}: "
            "use new_secret()"
        )
    salt = secrets.token_bytes(SALT_BYTES)
    digest = hashlib.pbkdf2_hmac("sha512", encoded, salt, ITERATIONS)
    return f"$7${ITERATIONS}${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def verify_secret(secret: str, hashed: str) -> bool:
    """Whether `hashed` was made from `secret`, compared in constant time. Garbage on either side is False."""
    try:
        empty, scheme, iterations_text, salt_text, digest_text = hashed.split("$")
        iterations = int(iterations_text)
        salt = base64.b64decode(salt_text, validate=True)
        digest = base64.b64decode(digest_text, validate=True)
        encoded = secret.encode("utf-8", "surrogatepass")
    except (AttributeError, ValueError, TypeError, binascii.Error):
        return False
    if empty or scheme != "7" or not salt or len(digest) != DIGEST_BYTES or len(encoded) > MAX_SECRET_BYTES:
        return False
    if not 0 < iterations <= MAX_ITERATIONS or b"\0" in encoded:  # HMAC pads its key with NUL: "a" and "a\0" are one
        return False
    return hmac.compare_digest(hashlib.pbkdf2_hmac("sha512", encoded, salt, iterations), digest)
