"""Numbers of packet sockets (packet(7), linux/if_ether.h) that Python's ``socket`` does not name."""

from __future__ import annotations

from typing import Final

ETH_P_ALL: Final = 3
SOL_PACKET: Final = 263
SO_RCVBUFFORCE: Final = 33
#: For local experiments (IEEE 802): no stack answers it.
EXPERIMENTAL_ETHERTYPE: Final = 0x88B5
