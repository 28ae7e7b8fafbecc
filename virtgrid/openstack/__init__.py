"""OpenStack: Nova's libvirt driver, gated. ``driver`` and ``options`` import its packages."""
