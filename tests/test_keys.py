"""Who may ask: a file of hashed keys."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fathom.keys import Keys, KeysError, made


def bearer(key: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"authorization": f"{scheme} {key}"}


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, str]:
    """A file with one key, and the key."""
    key, line = made("shop")
    path = tmp_path / "keys"
    path.write_text(f"# who may ask\n\n{line} # since May\n")
    return path, key


def test_a_key_says_whose_it_is(file: tuple[Path, str]) -> None:
    path, key = file
    keys = Keys(path)
    assert keys.client(bearer(key)) == "shop"
    assert keys.client(bearer(key, "bearer")) == "shop"


def test_the_file_does_not_have_the_key(file: tuple[Path, str]) -> None:
    path, key = file
    assert key not in path.read_text()
    assert hashlib.sha256(key.encode()).hexdigest() in path.read_text()
    assert len(key) >= 43, "256 bits"


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": ""}, bearer(""), bearer("guess"), bearer("x" * 100_000)]
)
def test_without_a_known_key_one_is_nobody(file: tuple[Path, str], headers: dict[str, str]) -> None:
    path, key = file
    assert Keys(path).client(headers) is None
    assert Keys(path).client(bearer(key, "Basic")) is None


def test_keys_are_exchanged_while_they_are_used(
    file: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    """A new key beside the old one, then without it; a bad file changes nothing."""
    path, old = file
    keys = Keys(path)
    new, line = made("shop")
    path.write_text(path.read_text() + line)
    assert keys.client(bearer(old)) == keys.client(bearer(new)) == "shop"
    path.write_text(line)
    os.utime(path, ns=(1, 1))  # even if the clock is too coarse to tell the two apart
    assert keys.client(bearer(old)) is None
    assert keys.client(bearer(new)) == "shop"
    with caplog.at_level(logging.ERROR, "bentoml.fathom"):
        path.write_text("oops")
        assert keys.client(bearer(new)) == "shop"
    assert "line 1: not a SHA-256" in caplog.text
    assert "the keys of before stay" in caplog.text


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(KeysError, match=r"keys: the API keys cannot be read \(.*No such file"):
        Keys(path)
    path.write_text("# nobody yet\n")
    with pytest.raises(KeysError, match=r"no API key; `python -m fathom.keys NAME` makes one"):
        Keys(path)
    path.write_text(f"{'0' * 64}  shop\nsecret shop\n{'0' * 64}\n")
    with pytest.raises(KeysError, match=r"line 2, 3: not a SHA-256 in hexadecimal and a name"):
        Keys(path)
    path.write_bytes(b"\xff")
    with pytest.raises(KeysError, match="the API keys cannot be read"):
        Keys(path)


def test_a_name_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match=r"'a b': a client's name has 1 to 64 of"):
        made("a b")


def test_the_command_prints_a_line_for_the_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fathom.keys", "shop"], capture_output=True, text=True, check=True
    )
    (tmp_path / "keys").write_text(done.stdout)
    key = done.stderr.strip().rpartition(" ")[2]
    assert Keys(tmp_path / "keys").client(bearer(key)) == "shop"
    refused = subprocess.run(
        [sys.executable, "-m", "fathom.keys", "a b"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "keys: 'a b': a client's name" in refused.stderr
