"""virtgrid: gated live migration over a WAN and grid sandboxes, on libvirt.

The rooms of the house, from the ground up: ``core`` (words everyone shares), ``config``,
``virt`` (libvirt), ``net`` (kernel networking), ``tracker`` (connections of a guest),
``migration``, ``report``, ``lab`` (several sites on one machine), ``bench``, ``cli``.
Arrows go down only; import-linter proves it. See docs/architecture.md.
"""

__version__ = "0.1.0"
