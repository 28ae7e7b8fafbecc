"""What the `qemu` hook does. hooks/README.md is the contract.

libvirtd waits for us: so only what is in the interpreter already, no libvirt, nothing that blocks. Never in
the way of a domain: that virtgridd did not hear of a step is a line in the log. Only ``migrate`` (a domain is
about to arrive) may refuse, when the host has a map of names that does not work.
"""

import _signal  # type: ignore[import-not-found]
import _socket
import posix
import sys
import time

NOTICE_SOCKET = "/run/virtgrid/notice.sock"
LOG_SOCKET = "/dev/log"
CONFIGURATION = "/etc/virtgrid/virtgrid.toml"
_PATIENCE_S = 0.02
_TURNS = 10
_ADAPT_DEADLINE_S = 0.9


def notice(name: str, operation: str, extra: str) -> bytes:
    """The datagram of hooks/README.md. name: of the domain, with whatever may stand in one."""
    if all(character.isalnum() or character in "-_.:+@" for character in name) and name.isascii():
        quoted = f'"{name}"'
    else:
        import json  # costs as much as all the rest, and hardly anybody needs it

        quoted = json.dumps(name)
    return (
        f'{{"v": 1, "driver": "qemu", "domain": {quoted}, "operation": "{operation}",'
        f' "sub_operation": "{extra}"}}'
    ).encode()


def post(data: bytes, path: "str | None" = None) -> "str | None":
    """Send it -> why virtgridd did not get it, or None. Waits at most ``_PATIENCE_S`` for a full queue."""
    line = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
    try:
        for turn in range(_TURNS):
            if turn:
                time.sleep(_PATIENCE_S / _TURNS)
            try:
                line.sendto(data, path or NOTICE_SOCKET)
            except BlockingIOError:  # ten wait there already: net.unix.max_dgram_qlen
                continue
            except (FileNotFoundError, ConnectionRefusedError):
                return "virtgridd does not run"
            except OSError as error:
                return f"virtgridd cannot be told: {error.strerror}"
            return None
        return "virtgridd does not take notices: it hangs, or has more than it can do"
    finally:
        line.close()


def log(text: str, path: "str | None" = None) -> None:
    """One line to syslog, as daemon.warning (RFC 3164); lost when nobody takes it."""
    line = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
    try:
        line.sendto(
            f"<28>virtgrid-hook[{posix.getpid()}]: {text}".encode(errors="replace"), path or LOG_SOCKET
        )
    except OSError:
        sys.stderr.write(f"virtgrid-hook: {text}\n")
    finally:
        line.close()


def _too_late(*_: object) -> None:
    sys.stderr.write("virtgrid: the arriving domain could not be adapted in time\n")
    sys.stderr.flush()
    posix._exit(1)


def _adapted() -> int:
    """The arriving domain's XML to standard output, if it is to be changed. 1: refused, with a sentence."""
    _signal.signal(_signal.SIGALRM, _too_late)
    _signal.setitimer(_signal.ITIMER_REAL, _ADAPT_DEADLINE_S)
    from virtgrid.host import incoming

    try:
        maps = incoming.configured(CONFIGURATION)
        if maps is not None:
            changed = incoming.adapt(sys.stdin.buffer.read(incoming.LIMIT_BYTES + 1), maps)
            if changed is not None:
                sys.stdout.buffer.write(changed)
                sys.stdout.buffer.flush()
    except incoming.IncomingError as error:
        sys.stderr.write(f"virtgrid: {error}\n")
        return 1
    return 0


def main() -> int:
    """``NAME OPERATION SUB-OPERATION``, as libvirt's hook protocol has them."""
    name, operation, extra = sys.argv[1], sys.argv[2], sys.argv[3]
    why = post(notice(name, operation, extra))
    if why is not None:
        log(f"{name}: {operation} {extra} was not told: {why}")
    if operation == "migrate" and posix.access(CONFIGURATION, posix.R_OK):
        return _adapted()
    return 0


if __name__ == "__main__":
    sys.exit(main())
