"""The root directory of a sandbox: made before its domain starts, gone after its end.

The `lxc` hook runs this file inside libvirtd's time, so it imports nothing but the standard library,
and of that only what loads in a millisecond or two (no pathlib, re, subprocess, dataclasses). It never
calls libvirt.

What is made below STATE/sandboxes/NAME (paper, figure 3; docs/design/0007):

    layer/            a tmpfs of limited size, the only place writes go to
      over/upper      figure 3B: the writable layer
      over/work       overlayfs's own
      ssh             figure 3D: shadows the user's ~/.ssh
      ready, started  marks: prepared; handed to a domain
    lower/            the template (figure 3A) with its owners shifted; unmounted once root stands
    root/             figure 3E without /usr, /opt and home, which the domain's XML binds over it

Everything can be asked for twice. Names come from whoever may define domains: each is checked here, and
every path is built from a checked name, so that nothing outside the state directory can be mounted.
"""

from __future__ import annotations

import os
import pwd

from virtgrid.grid.node import mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

STATE = "/var/lib/virtgrid"
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
USER_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")
ADDRESS_CHARACTERS = frozenset("0123456789abcdefABCDEF.:")
NAME_LIMIT = 64
USER_LIMIT = 32


class RootError(Exception):
    """The root of a sandbox cannot be made: a sentence. hint: what to do."""

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class Account:
    """The host's account whose files a sandbox shares."""

    __slots__ = ("gid", "home", "name", "uid")

    def __init__(self, *, name: str, uid: int, gid: int, home: str) -> None:
        self.name = name
        self.uid = uid
        self.gid = gid
        self.home = home


