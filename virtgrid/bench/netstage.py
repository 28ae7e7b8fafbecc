"""What ``bench network`` measures on: two sites, cables between them, sandboxes and a guest at their ends."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from virtgrid.core.errors import DeadlineError, LabError
from virtgrid.lab import guest
from virtgrid.lab.guest import GuestSpec
from virtgrid.lab.image import GuestImage, ensure_image
from virtgrid.lab.image_small import install, pack_initramfs, shared_libraries
from virtgrid.lab.lab import Lab
from virtgrid.lab.network import VIRTGRID
from virtgrid.lab.site import Site
from virtgrid.lab.stage import Tell
from virtgrid.net import netns
from virtgrid.net.link import Links, Tunnel

PORT: Final = 5201
_IPERF: Final = Path("/usr/bin/iperf3")
_ACCOUNT, _UID = "bench", 5099
_BRIDGE, _VXLAN_BRIDGE = "bnet", "bvx"
_BARE: Final = ("192.168.77.1", "192.168.77.2")
_SANDBOX: Final = ("10.43.0.1", "10.43.0.2")
_VXLAN: Final = ("10.44.0.1", "10.44.0.2")
_PEER, _GUEST = "10.43.0.11", "10.43.0.12"
_VXLAN_MTU: Final = 1450
_GUEST_UP_S: Final = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """Two ends: how to run something at each, and where the far one listens. server None: it always does."""

    name: str
    address: str
    sender: tuple[str, ...]
    server: tuple[str, ...] | None

    @contextmanager
    def serving(self, port: int = PORT) -> Iterator[None]:
        """An iperf3 server at the far end, for one test."""
        if self.server is None:
            yield
            return
        words = [*self.server, str(_IPERF), "-s", "-1", "-p", str(port), "--forceflush"]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert server.stdout is not None
            said = []
            for line in server.stdout:
                said.append(line)
                if "listening" in line:
                    break
            else:
                raise LabError(f"iperf3 does not listen at the far end of {self.name}", cause="".join(said))
            yield
            with suppress(subprocess.TimeoutExpired):
                server.communicate(timeout=10)
        finally:
            server.kill()
            server.communicate()

    def client(self, words: Sequence[str], *, timeout_s: float) -> Mapping[str, Any]:
        """Run a test; iperf3's JSON. Errors: LabError, DeadlineError."""
        argv = [*self.sender, str(_IPERF), "-c", self.address, "-p", str(PORT), *words]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired as error:
            raise DeadlineError(f"iperf3 over {self.name} did not end in {timeout_s:g} s") from error
        try:
            return dict(json.loads(done.stdout))
        except ValueError:
            raise LabError(f"iperf3 over {self.name} failed", cause=done.stderr.strip() or None) from None


@contextmanager
def wires(lab: Lab, tell: Tell) -> Iterator[list[Wire]]:
    """bare, sandbox, vxlan and guest, ready to be measured."""
    alice, bob = lab.sites
    place = lab.layout.root / "bench"
    place.mkdir()
    place.chmod(0o755)
    _cables(alice, bob)
    with ExitStack() as undo:
        tell("template and sandboxes")
        alice.run([*VIRTGRID, "template", "build"], timeout_s=120)
        for number, site in enumerate((alice, bob)):
            _account(site, place / site.name)
            for name, bridge, address, mtu in (
                ("plain", _BRIDGE, _SANDBOX[number], 1500),
                ("vxlan", _VXLAN_BRIDGE, _VXLAN[number], _VXLAN_MTU),
            ):
                undo.enter_context(_sandbox(site, f"bench-{name}-{number}", bridge, f"{address}/24", mtu))
        tell("guest")
        image = _with_iperf(ensure_image("small", progress=tell), place / "image")
        spec = GuestSpec(name="netbench", address=_GUEST, gateway=_PEER, bridge=_BRIDGE)
        guest.boot(lab, bob.name, spec, image=image)
        undo.callback(guest.destroy, lab, bob.name, spec.name)
        _wait_listening(alice, _GUEST)
        here, there = tuple(alice.argv([])), tuple(bob.argv([]))
        yield [
            Wire(name="bare", address=_BARE[1], sender=here, server=there),
            _between(alice, bob, "sandbox", "plain", _SANDBOX[1]),
            _between(alice, bob, "vxlan", "vxlan", _VXLAN[1]),
            Wire(name="guest", address=_GUEST, sender=here, server=None),
        ]


