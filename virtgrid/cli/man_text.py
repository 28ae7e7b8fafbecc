"""Words of the man pages and the command reference that no option says of itself."""

from __future__ import annotations

from typing import Final

BRIEF: Final = "live migration that waits for the guest's clients"

DESCRIPTION: Final = (
    "virtgrid migrates running libvirt/QEMU machines, disks included, and stops the guest only at a moment"
    " when its clients cannot notice. It follows every TCP connection of the guest, holds the last step of"
    " the migration while somebody waits for an answer, and lets it go when nobody does, or when the time"
    " allowed is up.",
    "Every migration keeps a journal. The live view, the list, the report and recovery all read it, so why a"
    " migration is waiting, or what it did, can be seen at any time and from any terminal.",
    "Commands that act on a host need root there. Everything that is printed for people can be had as JSON"
    " with --json. Times are written 300ms, 40s or 5m; sizes 4MiB or 8G; rates 100mbit (bits) or 12mbps"
    " (bytes).",
)

MIGRATE_DESCRIPTION: Final = (
    "Migrates a running domain to the libvirt at DESTURI. Option names and URIs are those of virsh migrate.",
    "Before anything is touched both hosts are asked, and what would make the migration fail is refused (exit"
    " status 3). Then disks and memory are copied while the guest runs. When little is left the switchover"
    " is held until the policy permits the moment: no connection, or few enough, on which a client waits."
    " At last the guest is asked, at its new place, whether it answers.",
    "The command follows the migration; a process of its own drives it. A closed terminal ends the view and"
    " not the migration. Ctrl-C ends the migration safely and says where the domain is.",
)

KEYS_HEAD: Final = "While the live view is shown:"
KEYS: Final = (
    ("r", "Release now, whatever the connections do."),
    ("a", "Abort; the domain stays on the source."),
    ("d", "Detach: the view ends, the migration goes on."),
    ("Ctrl-C", "As a. A second one also ends the view."),
)

REFUSED_HEAD: Final = "These options of virsh migrate are understood and refused, each with its reason:"

EXIT_STATUS: Final = (
    ("0", "Done."),
    ("1", "Failed. The domain is safe on the source; the message says so."),
    ("2", "The call's words are wrong. Nothing was touched."),
    ("3", "Refused before anything was touched: a check, the configuration, a definition file."),
    ("4", "Not found: no such domain, migration, lab or file."),
    ("5", "The hold's time was up and --on-timeout said abort; still on the source."),
    ("6", "Aborted on request; still on the source."),
    (
        "7",
        "It cannot be told where the domain is, run virtgrid migration recover; or what became of a"
        " reservation, ask again as the message says.",
    ),
    ("8", "The other side cannot be reached, or its certificate was refused."),
    ("130", "Interrupted."),
)

ENVIRONMENT: Final = (
    ("LIBVIRT_DEFAULT_URI", "The source's URI when -c is not given, as for virsh."),
    ("VIRTGRID_CONFIG", "A configuration file instead of /etc/virtgrid/virtgrid.toml."),
    ("VIRTGRID_STATE_DIR", "Where journals live, instead of /var/lib/virtgrid."),
    ("VIRTGRID_RUN_DIR", "Where locks and control sockets live, instead of /run/virtgrid."),
    (
        "VIRTGRID_GRC",
        "The coordinator to ask, instead of unix:/run/virtgrid/grc.sock; tls://HOST:PORT elsewhere.",
    ),
    ("VIRTGRID_PKI", "Where a user's certificate is, for a coordinator at tls://…, instead of ~/.pki."),
    ("VIRTGRID_LAB_NAME", "Which lab the lab commands mean."),
    ("VIRTGRID_LAB_DIR", "Where labs live, instead of /var/lib/virtgrid/labs."),
    ("VIRTGRID_CACHE_DIR", "Where guest images are cached, instead of /var/cache/virtgrid/images."),
    ("VIRTGRID_DEBUG", "1: show where in the program an unexpected error happened."),
    ("NO_COLOR", "No colours."),
)

FILES: Final = (
    ("/etc/virtgrid/virtgrid.toml", "Defaults of options."),
    ("/etc/virtgrid/protocols.d/*.pdl", "Protocol definitions of your own."),
    ("/etc/pki/CA, libvirt, qemu, virtgrid", "Certificates, where libvirt and QEMU look for theirs."),
    ("/var/lib/virtgrid/authority", "The authority that signs certificates, on its own host."),
    ("/var/lib/virtgrid/migrations/ID.jsonl", "The journal of a migration."),
)

EXAMPLES: Final = (
    ("virtgrid doctor qemu+tls://hostB/system", "What hostB lacks, and the command that mends it:"),
    ("virtgrid migration show web1", "Why the migration of web1 is waiting, or how it ended:"),
    ("virtgrid migration report web1 --html web1.html --png web1.png", "A report to send to somebody:"),
    ("virtgrid lab up --rate 100mbit --rtt 20ms", "Two sites on this machine, to try everything:"),
)

MIGRATE_EXAMPLES: Final = (
    (
        "virtgrid migrate web1 qemu+tls://hostB/system --copy-storage-all --persistent --undefinesource",
        "Move a machine with its disks for good:",
    ),
    (
        "virtgrid migrate web1 qemu+tls://hostB/system --copy-storage-all --dry-run",
        "Check everything and change nothing:",
    ),
    (
        "virtgrid migrate web1 qemu+tls://hostB/system --policy strict --max-wait 10m --on-timeout abort",
        "Only if not a single client would notice, and not at all otherwise:",
    ),
    (
        "virtgrid migrate web1 qemu+tls://hostB/system --detach; virtgrid migration wait web1",
        "In the background, and wait for its end:",
    ),
)

REFERENCE_HEAD: Final = """# Commands

This page is written from the program by `python -m virtgrid.cli.manpage`; a test keeps it current.
Every command also has `--help`. Times are written `300ms`, `40s` or `5m`; sizes `4MiB` or `8G`; rates
`100mbit` (bits) or `12mbps` (bytes). The same as man pages: [virtgrid(1)](../man/virtgrid.1),
[virtgrid-migrate(1)](../man/virtgrid-migrate.1); `man -l docs/man/virtgrid.1` shows them. For those who come
from virsh: [virsh-users](../howto/virsh-users.md).

Completion: `virtgrid --install-completion` for the shell it is called in (bash, zsh or fish), or
`virtgrid --show-completion` to see what that would add.
"""
