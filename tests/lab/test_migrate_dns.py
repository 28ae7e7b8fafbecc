"""The name clients find the guest by goes with it: followed by a client's resolver on a real BIND."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from bind import NAME, NEW6, OLD, OLD6, TTL_S, Bind, running
from migrating import Stage

from virtgrid.lab.layout import CLIENT_ADDRESS
from virtgrid.migration.naming import LOW_TTL_S

pytestmark = pytest.mark.lab


@pytest.fixture
def bind(stage: Stage, tmp_path: Path) -> Iterator[Bind]:
    """A BIND where the clients are; the sites reach it over the clients' segment."""
    with running(tmp_path, listen=(CLIENT_ADDRESS,), there=stage.lab.client.argv) as bind:
        yield bind


@pytest.fixture
def named(stage: Stage, bind: Bind) -> Iterator[Stage]:
    """The stage, with that server and its key in virtgrid's configuration."""
    file = bind.home / "virtgrid.toml"
    file.write_text(f'[dns]\nserver = "{bind.address}"\nkey = "{bind.key_file()}"\n')
    stage.variables["VIRTGRID_CONFIG"] = str(file)
    yield stage
    del stage.variables["VIRTGRID_CONFIG"]


def wish(stage: Stage) -> tuple[str, str]:
    """The old address leads nowhere, the new one to the guest."""
    return "--dns", f"{NAME}={stage.spec.address},{NEW6}"


def seen(bind: Bind) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """What a client's resolver gets."""
    return bind.resolve(), bind.resolve(kind="AAAA")


def records(address: str, address6: str, ttl_s: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    return [(address, ttl_s)], [(address6, ttl_s)]


def test_clients_that_ask_find_the_guest_at_its_new_site(named: Stage, bind: Bind) -> None:
    assert seen(bind) == records(OLD, OLD6, TTL_S)
    with named.caught_in("hold", *wish(named)) as migration:
        assert seen(bind) == records(OLD, OLD6, LOW_TTL_S)
        assert named.virtgrid("migration", "release", migration.id).status == 0
        ended = migration.end()
    assert (ended.status, ended.last["name_state"]) == (0, "settled")
    [(address, ttl_s)] = bind.resolve()
    assert (address, ttl_s) == (named.spec.address, TTL_S)
    assert bind.resolve(kind="AAAA") == [(NEW6, TTL_S)]
    page = named.lab.client.run(["curl", "--silent", "--fail", "--max-time", "20", f"http://{address}/"])
    assert page.stdout
    order = [record.event for record in migration.records if record.event in ("resumed", "name_changed")]
    assert order == ["name_changed", "resumed", "name_changed", "name_changed"]
    named.check_moved()


def test_a_migration_that_is_aborted_leaves_the_name_as_it_was(named: Stage, bind: Bind) -> None:
    with named.caught_in("precopy", *wish(named)) as migration:
        assert seen(bind) == records(OLD, OLD6, LOW_TTL_S)
        assert named.virtgrid("migration", "abort", migration.id).status == 0
        assert migration.end().status == 6
    assert seen(bind) == records(OLD, OLD6, TTL_S)
    named.check_safe_at_source()


def test_a_worker_that_was_killed_leaves_the_name_to_recover(named: Stage, bind: Bind) -> None:
    with named.caught_in("storage", *wish(named)) as migration:
        migration.kill_worker()
        assert migration.end().status == 7
    assert seen(bind) == records(OLD, OLD6, LOW_TTL_S)
    looked = named.virtgrid("migration", "recover", migration.id)
    assert f"{NAME} points to {OLD} and {OLD6}" in looked.out
    assert seen(bind) == records(OLD, OLD6, LOW_TTL_S), "without --yes nothing is done"
    assert named.virtgrid("migration", "recover", migration.id, "--yes").status == 0
    assert seen(bind) == records(OLD, OLD6, TTL_S)
    named.check_safe_at_source()


def test_a_name_server_that_dies_fails_no_migration_and_recover_moves_the_name(
    named: Stage, bind: Bind
) -> None:
    with named.caught_in("hold", *wish(named)) as migration:
        bind.kill()
        assert named.virtgrid("migration", "release", migration.id).status == 0
        ended = migration.end()
    assert (ended.status, ended.last["event"], ended.last["name_state"]) == (0, "finished", "lowered")
    mend = f"virtgrid migration recover {migration.id} --yes"
    assert ended.last["hint"].startswith(mend)
    shown = json.loads(named.virtgrid("migration", "show", migration.id, "--json").out)
    assert f"{NAME} was NOT pointed to it" in shown["verdict"]
    assert mend in shown["hint"]

    again = named.virtgrid("migration", "recover", migration.id, "--yes")
    assert (again.status, "does not answer" in again.err) == (1, True)
    bind.start()
    assert named.virtgrid("migration", "recover", migration.id, "--yes").status == 0
    assert seen(bind) == records(named.spec.address, NEW6, TTL_S)
    shown = json.loads(named.virtgrid("migration", "show", migration.id, "--json").out)
    assert (shown["outcome"], "NOT" in shown["verdict"]) == ("finished", False)
    named.check_moved()


def test_a_name_that_could_not_follow_is_refused_before_anything_is_touched(named: Stage, bind: Bind) -> None:
    serial = bind.serial()
    for options, words in [
        (("--dns", f"locked.svc.test={named.spec.address}"), "may not change this name"),
        (("--dns", f"nobody.svc.test={named.spec.address}"), "no A record"),
    ]:
        refused = named.migrate(*options)
        assert (refused.status, refused.last["error"]) == (3, "VG-REFUSED")
        assert words in refused.last["what"]
        checked = named.migrate(*options, "--dry-run")
        assert (checked.status, json.loads(checked.out)["would_migrate"]) == (3, False)
    assert bind.serial() == serial
    named.check_safe_at_source()
