"""A pilot at one site, its CRM at the other, and between them a network, TLS and nothing shared."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from gridsite import GridSite, last_lines

from virtgrid.grid.node import template
from virtgrid.lab.lab import Lab
from virtgrid.wire import seal
from virtgrid.wire.endpoint import Endpoint

pytestmark = pytest.mark.lab
NAME, CRM = "r42-t", Endpoint.parse("tls://alice:7430")

#: A CRM with one pilot, in alice's namespaces, with the certificate the lab gave it.
_CRM_PROGRAM = """
import asyncio, json, sys
from pathlib import Path
from virtgrid.grid.claims import Claims
from virtgrid.grid.messages import ticket as tickets
from virtgrid.grid.messages.node import Exec, HostEntry, Init, SetKeys, State
from virtgrid.grid.pilots import Pilots
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.identity import Role
from virtgrid.wire.pki.places import SYSTEM, Places
from virtgrid.wire.seal import read_private_key
from virtgrid.wire.tls import Tls

where, name, key_file, claims, init = sys.argv[1:]
key = read_private_key(Path(key_file))

async def main():
    tls = Tls(Places(SYSTEM).files(Role.CRM), pilots=tickets.issuer(key, "alice").certificate)
    async with Pilots(
        Endpoint.parse(where), [key.public_key()], tls=tls, claims=Claims(Path(claims))
    ) as pilots:
        print("ready", flush=True)
        pilot = await pilots.pilot(name)
        asked = Init.model_validate_json(init)
        await pilot.init(asked)
        await pilot.until(State.HOST_READY)
        keys = (await pilot.get_keys()).model_dump()
        await pilot.set_keys(SetKeys(hosts=(HostEntry(hostname=name, address=asked.address, **keys),)))
        await pilot.run()
        await pilot.until(State.RUNNING)
        ran = await pilot.exec(Exec(argv=("hostname",)))
        await pilot.shut_down()
        await pilot.until(State.DONE)
        print(json.dumps({"said": ran.stdout.decode(), "states": list(pilot.history)}), flush=True)
        await asyncio.sleep(1e6)  # until it is ended: the pilot must have heard that it was heard

asyncio.run(main())
"""


@pytest.fixture
def node(mended_lab: Lab) -> Iterator[GridSite]:
    """bob, with a virtgridd that knows the CRM's key."""
    home = Path(tempfile.mkdtemp(prefix=f"vg{os.getpid()}-"))
    home.chmod(0o755)
    template.build()
    alice, bob = mended_lab.sites
    made = GridSite(bob, home, seal.new_key())
    try:
        made.furnish(alice)
        made.start_virtgridd()
        yield made
    finally:
        made.end()
        made.unfurnish()
        shutil.rmtree(home)


def test_a_sandbox_is_led_over_the_network(mended_lab: Lab, node: GridSite) -> None:
    alice, home = mended_lab.sites[0], node.home
    seal.write_private(home / "crm.key", seal.private_text(node.key))
    words = [str(CRM), NAME, str(home / "crm.key"), str(home / "claims"), node.init(1).model_dump_json()]
    crm = subprocess.Popen(
        alice.argv([sys.executable, "-c", _CRM_PROGRAM, *words]),
        stdout=subprocess.PIPE, stderr=(home / "crm.log").open("ab"),
    )  # fmt: skip
    try:
        assert crm.stdout is not None
        assert crm.stdout.readline() == b"ready\n", last_lines([home / "crm.log"])
        node.ticket(NAME, site="alice")
        pilot = node.start_pilot(NAME, CRM)
        told = crm.stdout.readline()
        assert told, last_lines([home / "crm.log", home / f"{NAME}.log"])
        assert json.loads(told)["said"] == f"{NAME}\n"
        assert json.loads(told)["states"][-1] == "DONE"
        assert pilot.wait(30) == 0
        asyncio.run(node.until_nothing_left())
    finally:
        crm.kill()
        crm.wait(30)
