"""``virtgrid serve web`` says what is wrong with how it was called, in the option's words."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from virtgrid.cli.main import app

NETWORK = ["--listen", "tls://127.0.0.1:0"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--listen", "tcp://0.0.0.0:80"], 2, "is no endpoint"),
        (NETWORK, 2, "nobody who may look"),
        ([*NETWORK, "--reader", "ann"], 2, "--reader: 'ann' is nobody of the grid"),
        ([*NETWORK, "--operator", "virtgrid://a/crm/crm"], 2, "--operator: virtgrid://a/crm/crm is a crm"),
        ([*NETWORK, "--reader", "virtgrid://a/user/ann", "--pki", "/nowhere"], 3, "no certificate of a host"),
    ],
)
def test_what_cannot_be_is_told_with_its_option(
    words: list[str], status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtgrid.cli.serve_web.log", lambda: None)  # it would outlive the test
    ended = CliRunner().invoke(app, ["serve", "web", *words])
    assert ended.exit_code == status
    assert said in " ".join(ended.stderr.split())
