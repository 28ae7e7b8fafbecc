"""libvirt and QEMU. The only room that imports libvirt; everyone else sees our words."""
