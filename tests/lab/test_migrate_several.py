"""Several domains at once, to one directory of one host: none gets in another's way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from migrating import PATIENCE_S, Stage

from virtgrid.lab import guest

pytestmark = pytest.mark.lab


@pytest.fixture
def stages(stage: Stage) -> Iterator[list[Stage]]:
    """The guest and two more, at the same site."""
    with ExitStack() as undo:
        found = [stage]
        for number in (1, 2):
            spec = replace(stage.spec, name=f"mover{number}", address=f"10.77.0.{60 + number}")
            more = replace(stage, spec=spec)
            undo.callback(more.forget)
            guest.boot(more.lab, more.here, spec)
            found.append(more)
        for more in found[1:]:
            guest.wait_answering(more.lab, more.spec, deadline_s=PATIENCE_S)
            more.remember_downtime()
        yield found


def test_three_domains_leave_for_the_same_host_at_once(stages: list[Stage]) -> None:
    running = [stage.start("--policy", "immediate") for stage in stages]
    for migration in running:
        ended = migration.end(deadline_s=180)
        assert ended.status == 0, ended.last
        migration.bury()
    for stage in stages:
        stage.check_moved()


def test_a_pool_left_by_a_driver_that_died_is_removed_by_the_next_migration(stage: Stage) -> None:
    stage.virsh(
        stage.there,
        "pool-create-as",
        "virtgrid-19991231T235959-0",
        "dir",
        "--target",
        "/var/lib/libvirt/images",
    )
    assert stage.pools(stage.there)
    stage.check_clean_migration()
