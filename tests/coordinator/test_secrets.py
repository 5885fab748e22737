"""Secrets: made, stored in Mosquitto's form, checked; hostile stored strings are refused, never raised."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from edge_coordinator.secrets import hash_secret, new_secret, verify_secret
from edge_runtime.errors import UsageError

# mosquitto_passwd -b, version 2.0.11, for the secret "s1"
GOLDEN = (
    "$7$101$bfbA45uOipaBsmxD$x4A8esnN0EF3iHeP9H8rkNU4tm8PpfnHaMgvsuC3dWXWGE01gAMnS3xhvE+BpRJWsAmc4PnFKpe89Rqn6HMzAQ=="
)


def test_a_new_secret_has_256_bits_in_url_safe_characters_and_is_never_the_same() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(len(secret) == 43 and secret.replace("-", "").replace("_", "").isalnum() for secret in secrets)


def test_a_secret_fits_its_own_hash_and_no_other() -> None:
    secret, other = new_secret(), new_secret()
    hashed = hash_secret(secret)
    assert verify_secret(secret, hashed)
    assert not verify_secret(other, hashed)
    assert hashed != hash_secret(secret), "salted"


def test_a_hash_that_mosquitto_passwd_wrote_is_understood() -> None:
    assert verify_secret("s1", GOLDEN)
    assert not verify_secret("s2", GOLDEN)


@pytest.mark.skipif(shutil.which("mosquitto_passwd") is None, reason="mosquitto_passwd is not installed")
def test_todays_mosquitto_passwd_writes_the_same_form(tmp_path: Path) -> None:
    path = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-c", "-b", str(path), "dev", "täst"], check=True, capture_output=True)
    assert verify_secret("täst", path.read_text().strip().partition(":")[2])


@pytest.mark.parametrize("secret", ["", "a\nb", "a\0b", "x" * 1025])
def test_a_secret_that_no_password_file_can_hold_is_refused(secret: str) -> None:
    with pytest.raises(UsageError):
        hash_secret(secret)


GARBAGE = [
    "",
    "$",
    "secret",
    "$7$101$",
    "$6$101$bfbA45uOipaBsmxD$" + "A" * 86 + "==",
    "$7$0$bfbA45uOipaBsmxD$" + "A" * 86 + "==",
    "$7$-1$bfbA45uOipaBsmxD$" + "A" * 86 + "==",
    "$7$999999999999999999999$bfbA45uOipaBsmxD$" + "A" * 86 + "==",
    "$7$1000001$bfbA45uOipaBsmxD$" + "A" * 86 + "==",
    "$7$ten$bfbA45uOipaBsmxD$" + "A" * 86 + "==",
    "$7$101$$" + "A" * 86 + "==",
    "$7$101$bfbA45uOipaBsmxD$AAAA",
    "$7$101$bfbA45uOipaBsmxD$" + "A" * 85 + "ä==",
    "$7$101$!!!!$" + "A" * 86 + "==",
    "$7$" + "9" * 5000 + "$bfbA$" + "A" * 86 + "==",
    GOLDEN + "$",
    "x" + GOLDEN,
    "\ud800",
]


@pytest.mark.parametrize("hashed", GARBAGE)
def test_a_garbled_stored_hash_is_false_and_quick(hashed: str) -> None:
    started_s = time.perf_counter()
    assert verify_secret("s1", hashed) is False
    assert time.perf_counter() - started_s < 0.2


@pytest.mark.parametrize("secret", ["", "\ud800", "s1\0", "x" * 10_000_000])
def test_a_garbled_secret_is_false(secret: str) -> None:
    assert verify_secret(secret, GOLDEN) is False
