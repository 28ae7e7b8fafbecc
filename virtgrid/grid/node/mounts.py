"""The mounts of a sandbox's root, by system calls: Python's ``os`` has none of them.

Part of what the hook loads: the standard library only, see root.py. Each raises OSError.
"""

from __future__ import annotations

import ctypes
import errno
import os

_MS_NOSUID, _MS_NODEV = 2, 4
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_AT_FDCWD, _AT_EMPTY_PATH = -100, 0x1000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_IDMAP = 0x00100000
# The same numbers on every architecture (they were added after the tables were unified).
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442

libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str, target: str, kind: str, options: str) -> None:
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
    arguments = (os.fsencode(source), os.fsencode(target), kind.encode(), flags, os.fsencode(options))
    _check(libc.mount(*arguments), f"mount {kind} on {target}")


def unmount_all(target: str) -> None:
    """Unmount whatever is mounted there, all of it; nothing there is fine."""
    while libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW) == 0:
        pass
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOENT):
        raise OSError(number, f"unmount {target}: {os.strerror(number)}")


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns", ctypes.c_uint64),
    )


def _user_namespace(base: int, count: int) -> int:
    """A descriptor of a user namespace that maps the first ``count`` ids to ``base`` and up.

    Only a process of one thread can make one. A program is spawned for it instead of forking: the fork of
    a process as large as virtgridd takes three times as long as all this. It ends when its input does.
    """
    asked, ask = os.pipe()
    answer, answered = os.pipe()
    try:
        os.write(ask, b"x")
        child = os.posix_spawnp(
            "unshare",
            ("unshare", "--user", "cat"),
            {"PATH": "/usr/bin:/bin"},
            file_actions=(
                (os.POSIX_SPAWN_DUP2, asked, 0),
                (os.POSIX_SPAWN_DUP2, answered, 1),
                (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
            ),
        )
        os.close(answered)
        answered = -1
        try:
            if os.read(answer, 1) != b"x":
                raise OSError(errno.EPERM, "the kernel makes no user namespace")
            for which in ("uid_map", "gid_map"):
                with open(f"/proc/{child}/{which}", "w") as file:
                    file.write(f"0 {base} {count}")
            return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
    finally:
        for descriptor in (asked, ask, answer, answered):
            if descriptor >= 0:
                os.close(descriptor)


def mount_shifted(source: str, target: str, base: int) -> None:
    """Bind ``source`` over ``target`` with the owners 0-65535 shown as ``base`` and up (mount_setattr(2))."""
    namespace = _user_namespace(base, 65536)
    tree = -1
    try:
        flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC
        tree = _check(libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), flags), "open_tree")
        wanted = _MountAttributes(set=_MOUNT_ATTR_IDMAP, userns=namespace)
        size = ctypes.c_size_t(ctypes.sizeof(wanted))
        done = libc.syscall(_SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(wanted), size)
        _check(done, "shift the owners of the template")
        place = os.fsencode(target)
        moved = libc.syscall(_SYS_MOVE_MOUNT, tree, b"", _AT_FDCWD, place, _MOVE_MOUNT_F_EMPTY_PATH)
        _check(moved, f"mount on {target}")
    finally:
        os.close(namespace)
        if tree >= 0:
            os.close(tree)
