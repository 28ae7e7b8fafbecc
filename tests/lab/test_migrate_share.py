"""The link to the destination is shared with the service while a guest migrates, and as it was afterwards."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator

import pytest
from migrating import Migration, Stage, until

from virtgrid.lab.site import Site
from virtgrid.net import htb, share
from virtgrid.net.guarantee import Class
from virtgrid.net.link import Links

pytestmark = pytest.mark.lab

LINK = 12_500_000
SHARED = ("--bandwidth", "100mbit", "--service-share", "10%")


def _root(site: Site, interface: str) -> int | None:
    with Links(site.netns) as links:
        return htb.roots(links).get(links.require(interface))


def _classes(site: Site, interface: str) -> dict[int, Class]:
    with Links(site.netns) as links:
        return htb.classes_of(links, links.require(interface))


def _sent_bytes(site: Site, interface: str) -> int:
    """What has gone through the migration's class."""
    told = subprocess.run(
        site.argv(["tc", "-s", "class", "show", "dev", interface, "classid", "5653:102"]),
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    found = re.search(r"Sent ([0-9]+) bytes", told.stdout)
    assert found is not None, told.stdout
    return int(found[1])


def _interface(migration: Migration) -> str:
    return str(migration.wait_for("share", state="set")["interface"])


def _migration_class(ceil_bytes_s: int, *, prio: int) -> Class:
    return Class(parent=share.LINK, rate_bytes_s=LINK - LINK // 10, ceil_bytes_s=ceil_bytes_s, prio=prio)


def test_the_class_is_there_in_precopy_raised_at_the_release_and_gone_afterwards(stage: Stage) -> None:
    source = stage.source
    with stage.caught_in("hold", *SHARED) as migration:
        interface = _interface(migration)
        classes = _classes(source, interface)
        assert classes[share.MIGRATION] == _migration_class(LINK - LINK // 10, prio=1)
        assert classes[share.SERVICE] == Class(
            parent=share.LINK, rate_bytes_s=LINK // 10, ceil_bytes_s=LINK, prio=0
        )
        bounded = migration.wait_for("stream", state="bounded")
        assert bounded["unsent_bytes"] == 128 << 10
        # The guest's memory and its disk went through it, and not past it.
        sent = migration.last("ram")["sent_bytes"]
        assert _sent_bytes(source, interface) > sent / 2
        migration.let_go()
        assert migration.end().status == 0
    states = [record["state"] for record in migration.all() if record.event == "share"]
    assert states == ["set", "raised", "removed"]
    events = [record.event for record in migration.all() if record.event in ("share", "released", "stopped")]
    assert events.index("stopped") > 1
    assert events[:3] == ["share", "share", "released"], "raised before QEMU is told"
    assert _root(source, interface) is None
    stage.check_moved()


def test_killed_it_is_taken_away_by_recover(stage: Stage) -> None:
    with stage.caught_in("precopy", *SHARED) as migration:
        interface = _interface(migration)
        until(lambda: share.MIGRATION in _classes(stage.source, interface), "the classes")
        migration.kill_worker()
        assert migration.end().status == 7
    assert _root(stage.source, interface) == share.ROOT
    looked = stage.virtgrid("migration", "recover", migration.id)
    assert f"take the migration's classes off {interface}" in looked.out
    assert _root(stage.source, interface) == share.ROOT, "without --yes nothing is done"
    assert stage.virtgrid("migration", "recover", migration.id, "--yes").status == 0
    assert _root(stage.source, interface) is None
    stage.check_safe_at_source()


@pytest.fixture
def own_discipline(stage: Stage) -> Iterator[str]:
    """The interface to the other site, with a queueing discipline of its administrator's."""
    route = stage.source.argv(["ip", "-j", "route", "get", _address(stage)])
    told = subprocess.run(route, capture_output=True, check=True, timeout=20)
    interface = str(json.loads(told.stdout)[0]["dev"])
    tc = ["tc", "qdisc"]
    source = stage.source
    subprocess.run(
        source.argv([*tc, "add", "dev", interface, "root", "handle", "1:", "htb"]), check=True, timeout=20
    )
    try:
        yield interface
    finally:
        subprocess.run(source.argv([*tc, "del", "dev", interface, "root"]), check=True, timeout=20)


def _address(stage: Stage) -> str:
    found = subprocess.run(
        stage.source.argv(["getent", "hosts", stage.there]),
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    return found.stdout.split()[0]


def test_a_discipline_of_somebody_else_is_left_alone(stage: Stage, own_discipline: str) -> None:
    source = stage.source
    done = stage.migrate("--policy", "immediate", *SHARED)
    assert done.status == 0, done.last
    assert _root(source, own_discipline) == 0x10000
    check = next(line for line in done.lines if line.get("name") == "share")
    assert check["verdict"] == "WARN"
    assert f"{own_discipline} has a queueing discipline that virtgrid did not make" in check["text"]
    assert [line["state"] for line in done.lines if line["event"] == "share"] == ["off"]
    stage.check_moved()
