"""Seeded clients of a server host, each in a closed loop: think, do something, think again.

A process of its own in the clients' namespace: one thread per session. Every command is timed, from
the client's first byte to the last of the answer. It runs until its standard input ends, and prints
what it did as one JSON list on standard output.
"""

from __future__ import annotations

import ftplib
import http.client
import imaplib
import io
import json
import os
import poplib
import random
import smtplib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Final

from virtgrid.lab.servers import layout, mail
from virtgrid.lab.servers.ftp import INCOMING

#: Between two conversations of a session, and between two commands of one that a person steers; means.
BETWEEN_S: Final = 2.0
LOOKING_S: Final = 0.7
_TIMEOUT_S: Final = 30.0
#: What the mailboxes of POP3 and IMAP hold: bytes of each message.
MAILBOX_BYTES: Final = [2_000, 4_000, 8_000, 30_000, 120_000, 300_000]


def reader(session: int) -> str:
    """The mailbox of a session: each has its own, with MAILBOX_BYTES in it."""
    return f"reader{session}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command of a client. name: what it was, the same for equal work; times: CLOCK_MONOTONIC."""

    session: int
    name: str
    begin_s: float
    end_s: float
    ok: bool

    @property
    def took_s(self) -> float:
        return self.end_s - self.begin_s


