"""Fixtures: one server host with every server for the whole run, and a follower of its connections."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from virtgrid.lab.servers import ftp, mail, web
from virtgrid.lab.servers.host import ServerHost, obstacle

pytest.register_assert_rewrite("following")
# The checker lives beside the public captures.
sys.path.append(str(Path(__file__).parents[1] / "captures"))

from following import Following, until_quiet  # noqa: E402 - only now are its assertions explained
from mailboxes import SIZES  # noqa: E402
from own_server import App  # noqa: E402

_numbers = itertools.count()


@pytest.fixture(scope="session")
def servers_possible() -> None:
    """Skip, with the reason, where a server host cannot be."""
    if reason := obstacle():
        pytest.skip(reason)


@pytest.fixture
def host_name(servers_possible: None) -> str:
    """A name no other host has."""
    return f"{os.getpid()}x{next(_numbers)}"


@pytest.fixture(scope="session")
def hosts(servers_possible: None) -> Iterator[Callable[[bool], ServerHost]]:
    """Server hosts with nginx, Apache, vsftpd, Dovecot and Exim, made when first asked for.

    The argument: whether the guest's kernel leaves segmentation to others, as guests do. Frames are of
    up to 64 KB then, of which a ring keeps the beginning: what follows a body within one is not seen.
    """
    with ExitStack() as stack:

        @cache
        def make(offload: bool) -> ServerHost:
            name = f"{os.getpid()}{'l' if offload else 's'}"
            host = stack.enter_context(ServerHost(name, offload=offload))
            host.start(
                web.nginx(host.directory),
                web.apache(host.directory),
                ftp.vsftpd(host.directory),
                mail.dovecot(host.directory),
                mail.exim(host.directory),
            )
            return host

        yield make


@pytest.fixture
def mtu_frames() -> None:
    """For tests that use it ``host`` is one whose frames are no larger than a wire's."""


@pytest.fixture
def host(hosts: Callable[[bool], ServerHost], request: pytest.FixtureRequest) -> ServerHost:
    """The server host of the test."""
    return hosts("mtu_frames" not in request.fixturenames)


@pytest.fixture(scope="session")
def app(hosts: Callable[[bool], ServerHost]) -> Iterator[App]:
    """The test's own server beside the real ones, for what those cannot be told to do."""
    with hosts(True).in_guest(lambda: App(web.BACKEND_PORT)) as app:
        yield app


@pytest.fixture
def user(host: ServerHost) -> str:
    """A user whose mailbox holds messages of SIZES."""
    name = f"user{next(_numbers)}"
    mail.fill_mailbox(host.directory, name, SIZES)
    return name


@pytest.fixture
def following(host: ServerHost, tmp_path: Path) -> Iterator[Following]:
    """The live tracker on the tap. What it saw is recorded, and replayed at the test's end."""
    until_quiet(host)
    with Following.on(host, tmp_path / "conversation.pcap") as following:
        yield following
    following.check_replay()
