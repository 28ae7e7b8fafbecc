"""Configuration: TOML files -> frozen models; every value knows where it came from.

``/etc/virtgrid/virtgrid.toml`` (or the file $VIRTGRID_CONFIG names) sets the defaults of options;
the command line overrides it. A file with a mistake is refused as a whole, naming file and key.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from virtgrid.core.errors import RefusedError

DEFAULT_PATH: Final = Path("/etc/virtgrid/virtgrid.toml")
_SIZE_LIMIT_BYTES: Final = 1 << 20


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BackoffSection(_Section):
    """``[migration.backoff]``: the ladder; times as text with a unit."""

    start: int = 0
    deferrals: int = 4
    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    iteration: str = "2.5s"


class AdaptiveSection(_Section):
    """``[migration.adaptive]``: what optimal stopping aims at (docs/reference/policies.md)."""

    confidence: float = 0.7
    ceiling: float = 0.05
    learn: str = "5s"
    memory: str = "2m"


class MigrationSection(_Section):
    """``[migration]``: defaults of ``virtgrid migrate``."""

    policy: str = "backoff"
    max_wait: str = "40s"
    on_timeout: str = "release"
    max_downtime: str = "300ms"
    large: str = "4MiB"
    stall_timeout: str = "30s"
    verify_timeout: str = "10s"
    bandwidth: str | None = None
    backoff: BackoffSection = BackoffSection()
    adaptive: AdaptiveSection = AdaptiveSection()


class DnsSection(_Section):
    """``[dns]``: who changes names, and the file with the key (docs/reference/dns.md)."""

    server: str | None = None
    key: str | None = None


class LimitsSection(_Section):
    """``[quota.of."WHO"]``: what one user may have where it is not what everybody may."""

    reservations: int | None = None
    node_time: str | None = None
    bandwidth: str | None = None


class QuotaSection(_Section):
    """``[quota]``: what a user of a coordinator may have at a time (docs/reference/co-allocation.md)."""

    reservations: int = 100
    node_time: str = "unlimited"
    bandwidth: str = "unlimited"
    of: dict[str, LimitsSection] = {}


class DestinationSection(_Section):
    """``[queue.destination.NAME]``: where virtgridd may migrate domains to (docs/reference/queue.md)."""

    uri: str
    site: str | None = None
    link: str | None = None
    slots: int = 2
    copy_storage: Literal["all", "inc", "none"] = "none"
    migrate_uri: str | None = None
    tls: bool = False
    tls_destination: str | None = None


class LinkSection(_Section):
    """``[queue.link.NAME]``: what destinations share. bandwidth: of all its slots together."""

    slots: int = 2
    bandwidth: str | None = None


class QueueSection(_Section):
    """``[queue]``: virtgridd's migrations on this host (docs/reference/queue.md)."""

    slots: int = 4
    attempts: int = 5
    retry: str = "10s"
    to: str | None = None
    name: str | None = None
    site: str | None = None
    destination: dict[str, DestinationSection] = {}
    link: dict[str, LinkSection] = {}


class IncomingSection(_Section):
    """``[incoming]``: what is called otherwise on this host (hooks/README.md)."""

    bridges: dict[str, str] = {}
    paths: dict[str, str] = {}


class Config(_Section):
    """The whole file."""

    migration: MigrationSection = MigrationSection()
    dns: DnsSection = DnsSection()
    quota: QuotaSection = QuotaSection()
    queue: QueueSection = QueueSection()
    incoming: IncomingSection = IncomingSection()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A configuration and the file it was read from (None: nothing but defaults)."""

    config: Config
    path: Path | None

    def origin(self, *keys: str) -> str:
        """Where a value came from: the file's path, or ``default``."""
        section: BaseModel = self.config
        for key in keys[:-1]:
            if key not in section.model_fields_set:
                return "default"
            section = getattr(section, key)
        return str(self.path) if keys[-1] in section.model_fields_set else "default"


def load(path: Path | None = None) -> Loaded:
    """Read the configuration. Errors: RefusedError naming file and place; a missing file is none."""
    configured = os.environ.get("VIRTGRID_CONFIG")
    chosen = path or (Path(configured) if configured else DEFAULT_PATH)
    try:
        if chosen.stat().st_size > _SIZE_LIMIT_BYTES:
            raise RefusedError(f"{chosen} is too large for a configuration")
        data = tomllib.loads(chosen.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if configured or path:
            raise RefusedError(
                f"there is no configuration {chosen}", hint="VIRTGRID_CONFIG names it"
            ) from None
        return Loaded(config=Config(), path=None)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RefusedError(f"{chosen} is not TOML: {error}") from error
    except OSError as error:
        raise RefusedError(f"{chosen} cannot be read", cause=error.strerror) from error
    try:
        return Loaded(config=Config.model_validate(data), path=chosen)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = "an unknown key" if first["type"] == "extra_forbidden" else first["msg"].lower()
        raise RefusedError(
            f"{chosen}: {key}: {known}", hint="docs/reference/configuration.md lists the keys"
        ) from error