class Session:
    """One client: its random numbers, its record, and the wish that it should end."""

    def __init__(self, number: int, seed: int, record: list[Command], ending: threading.Event) -> None:
        self.number = number
        self.random = random.Random(f"{seed}/{number}")  # noqa: S311 - a load, no secret
        self._record = record
        self._ending = ending

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time a command; one that fails is recorded too."""
        begin_s, ok = time.monotonic(), False
        try:
            yield
            ok = True
        finally:
            self._record.append(
                Command(session=self.number, name=name, begin_s=begin_s, end_s=time.monotonic(), ok=ok)
            )

    def think(self, mean_s: float) -> bool:
        """Wait for a while; False when it is time to end."""
        return not self._ending.wait(min(self.random.expovariate(1 / mean_s), 5 * mean_s))


def http_conversation(session: Session) -> None:
    """A page and its images on one connection, as a browser fetches them; then perhaps another page."""
    connection = http.client.HTTPConnection(layout.GUEST_V4, 80, timeout=_TIMEOUT_S)
    try:
        with session.timed("connect"):
            connection.connect()
        for _ in range(session.random.randint(1, 3)):
            for name in ("page", *["small"] * 3, "photo"):
                with session.timed(name):
                    connection.request("GET", f"/{name}")
                    connection.getresponse().read()
            if not session.think(LOOKING_S):
                return
    finally:
        connection.close()


def ftp_conversation(session: Session) -> None:
    """Somebody looks around and fetches or puts a few files."""
    ftp = ftplib.FTP(timeout=_TIMEOUT_S)  # noqa: S321 - what is measured
    try:
        with session.timed("connect"):
            ftp.connect(layout.GUEST_V4)
        with session.timed("login"):
            ftp.login()
        for _ in range(session.random.randint(2, 5)):
            if not session.think(LOOKING_S):
                return
            what = session.random.choice(["list", "small", "small", "photo", "photo", "put"])
            with session.timed(what):
                if what == "list":
                    ftp.nlst()
                elif what == "put":
                    ftp.storbinary(f"STOR {INCOMING}/{session.number}", io.BytesIO(bytes(100_000)))
                else:
                    ftp.retrbinary(f"RETR {what}", lambda _: None)
        with session.timed("quit"):
            ftp.quit()
    finally:
        ftp.close()


def pop3_conversation(session: Session) -> None:
    """A mail program asks for new mail and fetches some: one command after the other, no thinking."""
    with session.timed("connect"):
        box = poplib.POP3(layout.GUEST_V4, timeout=_TIMEOUT_S)
    try:
        with session.timed("user"):
            box.user(reader(session.number))
        with session.timed("pass"):
            box.pass_(mail.PASSWORD)
        with session.timed("stat"):
            count, _ = box.stat()
        with session.timed("list"):
            box.list()
        for number in sorted(session.random.sample(range(1, count + 1), session.random.randint(0, 3))):
            with session.timed(f"retr {number}"):
                box.retr(number)
        with session.timed("quit"):
            box.quit()
    finally:
        box.close()


def imap_conversation(session: Session) -> None:
    """A mail program logs in, lists the mailbox, and its reader reads; sometimes a draft is kept."""
    with session.timed("connect"):
        box = imaplib.IMAP4(layout.GUEST_V4, timeout=_TIMEOUT_S)
    try:
        with session.timed("login"):
            box.login(reader(session.number), mail.PASSWORD)
        with session.timed("select"):
            box.select(readonly=True)
        with session.timed("headers"):
            box.fetch(f"1:{len(MAILBOX_BYTES)}", "(FLAGS BODY.PEEK[HEADER])")
        for _ in range(session.random.randint(1, 4)):
            if not session.think(LOOKING_S):
                return
            number = session.random.randint(1, len(MAILBOX_BYTES))
            with session.timed(f"fetch {number}"):
                box.fetch(str(number), "(BODY.PEEK[])")
        if session.random.random() < 0.3:
            text = mail.message(session.number, 50_000)
            with session.timed("append"):
                box.append("INBOX", "", imaplib.Time2Internaldate(time.time()), text)
        with session.timed("logout"):
            box.logout()
    finally:
        box.shutdown()


def smtp_conversation(session: Session) -> None:
    """A mail program submits one or two messages."""
    with session.timed("connect"):
        server = smtplib.SMTP(timeout=_TIMEOUT_S, local_hostname="client.test")
        server.connect(layout.GUEST_V4, mail.SMTP_PORT)
    try:
        with session.timed("ehlo"):
            server.ehlo()
        for _ in range(session.random.randint(1, 2)):
            size = session.random.choice([2_000, 20_000, 200_000])
            with session.timed("mail"):
                server.mail("sender@client.test")
            with session.timed("rcpt"):
                server.rcpt("user@guest.test")
            with session.timed(f"data {size}"):
                server.data(mail.message(session.number, size))
        with session.timed("quit"):
            server.quit()
    finally:
        server.close()


CONVERSATIONS: Final[dict[str, Callable[[Session], None]]] = {
    "http": http_conversation,
    "ftp": ftp_conversation,
    "pop3": pop3_conversation,
    "imap": imap_conversation,
    "smtp": smtp_conversation,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientsWanted:
    """Which clients, and how many."""

    protocol: str
    sessions: int
    seed: int


def run(wanted: ClientsWanted, ending: threading.Event) -> list[Command]:
    """Run the sessions until the event is set; what they did."""
    conversation = CONVERSATIONS[wanted.protocol]
    record: list[Command] = []

    def live(number: int) -> None:
        session = Session(number, wanted.seed, record, ending)
        while session.think(BETWEEN_S):
            try:
                conversation(session)
            except (OSError, EOFError, *_REFUSED):
                # It is on the record as failed; the next conversation begins anew.
                continue

    threads = [threading.Thread(target=live, args=(number,)) for number in range(wanted.sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return record


_REFUSED: Final = (
    http.client.HTTPException,
    ftplib.Error,
    poplib.error_proto,
    imaplib.IMAP4.error,
    smtplib.SMTPException,
)


def main() -> None:
    ending = threading.Event()
    done: list[Command] = []

    def work() -> None:
        done.extend(run(ClientsWanted(**json.loads(sys.argv[1])), ending))

    worker = threading.Thread(target=work)
    worker.start()
    while os.read(0, 100):
        pass
    ending.set()
    worker.join()
    json.dump([asdict(one) for one in done], sys.stdout)


if __name__ == "__main__":
    main()
