"""Whoever is killed and whenever: in the end hosts have what the network manager promised, and no more."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3

import pytest
from migrating import until
from netsites import NetSites, net_sites

from virtgrid.core.errors import VirtgridError
from virtgrid.lab.lab import Lab

pytestmark = pytest.mark.lab

ROUNDS = 6


def _promised(net: NetSites) -> dict[int, int]:
    """The segments that are committed, by the manager's own file; and their rates on the wire."""
    with contextlib.closing(sqlite3.connect(net.home / "nrm.db", timeout=60)) as connection:
        rows = connection.execute("SELECT \"grant\" FROM hold WHERE state = 'COMMITTED'").fetchall()
    grants = [json.loads(grant) for (grant,) in rows]
    return {
        grant["segment"]: sum(-(-path["rate_bytes_s"] * 1538 // 1398) for path in grant["paths"])
        for grant in grants
    }


def _as_promised(net: NetSites) -> bool:
    promised = _promised(net)
    names = {name for segment in promised for name in (f"br{segment}", f"vgx{segment}")}
    rates = sorted(rate for rate in promised.values() if rate)
    return all(net.links(site) == names and net.guaranteed(site) == rates for site in net.sites) and all(
        net.whole(segment) for segment in promised
    )


def test_kills_at_any_moment_leave_what_was_promised(lab: Lab) -> None:
    rng = random.Random(15)
    programs = ["nrm", "nrm", *(site.name for site in lab.sites)]
    with net_sites(lab) as net:
        segments: list[int] = []
        for number in range(ROUNDS):
            victim = rng.choice(programs)
            for _ in range(3):
                with contextlib.suppress(VirtgridError):  # the manager is dead, or dies of the question
                    if segments and rng.random() < 0.4:
                        net.release(segments.pop(rng.randrange(len(segments))))
                    else:
                        rate = rng.choice([None, 1_000_000, 2_000_000])
                        segments.append(net.reserve(f"round-{number}", rate_bytes_s=rate))
                if victim in net.running and rng.random() < 0.6:
                    net.kill(victim)
            if victim not in net.running:
                net.start(victim)
        assert _promised(net), "something stands, or this shows nothing"
        until(lambda: _as_promised(net), "the hosts have what was promised")
        for segment in list(_promised(net)):
            if segment in segments:
                net.release(segment)
        until(lambda: _as_promised(net), "and what was given back is gone")
