"""The REST interface of a host: what it says, to whom, and that nothing else is said."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.journals import KINDS, sample_journal
from tests.web.served import Served, driving, held_now, serving, until
from tests.wire_grid import Grid
from virtgrid.core.errors import RefusedError
from virtgrid.host.web import openapi
from virtgrid.host.web.site import Web
from virtgrid.wire.endpoint import Endpoint, HostPort
from virtgrid.wire.identity import Role

HOST, READER = "virtgrid://a/host/h1", "virtgrid://a/user/ann"
OPERATOR, STRANGER = "virtgrid://a/user/op", "virtgrid://a/user/eve"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTGRID_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("VIRTGRID_RUN_DIR", str(tmp_path / "run"))


async def test_migrations_of_every_end_are_listed_newest_first(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.client() as client:
        for number, kind in enumerate(KINDS):
            began = sample_journal()[0].at + timedelta(hours=number)
            served.put(sample_journal(kind, domain=f"web{number}", start=began))
        async with client.get("/api/v1/migrations") as answer:
            said = await answer.json()
            assert answer.headers["Cache-Control"] == "no-store"
        found = {one["domain"]: one for one in said["migrations"]}
        assert [one["domain"] for one in said["migrations"]] == sorted(found, reverse=True)
        assert {one["outcome"] for one in found.values()} == {"finished", "failed", "aborted", "crashed"}
        assert found["web0"]["downtime_s"] > 0
        assert "journal" not in found["web0"], "no paths of this host"
        async with client.get("/api/v1/migrations?limit=2") as answer:
            said = await answer.json()
        assert (len(said["migrations"]), said["more"]) == (2, True)


async def test_a_held_migration_says_for_whom_it_waits(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.client() as client:
        served.put(held_now())
        async with client.get("/api/v1/migrations/web1") as answer:
            said = await answer.json()
    assert (said["state"], said["outcome"]) == ("holding", "running")
    assert said["waiting_for"]["text"]
    counts = said["connections"]
    assert counts["total"] == counts["suitable"] + counts["unsuitable"]
    assert said["busy"]
    assert said["for_s"] is not None
    assert [one["phase"] for one in said["phases"]][-1] == "hold"


async def test_what_is_written_later_is_seen(tmp_path: Path) -> None:
    records = held_now(until_s=60.0)
    cut = next(at for at, one in enumerate(records) if one.get("phase") == "hold")
    async with serving(tmp_path) as served, served.client() as client:
        path = served.put(records[:cut])

        async def state() -> str:
            async with client.get("/api/v1/migrations/web1") as answer:
                return str((await answer.json())["state"])

        assert await state() != "holding"
        served.append(path, *records[cut:])
        async with asyncio.timeout(20):
            while await state() != "holding":
                pass


async def test_a_damaged_journal_is_told_and_does_not_hide_the_others(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.client() as client:
        served.put(sample_journal())
        (served.directory / "20261122T000000-torn.jsonl").write_text("no journal\n{}\n")
        async with client.get("/api/v1/migrations") as answer:
            said = await answer.json()
        assert [one["domain"] for one in said["migrations"]] == ["web1"]
        assert said["unreadable"][0]["journal"] == "20261122T000000-torn.jsonl"
        async with client.get("/api/v1/migrations/torn") as answer:
            assert answer.status == 409
        async with client.get("/report/torn") as answer:
            assert answer.status == 409


async def test_release_and_abort_reach_the_driver_with_who_asked(tmp_path: Path) -> None:
    records = held_now()
    async with serving(tmp_path) as served, served.client() as client, driving(records[0]) as driver:
        served.put(records)
        for verb in ("release", "abort"):
            async with client.post(f"/api/v1/migrations/web1/{verb}", json={"by": "ann"}) as answer:
                assert await answer.json() == {"ok": True, "text": f"{verb}: told"}
    assert driver.asked == [
        ("release", "the socket on this host for ann"),
        ("abort", "the socket on this host for ann"),
    ]


@pytest.mark.parametrize(
    ("sent", "headers", "status"),
    [
        (b"{}", {"Content-Type": "text/plain"}, 415),  # what a foreign page can send without asking
        (b"{}", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        (b"{", JSON, 400),
        (b'{"by": 1}', JSON, 400),
        (b'{"force": true}', JSON, 400),
        (b'{"by": "' + b"x" * 101 + b'"}', JSON, 400),
        (b'{"by": "' + b"x" * 5000 + b'"}', JSON, 413),
    ],
)
async def test_a_command_in_bad_form_changes_nothing(
    tmp_path: Path, sent: bytes, headers: dict[str, str], status: int
) -> None:
    records = held_now()
    async with serving(tmp_path) as served, served.client() as client, driving(records[0]) as driver:
        served.put(records)
        async with client.post("/api/v1/migrations/web1/release", data=sent, headers=headers) as answer:
            assert answer.status == status
            assert answer.content_type == "application/problem+json"
    assert driver.asked == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/v1/migrations?limit=0", 400),
        ("GET", "/api/v1/migrations?limit=501", 400),
        ("GET", "/api/v1/migrations?limit=-1", 400),
        ("GET", "/api/v1/migrations?limit=%D9%A1", 400),  # a digit, elsewhere
        ("GET", "/api/v1/migrations/nobody", 404),
        ("GET", "/api/v1/migrations/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/report/nobody", 404),
        ("GET", "/page.js/../../site.py", 404),
        ("GET", "/site.py", 404),
        ("DELETE", "/api/v1/migrations/web1", 405),
        ("OPTIONS", "/api/v1/migrations/web1/release", 405),  # nobody is let in from another page
    ],
)
async def test_what_is_not_there_is_told_in_one_form(
    tmp_path: Path, method: str, path: str, status: int
) -> None:
    async with serving(tmp_path) as served, served.client() as client:
        served.put(sample_journal())
        async with client.request(method, path) as answer:
            said = await answer.json()
            assert (answer.status, said["status"]) == (status, status)
            assert "Access-Control-Allow-Origin" not in answer.headers


async def test_a_report_is_a_page_of_its_own_without_scripts(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.client() as client:
        served.put(sample_journal())
        async with client.get("/report/web1") as answer:
            text = await answer.text()
            assert "script-src" not in answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "<svg" in text


async def test_metrics_are_what_prometheus_reads(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.client() as client:
        served.put(held_now())
        served.put(sample_journal(domain="old"))
        async with client.get("/metrics") as answer:
            text = await answer.text()
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found = {family.name: family.samples for family in text_string_to_metric_families(text)}
    (held,) = found["virtgrid_migration_hold_seconds"]
    assert held.labels["domain"] == "web1"
    assert held.value > 0
    verdicts = {one.labels["verdict"]: one.value for one in found["virtgrid_migration_connections"]}
    assert set(verdicts) == {"suitable", "unsuitable", "unknown"}
    ended = {one.labels["outcome"]: one.value for one in found["virtgrid_migrations"]}
    assert ended["finished"] == 1
    (phase,) = (one for one in found["virtgrid_migrations_in_phase"] if one.value)
    assert phase.labels["phase"] == "holding"


async def test_the_dashboard_asks_for_nothing_that_is_not_there(tmp_path: Path) -> None:
    dashboard = (Path(__file__).parents[2] / "docs/examples/grafana-dashboard.json").read_text()
    asked = set(re.findall(r"virtgrid_[a-z_]+", dashboard)) - {"virtgrid_migrations_in"}
    async with serving(tmp_path) as served, served.client() as client:
        served.put(held_now())
        async with client.get("/metrics") as answer:
            there = set(re.findall(r"^(virtgrid_[a-z_]+)", await answer.text(), re.MULTILINE))
    assert asked <= there


async def test_a_removed_journal_does_not_make_a_counter_run_backwards(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.client() as client:
        path = served.put(sample_journal())

        async def finished() -> str:
            async with client.get("/metrics") as answer:
                text = await answer.text()
            return next(line for line in text.splitlines() if 'outcome="finished"' in line)

        assert (await finished()).endswith(" 1.0")
        path.unlink()
        served.web._looked_s = float("-inf")
        assert (await finished()).endswith(" 1.0")


async def test_without_a_coordinator_that_is_said(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, served.client() as client:
        for noun in ("jobs", "reservations"):
            async with client.get(f"/api/v1/{noun}") as answer:
                said = await answer.json()
            assert said[noun] == []
            assert "--grc" in said["why"]


def test_every_operation_is_described_with_its_answer() -> None:
    document = openapi.document("1")
    assert len(openapi.OPERATIONS) == sum(len(path) for path in document["paths"].values())
    text = json.dumps(document)
    for name in {one.answer.__name__ for one in openapi.OPERATIONS}:
        assert f"#/components/schemas/{name}" in text
        assert name in document["components"]["schemas"]


async def test_it_is_as_it_is_described_whatever_is_asked(tmp_path: Path) -> None:
    """By schemathesis, which makes up what fits the description and what does not."""
    records = held_now()
    async with serving(tmp_path) as served, served.over_tcp() as address, driving(records[0]):
        served.put(records)
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "schemathesis.cli", "run", f"{address}/api/v1/openapi.json", "--seed", "7",
            "--max-examples", "20", "--no-color", "--workers", "1",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path,
        )  # fmt: skip
        told, _ = await asyncio.wait_for(program.communicate(), 300)
    assert program.returncode == 0, told.decode()


# -- over the network ------------------------------------------------------------------------------


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return Grid(tmp_path / "pki")


def _client(grid: Grid, uri: str | None) -> ssl.SSLContext:
    if uri is not None:
        return grid.tls(uri).client_context()
    context = grid.tls(STRANGER).client_context()
    without = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    without.load_verify_locations(cadata="".join(map(ssl.DER_cert_to_PEM_cert, context.get_ca_certs(True))))
    return without


def _network(grid: Grid, **more: frozenset[str]) -> Web:
    return Web(Endpoint(HostPort("127.0.0.1", 0)), tls=grid.tls(HOST), **more)


async def _asked(web: Web, context: ssl.SSLContext, method: str, path: str) -> tuple[int, str]:
    assert isinstance(web.at.place, HostPort)
    address = f"https://127.0.0.1:{web.at.place.port}"
    sent = {"json": {}} if method == "POST" else {}
    async with (
        aiohttp.ClientSession(address) as session,
        session.request(method, path, ssl=context, **sent) as answer,
    ):
        return answer.status, await answer.text()


async def test_over_the_network_a_list_says_who_may_look_and_who_may_steer(
    grid: Grid, tmp_path: Path
) -> None:
    records = held_now()
    lists = {"readers": frozenset({READER}), "operators": frozenset({OPERATOR})}
    async with _network(grid, **lists) as web, driving(records[0]) as driver:
        Served(tmp_path, tmp_path / "migrations", web).put(records)
        for who, status in ((READER, 200), (OPERATOR, 200), (STRANGER, 403)):
            for path in ("/", "/page.js", "/metrics", "/api/v1/migrations", "/api/v1/openapi.json"):
                assert (await _asked(web, _client(grid, who), "GET", path))[0] == status, (who, path)
        for who, status in ((READER, 403), (STRANGER, 403), (OPERATOR, 200)):
            found = await _asked(web, _client(grid, who), "POST", "/api/v1/migrations/web1/release")
            assert found[0] == status, who
    assert driver.asked == [("release", OPERATOR)]


async def test_without_a_certificate_nothing_is_said(grid: Grid) -> None:
    async with _network(grid, readers=frozenset({READER})) as web:
        with pytest.raises(aiohttp.ClientError):
            await _asked(web, _client(grid, None), "GET", "/")


async def test_a_renewed_certificate_is_used_without_a_restart(grid: Grid) -> None:
    async with _network(grid, readers=frozenset({READER})) as web:
        assert isinstance(web.at.place, HostPort)
        port, context = web.at.place.port, _client(grid, READER)

        def serial() -> object:
            with (
                socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1") as there,
            ):
                shown = there.getpeercert()
                assert shown is not None
                return shown["serialNumber"]

        before = await asyncio.to_thread(serial)
        grid.enrol(HOST)
        assert await asyncio.to_thread(serial) != before


async def test_a_revoked_certificate_is_out_at_once(grid: Grid) -> None:
    lists = {"readers": frozenset({READER})}
    async with _network(grid, **lists) as web:
        context = _client(grid, READER)
        assert (await _asked(web, context, "GET", "/"))[0] == 200
        _revoke(grid, READER)
        status, text = await _asked(web, context, "GET", "/")
        assert status == 403
        assert "revoked" in text


def _revoke(grid: Grid, uri: str) -> None:
    grid.authority.revoke(uri, now=grid.now)
    revoked = grid.places(HOST).files(Role.HOST).revoked
    assert revoked is not None
    revoked.write_bytes(grid.authority.revoked_file.read_bytes())


async def test_one_place_is_served_once(tmp_path: Path) -> None:
    async with serving(tmp_path):
        with pytest.raises(RefusedError, match="somebody does already"):
            async with serving(tmp_path):
                pass


async def test_nobody_else_opens_the_socket_and_it_goes_in_the_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        assert served.socket.stat().st_mode & 0o777 == 0o600
    await until(lambda: not served.socket.exists(), "the socket gone")
