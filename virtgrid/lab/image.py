"""Guest images, cached by what they are made of.

An image is a directory ``KIND-KEY`` with ``kernel``, ``initrd``, ``disk`` and ``manifest.json``.
The key is a hash over the recipe: our own source files, the versions of the Debian packages and
the programs copied from the host. Somebody who has the key has the image, and nothing that was
only half built ever bears a key: it is built beside, under a lock, and renamed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from virtgrid.core.errors import DeadlineError, LabError, NotFoundError, UsageError

DEFAULT_CACHE_DIR: Final = Path("/var/cache/virtgrid/images")
GUESTFILES: Final = Path(__file__).with_name("guestfiles")
KINDS: Final = ("small", "debian")
MANIFEST: Final = "manifest.json"
DISK_UUID: Final = "6f1c2a57-2d8a-4c0b-9c6e-766972746764"

Progress = Callable[[str], None]


def silent(_line: str) -> None:
    """The progress of somebody who does not want to know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything an image's bytes depend on.

    sources: our files, name -> sha256. packages: Debian package -> version.
    binaries: files copied from the host, path -> sha256.
    """

    kind: str
    sources: Mapping[str, str]
    packages: Mapping[str, str]
    binaries: Mapping[str, str]

    @property
    def key(self) -> str:
        """16 hexadecimal digits, the same wherever the ingredients are."""
        text = json.dumps(
            [self.kind, dict(self.sources), dict(self.packages), dict(self.binaries)], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestImage:
    """A finished image. ``cmdline`` is what its kernel needs whatever the guest is for."""

    kind: str
    key: str
    directory: Path
    cmdline: str
    disk_virtual_bytes: int

    @property
    def kernel(self) -> Path:
        return self.directory / "kernel"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd"

    @property
    def disk(self) -> Path:
        """Raw, sparse, ext4: a template to be copied, never to be written to."""
        return self.directory / "disk"


class Builder(Protocol):
    """One kind of image."""

    cmdline: str

    def recipe(self) -> Recipe:
        """What the image would be made of now. Reads, and at most refreshes apt's lists."""
        ...

    def build(self, into: Path, cache_dir: Path, progress: Progress) -> None:
        """Put ``kernel``, ``initrd`` and ``disk`` into the directory."""
        ...


def cache_dir_from_environment() -> Path:
    """``VIRTGRID_CACHE_DIR``, or /var/cache/virtgrid/images."""
    return Path(os.environ.get("VIRTGRID_CACHE_DIR") or DEFAULT_CACHE_DIR)


def builder_for(kind: str) -> Builder:
    """The builder of ``small`` or ``debian``; UsageError for anything else."""
    # Imported here: the builders import this module's words.
    if kind == "small":
        from virtgrid.lab.image_small import SmallBuilder

        return SmallBuilder()
    if kind == "debian":
        from virtgrid.lab.image_debian import DebianBuilder

        return DebianBuilder()
    raise UsageError(f"there is no guest image '{kind}'", hint=f"one of: {', '.join(KINDS)}")


def ensure_image(
    kind: str,
    *,
    cache_dir: Path | None = None,
    progress: Progress = silent,
    deadline_s: float = 900.0,
    builder: Builder | None = None,
) -> GuestImage:
    """The image of this kind, from the cache or built now.

    Several callers at once get the same image, built once. ``deadline_s`` bounds the wait for
    somebody else's build. Errors: LabError when building fails, DeadlineError.
    """
    maker = builder or builder_for(kind)
    recipe = maker.recipe()
    key = recipe.key
    where = cache_dir or cache_dir_from_environment()
    final = where / f"{kind}-{key}"
    found = load_image(final)
    if found:
        return found
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(
            f"the image cache {where} cannot be made",
            cause=str(error),
            hint="run as root, or set VIRTGRID_CACHE_DIR to a directory of yours",
        ) from error
    with _locked(where / f"{kind}-{key}.lock", deadline_s, progress):
        found = load_image(final)
        if found:
            return found
        # We hold the lock of this key: what lies about under its name is of a builder that died.
        for leftover in where.glob(f"{kind}-{key}.tmp-*"):
            shutil.rmtree(leftover)
        if final.exists():
            shutil.rmtree(final)
        draft = Path(tempfile.mkdtemp(prefix=f"{kind}-{key}.tmp-", dir=where))
        try:
            progress(f"building the {kind} guest image {key} (once; then it is cached in {where})")
            maker.build(draft, where, progress)
            _write_manifest(draft, recipe, maker.cmdline)
            draft.chmod(0o755)  # mkdtemp makes it private; QEMU may run as another user
            draft.rename(final)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    built = load_image(final)
    if built is None:
        raise LabError(f"the image built in {final} does not load", hint="remove the directory, try again")
    progress(f"built {final}")
    return built


