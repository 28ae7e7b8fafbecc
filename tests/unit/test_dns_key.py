"""A key's file is read as tsig-keygen writes it, and refused with a sentence that never shows the secret."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from virtgrid.core.errors import RefusedError
from virtgrid.wire.dns.key import TsigKey, parse_key, read_key

SECRET = "c2VjcmV0IHNlY3JldCBzZWNyZXQ="
GOOD = f'key "virtgrid" {{\n\talgorithm hmac-sha256;\n\tsecret "{SECRET}";\n}};\n'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"key virtgrid {{ secret {SECRET}; algorithm HMAC-SHA256; }};",
        f"# ours\n// since May\n/* the old one:\nkey x {{ }}; */ {GOOD}",
    ],
)
def test_the_forms_that_bind_takes_are_read(text: str) -> None:
    assert parse_key(text) == TsigKey(
        name="virtgrid", algorithm="hmac-sha256", secret=b"secret secret secret"
    )


@pytest.mark.parametrize(
    "text",
    [
        "", "virtgrid:" + SECRET, GOOD + GOOD, GOOD + "include", GOOD[:-3], GOOD.replace("sha256", "md5"),
        GOOD.replace(SECRET, "***"), GOOD.replace(SECRET, ""), GOOD.replace("algorithm", "Algorithmus"),
        GOOD.replace("};", "peer x; };"), GOOD.replace(SECRET, "c2V"), f"key v {{ secret {SECRET}; }};",
    ],
)  # fmt: skip
def test_anything_else_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_key(text)
    assert SECRET not in str(caught.value)


def test_slashes_in_a_secret_are_no_comment() -> None:
    secret = "ab//cd+/////"
    assert parse_key(GOOD.replace(SECRET, secret)).secret == base64.b64decode(secret)


def test_the_secret_is_in_no_representation() -> None:
    assert "secret secret" not in repr(parse_key(GOOD))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "dns.key"
    path.write_text(GOOD)
    path.chmod(mode)
    with pytest.raises(RefusedError, match="others may read it") as caught:
        read_key(path)
    assert f"chmod 600 {path}" in (caught.value.hint or "")
    path.chmod(0o600)
    assert read_key(path).name == "virtgrid"


def test_what_is_no_key_file_is_refused_naming_it(tmp_path: Path) -> None:
    large, binary = tmp_path / "large", tmp_path / "binary"
    for path, content in ((large, b" " * 20_000), (binary, b"\xff\0")):
        path.touch(mode=0o600)
        path.write_bytes(content)
    for path in (large, binary, tmp_path / "missing", tmp_path, Path("/dev/null")):
        with pytest.raises(RefusedError) as caught:
            read_key(path)
        assert str(path) in caught.value.what
