"""``[virtgrid]`` in nova.conf: which migrations wait for what, and for how long."""

from __future__ import annotations

from typing import Any, Final

from oslo_config import cfg

from virtgrid.core.errors import UsageError
from virtgrid.migration.policy import ON_TIMEOUT, Backoff, PolicyConfig

GROUP: Final = "virtgrid"
_DEFAULT: Final = PolicyConfig()

OPTIONS: Final = [
    cfg.BoolOpt(
        "hold",
        default=True,
        help="Hold the switchover of live migrations until the guest's connections permit it. False: as"
        " libvirt.LibvirtDriver.",
    ),
    cfg.StrOpt(
        "policy",
        default=_DEFAULT.name,
        choices=[
            ("strict", "only while no connection is unsuitable"),
            ("backoff", "none at first, more the longer it waits"),
            ("adaptive", "as few as will probably be seen again in the time that is left"),
        ],
        help="How many unsuitable connections are put up with.",
    ),
    cfg.FloatOpt(
        "max_wait",
        default=_DEFAULT.max_wait_s,
        min=0,
        max=7 * 86400,
        help="Seconds a migration is held at most; [libvirt] live_migration_completion_timeout counts too.",
    ),
    cfg.StrOpt(
        "on_timeout",
        default=_DEFAULT.on_timeout,
        choices=[
            ("release", "switch over all the same"),
            ("abort", "abort the migration; the instance stays"),
            ("hold", "hold until force-complete or abort"),
        ],
        help="What then.",
    ),
    cfg.IntOpt("backoff_start", default=_DEFAULT.backoff.start, help="backoff: permitted at first."),
    cfg.IntOpt(
        "backoff_deferrals",
        default=_DEFAULT.backoff.deferrals_per_step,
        help="backoff: intervals without success until the next step.",
    ),
    cfg.ListOpt(
        "backoff_steps",
        item_type=cfg.types.Integer(),
        default=list(_DEFAULT.backoff.steps),
        help="backoff: permitted after each step; the last one stays.",
    ),
    cfg.FloatOpt(
        "backoff_iteration", default=_DEFAULT.backoff.iteration_s, help="backoff: seconds of an interval."
    ),
    cfg.StrOpt(
        "capture_interface",
        default="tap*",
        help="Pattern, as of file names, of the host's device whose connections are followed: an instance's"
        " first that fits. An instance without one is migrated as by libvirt.LibvirtDriver.",
    ),
    cfg.IntOpt(
        "stall_timeout",
        default=30,
        min=5,
        max=86400,
        help="Seconds without a byte moved, or an answer of the destination, until a migration is aborted.",
    ),
    cfg.StrOpt(
        "gatekeeper",
        default="",
        help="Command that starts virtgrid-gatekeeper as root. Empty: itself where nova-compute is root, else"
        " 'sudo -n virtgrid-gatekeeper'.",
    ),
]
assert set(ON_TIMEOUT) == {"release", "abort", "hold"}


def register(conf: Any) -> None:
    conf.register_opts(OPTIONS, group=GROUP)


def list_opts() -> list[tuple[str, list[Any]]]:
    """For oslo-config-generator."""
    return [(GROUP, OPTIONS)]


def policy_of(conf: Any) -> PolicyConfig:
    """The gate's policy as configured. Errors: cfg.ConfigFileValueError, in the option's words."""
    chosen = conf[GROUP]
    try:
        return PolicyConfig(
            name=chosen.policy,
            max_wait_s=chosen.max_wait,
            on_timeout=chosen.on_timeout,
            backoff=Backoff(
                start=chosen.backoff_start,
                deferrals_per_step=chosen.backoff_deferrals,
                steps=tuple(chosen.backoff_steps),
                iteration_s=chosen.backoff_iteration,
            ),
        )
    except UsageError as error:
        raise cfg.ConfigFileValueError(f"nova.conf, [{GROUP}]: {error.what}") from error


def refuse_contradictions(conf: Any) -> None:
    """What cannot go together with a hold. Errors: cfg.ConfigFileValueError, with what to change."""
    libvirt = conf.libvirt
    reasons = {
        "live_migration_permit_auto_converge": (
            libvirt.live_migration_permit_auto_converge,
            "would throttle a guest for as long as it is held",
        ),
        "live_migration_permit_post_copy": (
            libvirt.live_migration_permit_post_copy,
            "is not supported together with a hold",
        ),
        "live_migration_parallel_connections": (
            libvirt.live_migration_parallel_connections > 1,
            "changes what a held QEMU lets out",
        ),
        "live_migration_tunnelled": (
            libvirt.live_migration_tunnelled,
            "hides QEMU's stream in libvirtd's",
        ),
    }
    for option, (is_set, why) in reasons.items():
        if is_set:
            raise cfg.ConfigFileValueError(
                f"nova.conf, [libvirt]: {option} {why}; leave it at its default,"
                f" or set hold = false in [{GROUP}]"
            )
