"""Where services of a host listen unless they are told otherwise."""

from __future__ import annotations

from typing import Final

VIRTGRIDD: Final = "unix:/run/virtgrid/host.sock"
GRC: Final = "unix:/run/virtgrid/grc.sock"