def _between(alice: Site, bob: Site, name: str, sandbox: str, address: str) -> Wire:
    def inside(site: Site, number: int) -> tuple[str, ...]:
        return tuple(site.argv([*VIRTGRID, "sandbox", "exec", f"bench-{sandbox}-{number}", "--"]))

    return Wire(name=name, address=address, sender=inside(alice, 0), server=inside(bob, 1))


def _cables(alice: Site, bob: Site) -> None:
    """Two equal cables, one used bare and under the VXLAN, one between two bridges."""
    with Links(alice.netns) as here, Links(bob.netns) as there:
        for name in ("cab0", "cab1"):
            here.veth(name, peer=name, peer_namespace=bob.netns)
        for number, links in enumerate((here, there)):
            links.up("cab0")
            links.address("cab0", _BARE[number], 24)
            links.bridge(_BRIDGE)
            links.enslave("cab1", _BRIDGE)
            links.up("cab1")
            links.bridge(_VXLAN_BRIDGE)
            tunnel = Tunnel(vni=44, local=_BARE[number], remote=_BARE[1 - number])
            links.vxlan("vxb", tunnel, mtu=_VXLAN_MTU, alias="bench network")
            links.enslave("vxb", _VXLAN_BRIDGE)
            links.up("vxb")
        here.address(_BRIDGE, _PEER, 24)


def _account(site: Site, home: Path) -> None:
    """A user of this site alone: its /etc is the lab's."""
    home.mkdir()
    os.chown(home, _UID, _UID)
    line = f"{_ACCOUNT}:x:{_UID}:{_UID}::{home}:/bin/sh"
    site.run(["sh", "-c", f"echo {line} >>/etc/passwd"])


@contextmanager
def _sandbox(site: Site, name: str, bridge: str, address: str, mtu: int) -> Iterator[None]:
    words = [*VIRTGRID, "sandbox", "create", name, "--user", _ACCOUNT, "--address", address]
    site.run([*words, "--bridge", bridge, "--mtu", str(mtu)], timeout_s=60)
    try:
        yield
    finally:
        site.run([*VIRTGRID, "sandbox", "destroy", name], timeout_s=60, check=False)


def _with_iperf(image: GuestImage, place: Path) -> GuestImage:
    """The small guest with an iperf3 that listens: a second archive behind the first adds and replaces."""
    place.mkdir()
    with tempfile.TemporaryDirectory(dir=place) as text:
        root = Path(text) / "root"
        for file in (_IPERF, *shared_libraries(_IPERF)):
            install(file, root / file.relative_to("/"))
        init = (Path(guest.__file__).parent / "guestfiles/init").read_text()
        begin = f"nginx -c /etc/nginx.conf\n{_IPERF} -s -p {PORT} >/dev/null 2>&1 &\n"
        if "nginx -c /etc/nginx.conf\n" not in init:
            raise LabError("the small guest's init starts no nginx any more: where to put iperf3?")
        (root / "init").write_text(init.replace("nginx -c /etc/nginx.conf\n", begin))
        (root / "init").chmod(0o755)
        pack_initramfs(root, Path(text) / "more")
        with (place / image.initrd.name).open("wb") as out:
            for part in (image.initrd, Path(text) / "more"):
                with part.open("rb") as source:
                    shutil.copyfileobj(source, out)
    for file in (image.kernel, image.disk):
        (place / file.name).symlink_to(file)
    return replace(image, directory=place)


def _wait_listening(site: Site, address: str) -> None:
    end_s = time.monotonic() + _GUEST_UP_S

    def ask() -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as line:
            line.settimeout(2.0)
            with suppress(OSError):
                line.connect((address, PORT))
                return True
        return False

    while not netns.run_in(site.netns, ask):
        if time.monotonic() > end_s:
            raise DeadlineError(f"the guest's iperf3 did not listen within {_GUEST_UP_S:g} s")
        time.sleep(0.2)
