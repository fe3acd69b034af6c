"""What is asked of the kernel about a client's TCP: how much it may hold unsent, when it gives up, what the peer took.

Where a system does not know one of these, the server does without.
"""

import array
import asyncio
import socket
import struct
import sys

from wsserver.liveness import Traffic

if sys.platform == "linux":
    import fcntl
    import termios

# How much may lie in the kernel unsent. The rest waits in the outbox, where it merges and a cancel can drop it.
UNSENT_BYTES = 16_384

# Whether `traffic` can tell.
TELLS_TRAFFIC = sys.platform == "linux"


def set_options(transport: asyncio.Transport, user_timeout: float) -> None:
    """Bound what the kernel holds unsent, and let it give up a peer that takes nothing for `user_timeout` seconds."""
    accepted: socket.socket = transport.get_extra_info("socket")
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(user_timeout * 1000))


def traffic(transport: asyncio.Transport) -> Traffic:
    """Give what went through an open connection so far; on Linux."""
    accepted: socket.socket = transport.get_extra_info("socket")
    # The fields tcpi_bytes_acked and tcpi_bytes_received of Linux's struct tcp_info.
    told = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    acknowledged, received = struct.unpack_from("=QQ", told, 120)
    waiting = array.array("i", [0])
    fcntl.ioctl(accepted.fileno(), termios.TIOCOUTQ, waiting)
    return Traffic(acknowledged, received, waiting[0] + transport.get_write_buffer_size())
