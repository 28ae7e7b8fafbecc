"""What nova-compute does of a live migration at the source, without a control plane; run where Nova is.

Standard input: one JSON line with what to migrate and the options of nova.conf, then commands a line each
(``abort``, ``force-complete``), given to the driver as Nova's compute manager does. Standard output: JSON
lines of what happens. The post and recover methods are where Nova's manager would go on.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from typing import Any

os.environ["OS_NOVA_DISABLE_EVENTLET_PATCHING"] = "1"

from nova.db.main import api as database
from nova.db.main import models
from oslo_log import log

from nova import conf as nova_conf
from nova import context, objects
from nova.virt import driver as virt_driver
from nova.virt import virtapi

CONF = nova_conf.CONF


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def configure(options: dict[str, dict[str, Any]], state: str) -> None:
    """As a nova.conf would; written as one, so that names and values are read as Nova reads them."""
    path = f"{state}/nova.conf"
    with open(path, "w", encoding="utf-8") as file:
        for group, values in options.items():
            file.write(f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in values.items()))
    log.register_options(CONF)
    CONF([], project="nova", default_config_files=[path])
    log.setup(CONF, "nova")


def records(ctx: Any, asked: dict[str, Any]) -> tuple[Any, Any]:
    """(The instance, its migration) as Nova's database has them."""
    flavor = objects.Flavor(
        id=1, name="f", flavorid="1", memory_mb=asked["memory_mib"], vcpus=1, root_gb=1, ephemeral_gb=0,
        swap=0, rxtx_factor=1.0, vcpu_weight=0, disabled=False, is_public=True, extra_specs={},
    )  # fmt: skip
    instance = objects.Instance(
        ctx, uuid=asked["uuid"], project_id="p", user_id="u", host="alice", vm_state="active",
        task_state="migrating", system_metadata={}, metadata={}, flavor=flavor, old_flavor=None,
        new_flavor=None, numa_topology=None, vcpus=1, memory_mb=asked["memory_mib"], root_gb=1,
        ephemeral_gb=0,
    )  # fmt: skip
    instance.create()
    instance.migration_context = None
    migration = objects.Migration(
        ctx, instance_uuid=asked["uuid"], source_compute=asked["source"], dest_compute=asked["dest"],
        status="running", migration_type="live-migration", memory_total=0, memory_processed=0,
        memory_remaining=0, disk_total=0, disk_processed=0, disk_remaining=0,
    )  # fmt: skip
    migration.create()
    return instance, migration


def migrate_data(asked: dict[str, Any], migration: Any) -> Any:
    """As pre_live_migration at the destination leaves it, but for ports: this Nova knows no Linux bridge, so
    the instance's interfaces stay as they are.
    """
    return objects.LibvirtLiveMigrateData(
        block_migration=True, migration=migration, target_connect_addr=asked["dest"],
        serial_listen_addr="", serial_listen_ports=[], graphics_listen_addr_vnc=None,
        graphics_listen_addr_spice=None, bdms=[], supported_perf_events=[], is_shared_block_storage=False,
        is_shared_instance_path=False,
    )  # fmt: skip


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    configure(asked["options"], asked["state"])
    objects.register_all()
    database.configure(CONF)
    ctx = context.get_admin_context()
    models.BASE.metadata.create_all(database.get_engine())
    driver = virt_driver.load_compute_driver(virtapi.VirtAPI(), CONF.compute_driver)
    # init_host also looks after host topology and tells Placement; of it what a migration needs.
    driver._host._set_host_enabled = lambda *_, **__: None
    driver._host.initialize()
    driver._parse_migration_flags()
    tell(event="loaded", driver=f"{type(driver).__module__}.{type(driver).__name__}")
    instance, migration = records(ctx, asked)

    def post(*_: Any, **__: Any) -> None:
        tell(event="post")

    def recover(*_: Any, **named: Any) -> None:
        tell(event="recover", status=named.get("migration_status", "error"))

    def commands() -> None:
        for line in sys.stdin:
            try:
                if line.strip() == "abort":
                    driver.live_migration_abort(instance)
                elif line.strip() == "force-complete":
                    driver.live_migration_force_complete(instance)
                tell(event="done", command=line.strip())
            except Exception as error:
                tell(event="failed", command=line.strip(), text=str(error))

    threading.Thread(target=commands, daemon=True).start()
    error = None
    try:
        driver.live_migration(
            ctx, instance, asked["dest"], post, recover, True, migrate_data(asked, migration)
        )
    except Exception as failure:
        error = str(failure)
        traceback.print_exc()
    row = objects.Migration.get_by_id(ctx, migration.id)
    tell(
        event="end", error=error, memory_total=row.memory_total, memory_processed=row.memory_processed,
        memory_remaining=row.memory_remaining, disk_total=row.disk_total, status=row.status,
    )  # fmt: skip
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        # Nova's threads would keep a program that has failed.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
