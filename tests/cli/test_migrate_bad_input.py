"""``virtgrid migrate`` with words that cannot be meant: one sentence, the right status, nothing touched."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from virtgrid.cli import migrate as command
from virtgrid.migration import worker

URI = "qemu+tls://hostB/system"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state directory, and a migration that must not be begun."""
    for variable in ("LIBVIRT_DEFAULT_URI", "VIRTGRID_CONFIG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("VIRTGRID_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("VIRTGRID_RUN_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("NO_COLOR", "1")

    def begun(*_: object) -> None:
        pytest.fail("bad words reached the hosts")

    monkeypatch.setattr(worker, "start", begun)
    monkeypatch.setattr(worker, "dry_run", begun)
    return tmp_path


def call(*words: str) -> Result:
    app = typer.Typer()
    app.command()(command.migrate)
    return CliRunner().invoke(app, list(words))


def one_sentence(result: Result, status: int = 2) -> str:
    """The message: a sentence, and at most a cause and a hint, indented."""
    assert result.exit_code == status, result.output
    first, *rest = result.stderr.splitlines()
    assert first.startswith("error: ")
    assert "Traceback" not in result.output
    assert "bug" not in result.output
    assert len(rest) <= 2
    assert all(line.startswith("  ") for line in rest)
    return result.stderr


OUT_OF_RANGE = [
    ("--bandwidth", "0"),
    ("--bandwidth", "0.5"),
    ("--bandwidth", "99999999999"),
    ("--bandwidth", "100kbit"),
    ("--timeout", "0"),
    ("--timeout", "0.5s"),
    ("--timeout", "60d"),
    ("--max-downtime", "0"),
    ("--max-downtime", "19ms"),
    ("--max-downtime", "11m"),
    ("--large", "0"),
    ("--large", "2000000GiB"),
    ("--stall-timeout", "4s"),
    ("--stall-timeout", "25h"),
    ("--verify-timeout", "11m"),
    ("--max-wait", "8d"),
    ("--backoff-start", "-1"),
    ("--backoff-start", "100001"),
    ("--backoff-deferrals", "0"),
    ("--backoff-deferrals", "1001"),
    ("--backoff-steps", "0,1"),
    ("--backoff-steps", "4,2"),
    ("--backoff-steps", "100001"),
    ("--backoff-iteration", "50ms"),
    ("--backoff-iteration", "2h"),
]
MALFORMED = [
    *[
        (option, text)
        for option in ("--timeout", "--max-wait", "--max-downtime", "--stall-timeout", "--verify-timeout")
        for text in ("", "soon", "-1s", "1e3", "nan", "inf", "5 parsecs", "１s")
        if (option, text) != ("--max-wait", "inf")
    ],
    *[("--bandwidth", text) for text in ("", "fast", "-5", "nan", "1..5", "10parsec", "٣", "1e400")],
    *[("--large", text) for text in ("", "big", "-4MiB", "4 elephants")],
    *[("--backoff-steps", text) for text in ("", "a", "1,,2", "1;2", "nan")],
    ("--backoff-iteration", "now and then"),
    ("--policy", "lenient"),
    ("--policy", ""),
    ("--on-timeout", "shrug"),
    ("--migrateuri", "hostB"),
    ("--migrateuri", "rdma://hostB"),
    ("--migrate-disks", "vda"),
    *[("--dns", text) for text in ("", "web.example.org", "=10.0.0.1", "web.example.org=soon")],
    ("--dns", "web.example.org=10.0.0.1"),  # no name server is configured
]


@pytest.mark.parametrize(("option", "text"), OUT_OF_RANGE)
def test_an_option_out_of_range_exits_2_with_a_sentence(state: Path, option: str, text: str) -> None:
    one_sentence(call("web", URI, f"{option}={text}"))
    assert list(state.iterdir()) == []


@pytest.mark.parametrize(("option", "text"), MALFORMED)
def test_a_malformed_option_exits_2_with_a_sentence(state: Path, option: str, text: str) -> None:
    one_sentence(call("web", URI, f"{option}={text}"))
    assert list(state.iterdir()) == []


@pytest.mark.parametrize(
    "uri",
    [
        "", "hostB", "hostB/system", "://", "qemu", "qemu:", "lxc:///system", "xen+ssh://hostB", "test:///default",
        "http://hostB", "qemu+tls//hostB", "QEMU+TLS//x", "qemu+tls://[::1/system", "qemu+tcp://bob:port/system",
        "qemu+tcp://bob:99999/system",
    ],
)  # fmt: skip
def test_what_is_no_qemu_uri_exits_2(state: Path, uri: str) -> None:
    said = one_sentence(call("web", "--", uri))
    assert "URI" in said or "hypervisor" in said
    assert list(state.iterdir()) == []


@pytest.mark.parametrize("name", sorted(command.REFUSED))
def test_an_option_of_virsh_that_comes_later_is_refused_with_its_reason(state: Path, name: str) -> None:
    option = f"--{name.replace('_', '-')}"
    said = one_sentence(call("web", URI, option))
    assert f"{option}: {command.REFUSED[name]}" in said.replace("\n", " ")
    assert list(state.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["web", URI, "--copy-storage-all", "--copy-storage-inc"],
        ["web", URI, "--undefinesource"],
        ["", URI],
        ["  ", URI],
    ],
)
def test_words_that_exclude_each_other_exit_2(state: Path, words: list[str]) -> None:
    one_sentence(call(*words))
    assert list(state.iterdir()) == []


@pytest.mark.parametrize("option", ["--xml", "--persistent-xml"])
def test_a_file_that_cannot_be_read_exits_4_and_names_it(state: Path, option: str, tmp_path: Path) -> None:
    missing = tmp_path / "missing.xml"
    assert str(missing) in one_sentence(call("web", URI, option, str(missing)), 4)
    assert str(tmp_path) in one_sentence(call("web", URI, option, str(tmp_path)), 4)
    binary = tmp_path / "binary.xml"
    binary.write_bytes(b"\xff\xfe\x00")
    one_sentence(call("web", URI, option, str(binary)), 4)


def test_a_missing_word_or_an_unknown_option_exits_2(state: Path) -> None:
    for words in ([], ["web"], ["web", URI, "extra"], ["web", URI, "--no-such-option"]):
        assert call(*words).exit_code == 2
    assert list(state.iterdir()) == []


def test_with_json_the_error_is_an_object_on_standard_output(state: Path) -> None:
    result = call("web", URI, "--json", "--max-downtime", "0")
    assert result.exit_code == 2
    told = json.loads(result.stdout)
    assert (told["error"], told["exit_status"]) == ("VG-USAGE", 2)
    assert "--max-downtime" in told["what"]
    assert result.stderr == ""


def test_good_words_reach_the_hosts_as_meant(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def begun(request: object, **_: object) -> None:
        seen.append(request)
        raise SystemExit(0)

    monkeypatch.setattr(worker, "start", begun)
    words = ["--bandwidth", "100mbit", "--max-wait", "forever", "--large", "8M", "--timeout", "5m"]
    assert call("web", URI, *words).exit_code == 0
    assert call("web", URI, "--bandwidth", "100").exit_code == 0
    first, second = seen
    assert (first.bandwidth_bytes_s, first.large_bytes, first.timeout_s) == (12.5e6, 8 << 20, 300)
    assert first.policy.max_wait_s in (None, math.inf)
    assert second.bandwidth_bytes_s == 100 * 2**20


def test_the_name_server_and_its_key_come_from_the_configuration(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(worker, "start", lambda request, **_: seen.append(request))
    file = tmp_path / "virtgrid.toml"
    file.write_text('[dns]\nserver = "ns1:5353"\nkey = "/etc/virtgrid/dns.key"\n')
    monkeypatch.setenv("VIRTGRID_CONFIG", str(file))
    call("web1", URI, "--dns", "web.example.org=198.51.100.10")
    assert (str(seen[0].dns.server), seen[0].dns.key_file) == ("ns1:5353", "/etc/virtgrid/dns.key")
    file.write_text('[dns]\nserver = "ns1:port"\nkey = "/etc/virtgrid/dns.key"\n')
    assert f"defaults come from {file}" in one_sentence(call("web1", URI, "--dns", "web=198.51.100.10"))


def test_a_value_out_of_range_from_the_configuration_names_the_file(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "virtgrid.toml"
    file.write_text('[migration]\npolicy = "soft"\n')
    monkeypatch.setenv("VIRTGRID_CONFIG", str(file))
    assert f"defaults come from {file}" in one_sentence(call("web1", URI))
