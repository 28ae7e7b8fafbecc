"""``compute_driver = virtgrid.VirtgridDriver``: Nova looks for its drivers below ``nova.virt`` only."""

from virtgrid.openstack.driver import VirtgridDriver

__all__ = ["VirtgridDriver"]