class RootRequest:
    """What a root is made from.

    user: the name inside. base: the host's id that is root inside; 0 without a user namespace.
    layer_bytes: room for writes. parameters: lines ``KEY=NUMBER`` for the first process.
    """

    __slots__ = (
        "account", "address", "base", "bridge", "layer_bytes", "name", "parameters", "template", "user",
    )  # fmt: skip

    def __init__(
        self,
        *,
        name: str,
        user: str,
        account: str,
        template: str,
        address: str,
        bridge: str,
        base: int,
        layer_bytes: int,
        parameters: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.user = user
        self.account = account
        self.template = template
        self.address = address
        self.bridge = bridge
        self.base = base
        self.layer_bytes = layer_bytes
        self.parameters = parameters


# --- names and places -----------------------------------------------------------------------


def check_name(text: str, what: str) -> str:
    """A name that is one path component and no option's separator, or RootError."""
    if not text or len(text) > NAME_LIMIT or not set(text) <= NAME_CHARACTERS or not text[0].isalnum():
        raise RootError(
            f"{text[:80]!r} cannot be the name of a {what}",
            f"letters, digits, '_', '.', '-', a letter or digit first, at most {NAME_LIMIT}",
        )
    return text


def check_user(text: str) -> str:
    """A user's name as useradd(8) takes it, not root, or RootError."""
    good = 0 < len(text) <= USER_LIMIT and set(text) <= USER_CHARACTERS and not text[0].isdigit()
    if not good or text[0] == "-" or text in RESERVED_USERS:
        raise RootError(
            f"{text[:80]!r} cannot be a user of a sandbox",
            f"lower-case letters, digits, '_', '-', a letter first, at most {USER_LIMIT}; not root",
        )
    return text


RESERVED_USERS = frozenset({"root", "daemon", "sshd", "nobody"})
"""Users every template has."""


def sandboxes(state: str = STATE) -> str:
    return f"{state}/sandboxes"


def home_of(name: str, state: str = STATE) -> str:
    """The directory of one sandbox."""
    return f"{sandboxes(state)}/{name}"


def template_tree(template: str, state: str = STATE) -> str:
    return f"{state}/templates/{template}/tree"


def template_mark(template: str, state: str = STATE) -> str:
    """Written last, so a tree beside it is whole."""
    return f"{state}/templates/{template}/template.json"


def account_of(name: str) -> Account:
    """The host's account. Errors: RootError when there is none, or it must not have a sandbox."""
    try:
        entry = pwd.getpwnam(name)
    except (KeyError, ValueError, UnicodeEncodeError):
        raise RootError(f"this host has no account {name[:80]!r}", "getent passwd lists them") from None
    if entry.pw_uid == 0:
        raise RootError(f"account {name!r} is root; sandboxes are for users")
    home = entry.pw_dir
    if not home.startswith("/") or any(ord(c) < 32 or ord(c) == 127 for c in home) or "/../" in f"{home}/":
        raise RootError(f"the home directory of {name!r}, {home!r}, cannot be shared")
    return Account(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid, home=home.rstrip("/") or "/")


# --- claims: one address, one range of ids, one sandbox -------------------------------------


def claim(key: str, name: str, state: str = STATE) -> None:
    """Take an address or a range of ids for a sandbox. Errors: RootError when another one has it.

    A claim of a sandbox that is gone does not count.
    """
    directory = f"{sandboxes(state)}/.claims"
    os.makedirs(directory, mode=0o711, exist_ok=True)
    path = f"{directory}/{key}"
    for _ in range(100):
        try:
            os.symlink(name, path)  # content and existence in one step
            return
        except FileExistsError:
            pass
        try:
            owner = os.readlink(path)
        except FileNotFoundError:
            continue
        if owner == name:
            return
        if os.path.lexists(home_of(owner, state)):
            kind, _, value = key.partition("=")
            raise RootError(f"{kind} {value.split('@')[0]} belongs to sandbox '{owner}'")
        _forget(path)
    raise RootError(f"claim {key} cannot be taken")


def _forget(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _release_claims(name: str, state: str) -> None:
    directory = f"{sandboxes(state)}/.claims"
    try:
        keys = os.listdir(directory)
    except FileNotFoundError:
        return
    for key in keys:
        try:
            if os.readlink(f"{directory}/{key}") == name:
                _forget(f"{directory}/{key}")
        except OSError:  # somebody else's, gone meanwhile
            continue


# --- making ---------------------------------------------------------------------------------


def check(request: RootRequest, state: str = STATE) -> Account:
    """Look at everything a root needs without touching anything. Errors: RootError."""
    check_name(request.name, "sandbox")
    check_user(request.user)
    check_name(request.template, "template")
    if not set(request.address) <= ADDRESS_CHARACTERS or (request.bridge and "/" in request.bridge):
        raise RootError(f"{request.address[:80]!r} on {request.bridge[:20]!r} is no address of a sandbox")
    account = account_of(request.account)
    overlap = request.base and request.base <= account.uid < request.base + 65536
    if not 0 <= request.base < 2**32 - 65536 or overlap or not 2**20 <= request.layer_bytes < 2**50:
        raise RootError(f"ids from {request.base} or a layer of {request.layer_bytes} bytes cannot be")
    if request.base and account.gid == 0:
        raise RootError(f"the group of account {account.name!r} is root")
    if not os.path.isfile(template_mark(request.template, state)):
        half = os.path.lexists(os.path.dirname(template_tree(request.template, state)))
        raise RootError(
            f"template '{request.template}' is {'only half built' if half else 'not built'} on this host",
            "virtgrid template build" + ("" if request.template == "default" else f" {request.template}"),
        )
    if os.path.islink(template_tree(request.template, state)):
        raise RootError(f"the tree of template '{request.template}' is a symbolic link")
    _check_home(account)
    return account


def _check_home(account: Account) -> None:
    try:
        found = os.lstat(account.home)
    except OSError as error:
        raise RootError(
            f"the home directory {account.home} of {account.name!r} cannot be shared: {error.strerror}"
        ) from None
    if found.st_mode & 0o170000 != 0o040000:
        raise RootError(f"the home directory {account.home} of {account.name!r} is no directory")
    if found.st_uid != account.uid:
        raise RootError(f"the home directory {account.home} of {account.name!r} belongs to somebody else")
    try:
        mode = os.lstat(f"{account.home}/.ssh").st_mode & 0o170000
    except FileNotFoundError:
        return
    except OSError as error:
        raise RootError(f"{account.home}/.ssh cannot be looked at: {error.strerror}") from None
    if mode != 0o040000:
        raise RootError(
            f"{account.home}/.ssh is {'a symbolic link' if mode == 0o120000 else 'no directory'},"
            " so it cannot be shadowed",
            "make it a directory",
        )


def prepare(
    request: RootRequest,
    *,
    bases: Iterable[int] = (),
    fill: Callable[[str, Account], None] | None = None,
    state: str = STATE,
) -> Account:
    """Make the root of a sandbox ready for its domain; one that is ready and unused is kept.

    bases: where its ids may begin, when that is to be chosen here; ``request.base`` says which it became.
    fill: writes more into the layer (its directory is the argument) before root is mounted.
    When it fails nothing is left. Errors: RootError.
    """
    account = check(request, state)
    here = home_of(request.name, state)
    os.makedirs(sandboxes(state), mode=0o711, exist_ok=True)
    if os.path.lexists(f"{here}/layer/ready") and not os.path.lexists(f"{here}/layer/started"):
        return account
    if os.path.lexists(here):
        release(request.name, state=state)  # half made, or its domain went without a release
    try:
        os.mkdir(here, 0o700)
    except FileExistsError:
        raise RootError(f"sandbox '{request.name}' is being made by somebody else") from None
    try:
        if request.address:
            claim(f"address={request.address}@{request.bridge}", request.name, state)
        if request.base:
            claim(f"ids={request.base}", request.name, state)
        elif bases:
            request.base = _first_free(bases, account, request.name, state)
        _build(request, account, here, fill, state)
    except BaseException as error:
        release(request.name, state=state)
        if isinstance(error, OSError):
            raise RootError(f"the root of sandbox '{request.name}' cannot be made: {error}") from error
        raise
    return account


def _first_free(bases: Iterable[int], account: Account, name: str, state: str) -> int:
    for base in bases:
        if base <= account.uid < base + 65536 or base <= account.gid < base + 65536:
            continue
        try:
            claim(f"ids={base}", name, state)
        except RootError:
            continue
        return base
    raise RootError("every range of ids for sandboxes is taken on this host")


def mark_started(name: str, state: str = STATE) -> None:
    """From now on the root belongs to a domain, and is not handed out a second time."""
    os.close(os.open(f"{home_of(name, state)}/layer/started", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def was_started(name: str, state: str = STATE) -> bool:
    """Has the root been handed to a domain? Also true of a root whose layer is gone."""
    layer = f"{home_of(name, state)}/layer"
    return os.path.lexists(f"{layer}/started") or not os.path.lexists(f"{layer}/ready")


def names(state: str = STATE) -> list[str]:
    """Sandboxes that have a directory."""
    return sorted(entry for entry in _entries(sandboxes(state)) if not entry.startswith("."))


def base_of(name: str, state: str = STATE) -> int:
    """The host's id that is root inside."""
    return os.stat(f"{home_of(name, state)}/layer").st_gid


def _build(
    request: RootRequest,
    account: Account,
    here: str,
    fill: Callable[[str, Account], None] | None,
    state: str,
) -> None:
    base = request.base
    # The mapped root goes through these to its root; other users of the host do not.
    os.chown(here, 0, base)
    os.chmod(here, 0o710)
    _Owner(0).file(f"{here}/note.template", request.template, 0o644)
    layer = f"{here}/layer"
    for directory in ("layer", "lower", "root"):
        os.mkdir(f"{here}/{directory}", 0o700)
    mounts.mount(
        "virtgrid", layer, "tmpfs", f"size={request.layer_bytes},nr_inodes=65536,mode=0710,uid=0,gid={base}"
    )
    own = _Owner(base)
    os.mkdir(f"{layer}/over", 0o700)
    own.directory(f"{layer}/over/upper")
    os.mkdir(f"{layer}/over/work", 0o700)
    os.mkdir(f"{layer}/ssh", 0o700)
    os.chown(f"{layer}/ssh", account.uid, account.gid)
    upper = f"{layer}/over/upper"
    for directory in ("home", f"home/{request.user}", "etc", "etc/ssh", "etc/virtgrid"):
        own.directory(f"{upper}/{directory}")
    tree = template_tree(request.template, state)
    for name, text in _identity(request, account, tree):
        own.file(f"{upper}/etc/{name}", text, 0o640 if name == "shadow" else 0o644)
    if fill is not None:
        fill(layer, account)
    _make_ssh_directory(account)
    if base:
        mounts.mount_shifted(tree, f"{here}/lower", base)
    lower = f"{here}/lower" if base else tree
    options = f"lowerdir={lower},upperdir={upper},workdir={layer}/over/work"
    mounts.mount("virtgrid", f"{here}/root", "overlay", options)
    mounts.unmount_all(f"{here}/lower")  # the overlay holds its own copy
    os.close(os.open(f"{layer}/ready", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


class _Owner:
    """Makes files that belong to root inside."""

    def __init__(self, base: int) -> None:
        self.base = base

    def directory(self, path: str) -> None:
        os.mkdir(path, 0o755)
        os.chmod(path, 0o755)
        os.chown(path, self.base, self.base)

    def file(self, path: str, text: str, mode: int) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, text.encode())
            os.fchmod(descriptor, mode)
            os.fchown(descriptor, self.base, self.base)
        finally:
            os.close(descriptor)


def _identity(request: RootRequest, account: Account, tree: str) -> Iterable[tuple[str, str]]:
    """The files below /etc that make a sandbox this one: (name, text).

    ``*`` in shadow, not ``!``: sshd takes the latter for a locked account and refuses its keys too.
    """

    def template(name: str) -> str:
        with open(f"{tree}/etc/{name}") as file:
            return file.read()

    user, inside = request.user, f"/home/{request.user}"
    yield "passwd", f"{template('passwd')}{user}:x:{account.uid}:{account.gid}:{user}:{inside}:/bin/bash\n"
    yield "shadow", f"{template('shadow')}{user}:*:19000:0:99999:7:::\n"
    yield "group", f"{template('group')}{user}:x:{account.gid}:\n"
    yield "hostname", f"{request.name}\n"
    own_line = f"{request.address} {request.name}\n" if request.address else ""
    yield "hosts", f"127.0.0.1 localhost\n::1 localhost ip6-localhost\n{own_line}"
    plain = () if request.base else ("SANDBOX_PLAIN=1",)
    lines = (f"SANDBOX_USER={user}", *plain, *request.parameters)
    yield "virtgrid/parameters", "".join(f"{line}\n" for line in lines)


def _make_ssh_directory(account: Account) -> None:
    """~/.ssh must exist to be shadowed. Made with the user's own rights: the home may be on a server."""
    if os.path.lexists(f"{account.home}/.ssh"):
        return
    old_gid = mounts.libc.setfsgid(account.gid)
    old_uid = mounts.libc.setfsuid(account.uid)  # of this thread only
    try:
        os.mkdir(f"{account.home}/.ssh", 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise RootError(f"{account.home}/.ssh cannot be made: {error.strerror}") from None
    finally:
        mounts.libc.setfsuid(old_uid)
        mounts.libc.setfsgid(old_gid)


# --- undoing --------------------------------------------------------------------------------


def release(name: str, *, state: str = STATE) -> bool:
    """Remove a sandbox's root, layer and claims, in whatever state they are; False when there was nothing.

    Only what this file makes is removed, and directories only when they are empty.
    """
    check_name(name, "sandbox")
    here = home_of(name, state)
    there = os.path.lexists(here)
    if there and os.path.islink(here):
        raise RootError(f"{here} is a symbolic link; it is left alone")
    for directory in ("root", "lower", "layer"):
        if there:
            mounts.unmount_all(f"{here}/{directory}")
            _remove(f"{here}/{directory}")
    if there:
        for entry in _entries(here):
            if entry.startswith("note."):  # left by the maker, see sandbox.py
                _forget(f"{here}/{entry}")
        _remove(here)
    _release_claims(name, state)
    return there


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _remove(directory: str) -> None:
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise RootError(f"{directory} cannot be removed: {error.strerror}") from None
