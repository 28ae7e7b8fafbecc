"""Template trees: figure 3A of the paper. Built once on a host, shared read-only by all its sandboxes.

/usr and /opt are the host's own, so a template is only what stands beside them, and is taken from the
host too: its configuration of libraries, alternatives, certificates, locale and shells must fit its
/usr. Nothing secret is copied: a list says what is.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from virtgrid.core.errors import RefusedError, UsageError, VirtgridError
from virtgrid.grid.node import root

_DIRECTORIES: Final = {
    "dev": 0o755, "etc": 0o755, "etc/ssh": 0o755, "etc/virtgrid": 0o755, "home": 0o755, "media": 0o755,
    "mnt": 0o755, "opt": 0o755, "proc": 0o555, "root": 0o700, "run": 0o755, "run/lock": 0o1777,
    "run/sshd": 0o755, "srv": 0o755, "sys": 0o555, "tmp": 0o1777, "usr": 0o755, "var": 0o755,
    "var/cache": 0o755, "var/lib": 0o755, "var/log": 0o755, "var/spool": 0o755, "var/tmp": 0o1777,
}  # fmt: skip
_LINKS: Final = {"var/run": "/run", "var/lock": "/run/lock", "etc/mtab": "/proc/self/mounts"}
# Links of a host whose /bin lies in /usr; which of them there are differs.
_USR_LINKS: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
#: Taken from the host's /etc, where they are there.
_COPIED: Final = (
    "alternatives", "bash.bashrc", "bash_completion.d", "ca-certificates", "ca-certificates.conf",
    "debian_version", "default/locale", "environment", "environment.d", "fonts", "gai.conf", "host.conf",
    "inputrc", "java-11-openjdk", "java-17-openjdk", "ld.so.cache", "ld.so.conf", "ld.so.conf.d",
    "libibverbs.d", "localtime", "locale.alias", "locale.conf", "locale.gen", "login.defs", "magic",
    "mime.types", "modules", "modulefiles", "networks", "openmpi", "mpich", "os-release", "perl",
    "pki/ca-trust", "pki/tls", "pmix-mca-params.conf", "prrte-mca-params.conf", "profile", "profile.d",
    "protocols", "python3", "python3.11", "redhat-release", "rpc", "services", "shells", "skel",
    "slurm/plugstack.conf", "ssh/moduli", "ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone",
    "ucx", "vim", "X11/Xresources",
)  # fmt: skip
_ACCOUNTS: Final = """\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
_SHADOW: Final = "".join(f"{line.split(':')[0]}:*:19000:0:99999:7:::\n" for line in _ACCOUNTS.splitlines())
_GROUP: Final = "root:x:0:\ndaemon:x:1:\ntty:x:5:\nutmp:x:43:\nnogroup:x:65534:\n"
_NSSWITCH: Final = (
    "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nprotocols: files\n"
)
# PAM and its modules would ask the host's configuration about a user it does not know.
_SSHD_CONFIG: Final = """\
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin no
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
PrintLastLog no
AcceptEnv LANG LC_*
# An MPI start opens many at once.
MaxStartups 1000
MaxSessions 1000
LogLevel ERROR
Subsystem sftp internal-sftp
"""
_SSH_CONFIG: Final = """\
# Every host of the cluster is in known_hosts: one that is not is a stranger.
StrictHostKeyChecking yes
PasswordAuthentication no
GSSAPIAuthentication no
UpdateHostKeys no
"""
_INIT: Final = """\
#!/bin/sh
# The first process of a sandbox: limits, MTU, keys if nobody made them before, then sshd in its place.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
unset SANDBOX_USER SANDBOX_PLAIN SANDBOX_PROCESSES SANDBOX_WALLTIME_S SANDBOX_MTU
. /etc/virtgrid/parameters
if [ -n "$SANDBOX_MTU" ]; then ip link set dev eth0 mtu "$SANDBOX_MTU" || exit 1; fi
if [ -n "$SANDBOX_PROCESSES" ]; then
    # dash says -p, bash says -u
    (ulimit -u 99) 2>/dev/null && ulimit -u "$SANDBOX_PROCESSES" || ulimit -p "$SANDBOX_PROCESSES" || exit 1
fi
key=/etc/ssh/ssh_host_ed25519_key
[ -e $key ] || ssh-keygen -q -t ed25519 -N '' -C "$SANDBOX_USER" -f $key || exit 1
ssh=/home/$SANDBOX_USER/.ssh
if [ ! -e "$ssh/id_ed25519" ]; then
    ssh-keygen -q -t ed25519 -N '' -C "$SANDBOX_USER" -f "$ssh/id_ed25519" || exit 1
    cp "$ssh/id_ed25519.pub" "$ssh/authorized_keys"
    chmod 600 "$ssh/authorized_keys"
    chown --reference="$ssh" "$ssh"/*
fi
if [ -n "$SANDBOX_WALLTIME_S" ]; then
    # sshd ends at SIGTERM, and with the first process everything ends. The user cannot stop this clock.
    (exec >/dev/null 2>&1 </dev/null; sleep "$SANDBOX_WALLTIME_S"; kill -TERM 1; sleep 2; kill -INT 1) &
fi
# -r: connections are served by a fork, without starting the program again, which takes twice as long.
sshd='/usr/sbin/sshd -D -r -E /var/log/sshd.log'
# Without a user namespace the host's setuid programs belong to the real root.
[ -z "$SANDBOX_PLAIN" ] || exec setpriv --no-new-privs $sshd
exec $sshd
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """One that is built. made: when. files: how many it holds, size_bytes: what they take."""

    name: str
    path: str
    made: datetime
    files: int
    size_bytes: int


def build(name: str = "default", *, state: str = root.STATE, source: Path = Path("/")) -> Template:
    """Build the template from this host, or build it anew.

    Written beside its place and moved there when it is whole. Errors: UsageError, RefusedError (in use,
    or the host is of another kind), VirtgridError (the disk).
    """
    try:
        root.check_name(name, "template")
    except root.RootError as error:
        raise UsageError(error.what, hint=error.hint) from None
    for program, package in (("usr/sbin/sshd", "openssh-server"), ("usr/bin/ssh-keygen", "openssh-client")):
        if not (source / program).exists():
            raise RefusedError(f"this host has no /{program}", hint=f"apt-get install {package}")
    if not (source / "bin").is_symlink():
        raise RefusedError(
            "on this host /bin does not lie in /usr, and sandboxes share only /usr",
            hint="install the package usrmerge",
        )
    templates = Path(state, "templates")
    try:
        templates.mkdir(mode=0o755, parents=True, exist_ok=True)
        with _locked(templates):
            _refuse_in_use(name, state)
            fresh = templates / f".{name}.new"
            _clear(fresh)
            tree = fresh / "tree"
            tree.mkdir(mode=0o755, parents=True)
            _fill(tree, source)
            made = _measure(name, fresh, templates / name)
            note = {
                "name": name,
                "made": made.made.isoformat(),
                "files": made.files,
                "bytes": made.size_bytes,
            }
            (fresh / "template.json").write_text(json.dumps(note) + "\n")
            old = templates / f".{name}.old"
            _clear(old)
            if (templates / name).exists():
                (templates / name).rename(old)
            fresh.rename(templates / name)
            _clear(old)
    except OSError as error:
        raise VirtgridError(f"template '{name}' cannot be built", cause=str(error)) from error
    return made


def built(state: str = root.STATE) -> list[Template]:
    """The templates of this host that are whole."""
    found = []
    for mark in sorted(Path(state, "templates").glob("*/template.json")):
        if mark.parent.name.startswith("."):
            continue
        try:
            note = json.loads(mark.read_text())
            made = datetime.fromisoformat(note["made"])
            files, size = int(note["files"]), int(note["bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append(
            Template(name=mark.parent.name, path=str(mark.parent), made=made, files=files, size_bytes=size)
        )
    return found


def _fill(tree: Path, source: Path) -> None:
    tree.chmod(0o755)
    for name, mode in _DIRECTORIES.items():
        (tree / name).mkdir(parents=True, exist_ok=True)
        (tree / name).chmod(mode)
    for name, target in _LINKS.items():
        (tree / name).symlink_to(target)
    for name in _USR_LINKS:
        if (source / name).is_symlink():
            (tree / name).symlink_to((source / name).readlink())
    for name in _COPIED:
        _copy(source / "etc" / name, tree / "etc" / name)
    for name, text, mode in (
        ("passwd", _ACCOUNTS, 0o644),
        ("shadow", _SHADOW, 0o640),
        ("group", _GROUP, 0o644),
        ("nsswitch.conf", _NSSWITCH, 0o644),
        ("hosts", "127.0.0.1 localhost\n", 0o644),
        ("resolv.conf", "", 0o644),
        ("ssh/sshd_config", _SSHD_CONFIG, 0o644),
        ("ssh/ssh_config", _SSH_CONFIG, 0o644),
        ("virtgrid/init", _INIT, 0o755),
    ):
        path = tree / "etc" / name
        path.write_text(text)
        path.chmod(mode)


def _copy(source: Path, target: Path) -> None:
    """One entry of /etc: links as links, files only where everybody may read them, no devices."""
    try:
        found = source.lstat()
    except FileNotFoundError:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if stat.S_ISLNK(found.st_mode):
        target.symlink_to(source.readlink())
    elif stat.S_ISDIR(found.st_mode):
        target.mkdir(mode=0o755, exist_ok=True)
        for entry in sorted(source.iterdir()):
            _copy(entry, target / entry.name)
    elif stat.S_ISREG(found.st_mode) and found.st_mode & 0o004:
        shutil.copyfile(source, target, follow_symlinks=False)
        target.chmod(found.st_mode & 0o755)


def _measure(name: str, fresh: Path, place: Path) -> Template:
    sizes = [path.lstat().st_size for path in fresh.rglob("*") if not path.is_dir()]
    now = datetime.now(UTC).replace(microsecond=0)
    return Template(name=name, path=str(place), made=now, files=len(sizes), size_bytes=sum(sizes))


def _users(name: str, state: str) -> list[str]:
    """Sandboxes whose root lies over this template."""
    found = []
    for note in sorted(Path(root.sandboxes(state)).glob("*/note.template")):
        try:
            if note.read_text() == name:
                found.append(note.parent.name)
        except OSError:
            continue
    return found


def _clear(directory: Path) -> None:
    if directory.is_symlink():
        directory.unlink()
    elif directory.exists():
        shutil.rmtree(directory)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove(name: str, *, state: str = root.STATE) -> bool:
    """Remove a template; False when there is none. Errors: UsageError, RefusedError (in use)."""
    try:
        root.check_name(name, "template")
    except root.RootError as error:
        raise UsageError(error.what, hint=error.hint) from None
    templates = Path(state, "templates")
    if not templates.is_dir():
        return False
    with _locked(templates):
        _refuse_in_use(name, state)
        there = (templates / name).exists()
        for place in (templates / name, templates / f".{name}.new", templates / f".{name}.old"):
            _clear(place)
    return there


def _refuse_in_use(name: str, state: str) -> None:
    if users := _users(name, state):
        raise RefusedError(
            f"template '{name}' is in use by sandbox '{users[0]}'"
            + (f" and {len(users) - 1} more" if users[1:] else ""),
            hint="destroy them first, or build another template by giving it a name",
        )
