"""Connections to libvirt, on libvirt's own test driver: deadlines, errors in our words, events."""

from __future__ import annotations

import asyncio
import threading
import uuid as uuids
from collections.abc import AsyncIterator
from pathlib import Path

import libvirt
import pytest

from virtgrid.core.errors import DeadlineError, NotFoundError, PeerUnreachableError
from virtgrid.virt import connection
from virtgrid.virt.connection import Hypervisor, LibvirtError, LifecycleEvent, translate
from virtgrid.virt.domain import ABSENT, Domain, DomainState, look, position

URI = f"test://{Path(__file__).with_name('test-node.xml')}"
NOBODY = str(uuids.UUID(int=1))
NO_SOCKET = "qemu+unix:///system?socket=/nonexistent/libvirt-sock"


@pytest.fixture
async def hypervisor() -> AsyncIterator[Hypervisor]:
    """A fresh world of libvirt's test driver: one running domain named test."""
    async with await Hypervisor.open(URI, name="the test host") as opened:
        yield opened


async def test_a_domain_is_found_by_name_by_id_and_by_uuid(hypervisor: Hypervisor) -> None:
    by_name = await Domain.find(hypervisor, "test")
    by_uuid = await Domain.find(hypervisor, by_name.uuid)
    number = await by_name.call(lambda dom: dom.ID(), "ask")
    by_id = await Domain.find(hypervisor, str(number))
    assert {found.uuid for found in (by_name, by_uuid, by_id)} == {by_name.uuid}
    assert {found.name for found in (by_name, by_uuid, by_id)} == {"test"}


@pytest.mark.parametrize("reference", ["nobody", "999", NOBODY, "", "x" * 36, "-1", "test\n", "٣", "../test"])
async def test_an_unknown_domain_is_not_found_and_the_host_is_named(
    hypervisor: Hypervisor, reference: str
) -> None:
    with pytest.raises(NotFoundError) as caught:
        await Domain.find(hypervisor, reference)
    assert caught.value.exit_status == 4
    assert "the test host" in caught.value.what


async def test_positions_follow_what_is_done_to_the_domain(hypervisor: Hypervisor) -> None:
    domain = await Domain.find(hypervisor, "test")
    assert (await position(hypervisor, domain.uuid)).state is DomainState.RUNNING
    await domain.suspend()
    paused = await position(hypervisor, domain.uuid)
    assert str(paused) == "paused (user)"
    assert paused.active
    await domain.resume()
    await domain.destroy()
    gone = await position(hypervisor, domain.uuid)
    assert (gone.state, gone.persistent, gone.active) == (DomainState.SHUTOFF, True, False)
    assert await position(hypervisor, NOBODY) == ABSENT


async def test_a_fresh_look_is_none_when_the_host_does_not_answer() -> None:
    assert await look(NO_SOCKET, NOBODY) is None
    assert await look(URI, NOBODY) == ABSENT


async def test_the_xml_of_a_real_domain_is_read(hypervisor: Hypervisor) -> None:
    found = await (await Domain.find(hypervisor, "test")).xml()
    assert found.name == "test"
    assert found.memory_bytes == 8 << 30
    assert found.virt_type == "test"


async def test_a_call_that_hangs_is_given_up_and_so_is_its_connection() -> None:
    hypervisor = await Hypervisor.open(URI, name="the slow host")
    ended = threading.Event()
    try:
        with pytest.raises(DeadlineError, match="ask something") as caught:
            await hypervisor.call(lambda _: ended.wait(30), "ask something", deadline_s=0.05)
        assert caught.value.exit_status == 8
        assert not hypervisor.usable
        with pytest.raises(DeadlineError, match="ask again") as again:
            await hypervisor.call(lambda _: 1, "ask again")
        assert "given up" in (again.value.cause or "")
        await hypervisor.close()  # does not wait for it either
    finally:
        ended.set()


async def test_a_hanging_connection_does_not_hang_another() -> None:
    slow, quick = await Hypervisor.open(URI), await Hypervisor.open(URI)
    ended = threading.Event()
    try:
        hanging = asyncio.ensure_future(slow.call(lambda _: ended.wait(30), "hang", deadline_s=None))
        await asyncio.sleep(0)
        assert await quick.hostname()
        assert not hanging.done()
        ended.set()
        await hanging
    finally:
        ended.set()
        await quick.close()
        await slow.close()


async def test_calls_of_one_connection_run_in_its_one_thread_in_order(hypervisor: Hypervisor) -> None:
    seen: list[tuple[int, str]] = []

    def note(number: int) -> None:
        seen.append((number, threading.current_thread().name))

    await asyncio.gather(*(hypervisor.call(lambda _, n=n: note(n), "note") for n in range(20)))
    assert [number for number, _ in seen] == list(range(20))
    assert len({thread for _, thread in seen}) == 1
    assert threading.current_thread().name not in {thread for _, thread in seen}


