"""Dovecot (POP3, IMAP) and Exim (SMTP) on a server host, each with a private configuration."""

from __future__ import annotations

import shutil
from email.message import EmailMessage
from pathlib import Path
from typing import Final

from virtgrid.lab.servers.host import Server, certificate

POP3_PORT: Final = 110
IMAP_PORT: Final = 143
POP3S_PORT: Final = 995
IMAPS_PORT: Final = 993
SMTP_PORT: Final = 25
PASSWORD: Final = "secret"  # noqa: S105 - of mailboxes that live for the length of a test
#: To this recipient Exim takes a second over its answer: a server that thinks.
SLOW_RECIPIENT: Final = "slow@guest.test"
#: A message this large is above the tracker's threshold of 4 MiB.
LARGE_BYTES: Final = 6 << 20

_DOVECOT: Final = """
base_dir = {dir}/run
state_dir = {dir}/state
log_path = {dir}/dovecot.log
protocols = imap pop3
listen = *, ::
disable_plaintext_auth = no
auth_mechanisms = plain login
ssl = yes
ssl_cert = <{pem}
ssl_key = <{key}
mail_location = maildir:{dir}/mail/%u
first_valid_uid = 1
mail_max_userip_connections = 1000
imap_idle_notify_interval = 29 mins
service imap-login {{
  chroot =
  inet_listener imap {{
    port = {imap}
  }}
  inet_listener imaps {{
    port = {imaps}
  }}
}}
service pop3-login {{
  chroot =
  inet_listener pop3 {{
    port = {pop3}
  }}
  inet_listener pop3s {{
    port = {pop3s}
  }}
}}
service anvil {{
  chroot =
  # no memory of refused logins: it would make later ones wait
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
passdb {{
  driver = static
  args = password={password}
}}
userdb {{
  driver = static
  args = uid=mail gid=mail home={dir}/mail/%u
}}
"""

# What is accepted is thrown away behind the answer: no delivery, no process that outlives the session.
_EXIM: Final = """
primary_hostname = guest.test
qualify_domain = guest.test
spool_directory = {dir}/spool
log_file_path = {dir}/%s.log
pid_file_path = {dir}/exim.pid
daemon_smtp_ports = {smtp}
local_interfaces = <; 0.0.0.0 ; ::0
tls_certificate = {pem}
tls_privatekey = {key}
tls_advertise_hosts = *
pipelining_advertise_hosts = *
chunking_advertise_hosts = *
smtp_accept_max = 200
smtp_accept_max_per_connection = 100000
message_size_limit = 64M
host_lookup =
rfc1413_hosts =
helo_try_verify_hosts =
smtp_load_reserve = 1000
queue_only_load = 1000
smtp_enforce_sync = true
trusted_users = root
keep_environment =
acl_smtp_rcpt = check_recipient
acl_smtp_data = check_data

begin acl
check_recipient:
  deny    recipients = nobody@guest.test
  warn    recipients = {slow}
          delay = 1s
  accept
check_data:
  discard
"""


def dovecot(directory: Path) -> Server:
    """Dovecot: POP3 and IMAP, each plain (with STARTTLS) and with TLS, of both address families."""
    own = directory / "dovecot"
    own.mkdir()
    pem, key = certificate(own)
    configuration = _DOVECOT.format(
        dir=own, pem=pem, key=key, imap=IMAP_PORT, imaps=IMAPS_PORT, pop3=POP3_PORT, pop3s=POP3S_PORT,
        password=PASSWORD,
    )  # fmt: skip
    return Server(
        name="dovecot",
        argv=("dovecot", "-F", "-c", str(own / "dovecot.conf")),
        ports=(POP3_PORT, IMAP_PORT, POP3S_PORT, IMAPS_PORT),
        files={own / "dovecot.conf": configuration.lstrip()},
        directories={own / "run": None, own / "state": None, own / "mail": "mail"},
        log=own / "dovecot.log",
    )


def exim(directory: Path) -> Server:
    """Exim: SMTP with PIPELINING, CHUNKING and STARTTLS, of both address families."""
    own = directory / "exim"
    own.mkdir()
    pem, key = certificate(own)
    # It reads the key after it has given up root.
    shutil.chown(key, "Debian-exim")
    configuration = _EXIM.format(dir=own, pem=pem, key=key, smtp=SMTP_PORT, slow=SLOW_RECIPIENT)
    return Server(
        name="exim",
        argv=("exim4", "-bdf", "-C", str(own / "exim.conf")),
        ports=(SMTP_PORT,),
        files={own / "exim.conf": configuration.lstrip()},
        directories={own: "Debian-exim", own / "spool": "Debian-exim"},
        log=own / "main.log",
    )


def message(number: int, body_bytes: int) -> bytes:
    """A message of about so many bytes, lines ending with CR LF; the same number gives the same one."""
    mail = EmailMessage()
    mail["From"] = "sender@client.test"
    mail["To"] = "user@guest.test"
    mail["Subject"] = f"message {number}"
    mail["Message-ID"] = f"<{number}@client.test>"
    line = f"{number:08d} " + "x" * 60 + "\n"
    mail.set_content(line * max(1, body_bytes // len(line)))
    return mail.as_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


def fill_mailbox(directory: Path, user: str, sizes_bytes: list[int]) -> None:
    """Give a user of Dovecot's messages of about these sizes, in this order."""
    box = directory / "dovecot" / "mail" / user
    for name in ("cur", "new", "tmp"):
        (box / name).mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes_bytes, 1):
        (box / "cur" / f"{1_700_000_000 + number}.M{number}.guest:2,").write_bytes(message(number, size))
    for path in (box, *box.rglob("*")):
        shutil.chown(path, "mail", "mail")
