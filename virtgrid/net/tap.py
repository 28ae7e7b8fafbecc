"""TAP devices whose frames carry a virtio-net header, made inside a named namespace."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

from virtgrid.net import netns

_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNSETVNETHDRSZ: Final = 0x400454D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x2, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6, _TUN_F_TSO_ECN = 1, 2, 4, 8
VNET_HEADER_BYTES: Final = 10


def open_tap(namespace: str, name: str, *, offload: bool = True) -> int:
    """A TAP in the namespace; returns its non-blocking descriptor. The TAP lives as long as that.

    Frames carry a virtio-net header of VNET_HEADER_BYTES. With ``offload`` the kernel hands
    over unsegmented frames of up to 64 KB with checksums left open, as between two guests.
    """

    def make() -> int:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
            fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            fcntl.ioctl(descriptor, _TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_BYTES))
            offloads = _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6 | _TUN_F_TSO_ECN
            fcntl.ioctl(descriptor, _TUNSETOFFLOAD, offloads if offload else 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    return netns.run_in(namespace, make)
