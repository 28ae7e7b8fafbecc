"""What the shell offers after the Tab key, beyond words the program knows by itself.

A completion may never hang or speak: what does not answer within a second is nothing.
"""

from __future__ import annotations

import os
import subprocess
from itertools import islice
from typing import Final

from virtgrid.core import journal

_DEADLINE_S: Final = 1.0
_MOST: Final = 50


def domains(incomplete: str) -> list[str]:
    """Names of running domains, as virsh tells them for ``$LIBVIRT_DEFAULT_URI``."""
    uri = os.environ.get("LIBVIRT_DEFAULT_URI", "qemu:///system")
    try:
        told = subprocess.run(
            ["virsh", "-q", "-r", "-c", uri, "list", "--name"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    names = [line.strip() for line in told.stdout.splitlines()]
    return [name for name in names if name and name.startswith(incomplete)]


def migrations(incomplete: str) -> list[str]:
    """Ids of the newest migrations, and the domains they moved."""
    try:
        ids = [path.stem for path in islice(journal.newest_first(), _MOST)]
    except OSError:
        return []
    names = dict.fromkeys(migration_id.partition("-")[2] for migration_id in ids)
    return [word for word in (*names, *ids) if word.startswith(incomplete)]