def load_image(directory: Path) -> GuestImage | None:
    """The image in this directory, or None when there is none or its files are not all there."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        complete = all(
            (directory / name).stat().st_size == size for name, size in manifest["files_bytes"].items()
        )
    except (OSError, ValueError, KeyError):
        return None
    if not complete:
        return None
    return GuestImage(
        kind=manifest["kind"],
        key=manifest["key"],
        directory=directory,
        cmdline=manifest["cmdline"],
        disk_virtual_bytes=manifest["files_bytes"]["disk"],
    )


def cached_images(cache_dir: Path | None = None) -> list[GuestImage]:
    """What the cache holds, sorted by directory name."""
    where = cache_dir or cache_dir_from_environment()
    return [image for path in sorted(where.glob("*-*/")) if (image := load_image(path))]


def _write_manifest(draft: Path, recipe: Recipe, cmdline: str) -> None:
    names = ("kernel", "initrd", "disk")
    missing = [name for name in names if not (draft / name).is_file()]
    if missing:
        raise LabError(f"the {recipe.kind} image was built without its {', '.join(missing)}")
    for name in names:
        (draft / name).chmod(0o644)
    manifest = {
        "kind": recipe.kind,
        "key": recipe.key,
        "cmdline": cmdline,
        "files_bytes": {name: (draft / name).stat().st_size for name in names},
        "sources": dict(recipe.sources),
        "packages": dict(recipe.packages),
        "binaries": dict(recipe.binaries),
    }
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


@contextmanager
def _locked(path: Path, deadline_s: float, progress: Progress) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel gives it back when we die."""
    start_s = time.monotonic()
    told = False
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited_s = time.monotonic() - start_s
                if waited_s > deadline_s:
                    raise DeadlineError(
                        f"somebody else has been building this image for {waited_s:.0f} s",
                        hint=f"see who holds {path} (fuser {path})",
                    ) from None
                if waited_s > 2 and not told:
                    progress("waiting for somebody else who builds the same image")
                    told = True
                time.sleep(0.1)
        yield


# --- what builders share --------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes; NotFoundError when it is not there."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is missing", hint="install the packages in packages.txt") from error


def run(argv: Sequence[str], *, deadline_s: float, cwd: Path | None = None, stdin: bytes = b"") -> str:
    """Run a program and give back its standard output. LabError with its last words if it fails."""
    try:
        done = subprocess.run(
            list(argv), cwd=cwd, input=stdin, capture_output=True, timeout=deadline_s, check=False
        )
    except FileNotFoundError as error:
        raise NotFoundError(
            f"the program '{argv[0]}' is missing", hint="install the packages in packages.txt"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise DeadlineError(f"'{argv[0]}' did not end within {deadline_s:.0f} s") from error
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines()
        raise LabError(
            f"'{' '.join(argv[:3])}' failed with status {done.returncode}", cause=" | ".join(words[-3:])
        )
    return done.stdout.decode(errors="replace")


def installed_version(package: str) -> str:
    """Version of a Debian package installed on this host."""
    try:
        text = run(["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", package], deadline_s=30)
    except LabError:
        text = ""
    state, _, version = text.partition(" ")
    if state != "installed":
        raise NotFoundError(
            f"the Debian package {package} is not installed", hint=f"apt-get install {package}"
        )
    return version


def apt_show(packages: Sequence[str]) -> dict[str, dict[str, str]]:
    """Control fields of apt's candidates, package -> field -> value.

    Refreshes the lists when they lack one of them: a fresh machine has no lists yet.
    """
    argv = ["apt-cache", "show", "--no-all-versions", *packages]
    try:
        return _stanzas(run(argv, deadline_s=60))
    except LabError:
        run(["apt-get", "-qq", "-o", "Acquire::Retries=3", "update"], deadline_s=300)
        return _stanzas(run(argv, deadline_s=60))


def apt_versions(packages: Sequence[str]) -> dict[str, str]:
    """Candidate versions, package -> version."""
    return {name: fields["Version"] for name, fields in apt_show(packages).items()}


def _stanzas(text: str) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for stanza in text.strip().split("\n\n"):
        fields: dict[str, str] = {}
        for line in stanza.splitlines():
            name, colon, value = line.partition(":")
            if colon and not line[0].isspace():
                fields[name] = value.strip()
        if "Package" in fields:
            found[fields["Package"]] = fields
    return found


def fetch_package(package: str, version: str, cache_dir: Path, progress: Progress) -> Path:
    """A package's .deb in the cache, downloaded from the host's own mirrors when it is not there.

    apt checks its signature chain; nothing is installed.
    """
    store = cache_dir / "packages"
    kept = store / f"{package}_{version.replace(':', '%3a')}.deb"
    if kept.is_file():
        return kept
    store.mkdir(parents=True, exist_ok=True)
    progress(f"downloading {package} {version}")
    argv = ["apt-get", "-qq", "-o", "Acquire::Retries=3", "download", f"{package}={version}"]
    with tempfile.TemporaryDirectory(prefix="download-", dir=store) as draft:
        # apt would like to download as its own user, which must be able to write here.
        Path(draft).chmod(0o777)
        try:
            run(argv, cwd=Path(draft), deadline_s=600)
        except LabError:
            # Lists that are older than the mirror point at a version that has gone.
            progress("refreshing apt's lists")
            run(["apt-get", "-qq", "-o", "Acquire::Retries=3", "update"], deadline_s=300)
            run(argv, cwd=Path(draft), deadline_s=600)
        (got,) = Path(draft).glob("*.deb")
        got.rename(kept)
    return kept


def make_ext4(disk: Path, *, tree: Path, size_bytes: int) -> None:
    """A sparse raw ext4 file system holding a directory tree, owned by root. Needs no privilege."""
    with disk.open("wb") as file:
        file.truncate(size_bytes)
    # The same bytes from the same tree: fixed identity, no lazily initialised tables (the guest's
    # kernel would write them later, in the middle of somebody's measurement).
    argv = ["mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=4", "-d", str(tree), "-U", DISK_UUID]
    argv += ["-E", "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0", str(disk)]
    run(argv, deadline_s=120)