async def test_a_libvirt_error_comes_in_our_words_with_libvirt_s_as_the_cause(hypervisor: Hypervisor) -> None:
    with pytest.raises(NotFoundError, match="cannot look up") as caught:
        await hypervisor.call(lambda raw: raw.lookupByName("nobody"), "cannot look up nobody")
    assert caught.value.cause
    with pytest.raises(LibvirtError, match="cannot define") as failed:
        await hypervisor.call(lambda raw: raw.defineXML("<domain/>"), "cannot define nothing")
    assert failed.value.number > 0
    assert failed.value.cause


async def test_an_error_of_our_own_code_comes_through_as_it_is(hypervisor: Hypervisor) -> None:
    with pytest.raises(ZeroDivisionError):
        await hypervisor.call(lambda _: 1 / 0, "divide")
    assert await hypervisor.hostname(), "and the connection goes on"


@pytest.mark.parametrize(
    "uri", [NO_SOCKET, "nonsense", "test:///nonexistent/file.xml", "qemu+bogus://x/system"]
)
async def test_a_host_that_cannot_be_reached_says_so(uri: str) -> None:
    with pytest.raises(PeerUnreachableError) as caught:
        await Hypervisor.open(uri)
    assert caught.value.exit_status == 8
    assert caught.value.cause
    assert caught.value.hint


async def test_lifecycle_events_are_heard_on_the_loop_until_the_connection_is_closed() -> None:
    heard: asyncio.Queue[LifecycleEvent] = asyncio.Queue()
    threads: set[str] = set()

    def handler(event: LifecycleEvent) -> None:
        threads.add(threading.current_thread().name)
        heard.put_nowait(event)

    async with await Hypervisor.open(URI) as hypervisor:
        await hypervisor.on_lifecycle(handler)
        domain = await Domain.find(hypervisor, "test")
        await domain.suspend()
        await domain.resume()
        async with asyncio.timeout(10):
            first, second = await heard.get(), await heard.get()
    assert (first.event, second.event) == (
        libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_RESUMED,
    )  # fmt: skip
    assert first.uuid == domain.uuid
    assert first.received_s <= second.received_s
    assert threads == {threading.current_thread().name}


async def test_closing_twice_is_no_error_and_later_calls_fail_at_once() -> None:
    hypervisor = await Hypervisor.open(URI)
    await hypervisor.close()
    await hypervisor.close()
    assert not hypervisor.usable
    with pytest.raises(DeadlineError):
        await hypervisor.hostname()


async def test_a_read_only_connection_changes_nothing() -> None:
    async with await Hypervisor.open(URI, readonly=True) as hypervisor:
        domain = await Domain.find(hypervisor, "test")
        with pytest.raises(LibvirtError):
            await domain.destroy()


async def test_a_round_trip_is_measured(hypervisor: Hypervisor) -> None:
    assert await hypervisor.round_trip_s() >= 0


class FakeLibvirtError(libvirt.libvirtError):
    """An error as libvirt raises it, with chosen numbers."""

    def __init__(self, number: int, domain: int, text: str) -> None:
        Exception.__init__(self, text)
        self.err = (number, domain, text, libvirt.VIR_ERR_ERROR, text, "", "", 0, 0)


@pytest.mark.parametrize(
    ("number", "domain", "kind"),
    [
        (libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_FROM_QEMU, NotFoundError),
        (libvirt.VIR_ERR_NO_STORAGE_VOL, libvirt.VIR_FROM_STORAGE, NotFoundError),
        (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_RPC, PeerUnreachableError),
        (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_RPC, PeerUnreachableError),
        (libvirt.VIR_ERR_GNUTLS_ERROR, libvirt.VIR_FROM_RPC, PeerUnreachableError),
        (libvirt.VIR_ERR_SYSTEM_ERROR, libvirt.VIR_FROM_QEMU, LibvirtError),
        (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_QEMU, LibvirtError),
    ],
)
def test_errors_of_the_way_there_are_told_from_errors_of_the_host(
    number: int, domain: int, kind: type
) -> None:
    translated = translate(FakeLibvirtError(number, domain, "the reason"), "what failed")
    assert type(translated) is kind
    assert translated.what == "what failed"
    assert translated.cause == "the reason"


def test_a_refused_certificate_comes_with_what_to_check() -> None:
    text = "authentication failed: Failed to verify peer's certificate"
    error = FakeLibvirtError(libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_FROM_RPC, text)
    assert "virt-pki-validate" in (translate(error, "cannot connect").hint or "")


def test_every_way_a_connection_ends_has_words() -> None:
    assert len(connection._CLOSE_REASONS) == libvirt.VIR_CONNECT_CLOSE_REASON_CLIENT + 1
