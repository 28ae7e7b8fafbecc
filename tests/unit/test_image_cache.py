"""The image cache: what has a key is whole, and is built once."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from virtgrid.core.errors import DeadlineError, LabError, UsageError
from virtgrid.lab import image
from virtgrid.lab.image import Progress, Recipe, cached_images, ensure_image, load_image

RECIPE = Recipe(kind="small", sources={"init": "aa"}, packages={"nginx": "1"}, binaries={"/bin/x": "bb"})


@dataclass
class FakeBuilder:
    """Writes three short files; ``meanwhile`` runs between them."""

    made_of: Recipe = RECIPE
    cmdline: str = "quiet"
    builds: list[Path] = field(default_factory=list)
    meanwhile: list[threading.Barrier | Exception] = field(default_factory=list)

    def recipe(self) -> Recipe:
        return self.made_of

    def build(self, into: Path, cache_dir: Path, progress: Progress) -> None:
        self.builds.append(into)
        (into / "kernel").write_bytes(b"k" * 10)
        (into / "initrd").write_bytes(b"i" * 20)
        for event in self.meanwhile:
            if isinstance(event, Exception):
                raise event
            event.wait(10)
        (into / "disk").write_bytes(b"d" * 30)


@pytest.mark.parametrize(
    "other",
    [
        Recipe(kind="debian", sources=RECIPE.sources, packages=RECIPE.packages, binaries=RECIPE.binaries),
        Recipe(kind="small", sources={"init": "ab"}, packages=RECIPE.packages, binaries=RECIPE.binaries),
        Recipe(kind="small", sources=RECIPE.sources, packages={"nginx": "2"}, binaries=RECIPE.binaries),
        Recipe(kind="small", sources=RECIPE.sources, packages=RECIPE.packages, binaries={"/bin/x": "bc"}),
        Recipe(kind="small", sources={"init2": "aa"}, packages=RECIPE.packages, binaries=RECIPE.binaries),
    ],
)
def test_the_key_changes_with_every_ingredient(other: Recipe) -> None:
    assert other.key != RECIPE.key


def test_the_key_does_not_depend_on_the_order_of_the_ingredients() -> None:
    one = Recipe(kind="small", sources={"a": "1", "b": "2"}, packages={}, binaries={})
    two = Recipe(kind="small", sources={"b": "2", "a": "1"}, packages={}, binaries={})
    assert one.key == two.key


def test_an_image_is_built_once_and_then_found(tmp_path: Path) -> None:
    builder = FakeBuilder()
    first = ensure_image("small", cache_dir=tmp_path, builder=builder)
    second = ensure_image("small", cache_dir=tmp_path, builder=builder)
    assert first == second
    assert len(builder.builds) == 1
    assert first.kernel.read_bytes() == b"k" * 10
    assert first.disk_virtual_bytes == 30
    assert cached_images(tmp_path) == [first]


def test_builders_at_the_same_time_give_one_image(tmp_path: Path) -> None:
    inside = threading.Barrier(2)
    builder = FakeBuilder(meanwhile=[inside])
    found: list[Path] = []

    def work() -> None:
        found.append(ensure_image("small", cache_dir=tmp_path, builder=builder).directory)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    inside.wait(10)  # one of them is in the middle of its build, the others are at the lock
    for thread in threads:
        thread.join(10)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(builder.builds) == 1


@pytest.mark.parametrize("accident", [RuntimeError("power cut"), LabError("no space")])
def test_a_failed_build_leaves_nothing_and_the_next_one_works(tmp_path: Path, accident: Exception) -> None:
    with pytest.raises(type(accident)):
        ensure_image("small", cache_dir=tmp_path, builder=FakeBuilder(meanwhile=[accident]))
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert ensure_image("small", cache_dir=tmp_path, builder=FakeBuilder()).key == RECIPE.key


def test_what_a_dead_builder_left_is_neither_used_nor_kept(tmp_path: Path) -> None:
    leftover = tmp_path / f"small-{RECIPE.key}.tmp-abcd"
    leftover.mkdir()
    (leftover / "kernel").write_bytes(b"half")
    assert cached_images(tmp_path) == []
    ensure_image("small", cache_dir=tmp_path, builder=FakeBuilder())
    assert not leftover.exists()


def test_a_damaged_image_is_built_again(tmp_path: Path) -> None:
    builder = FakeBuilder()
    first = ensure_image("small", cache_dir=tmp_path, builder=builder)
    first.initrd.write_bytes(b"short")
    assert load_image(first.directory) is None
    again = ensure_image("small", cache_dir=tmp_path, builder=builder)
    assert again.initrd.read_bytes() == b"i" * 20
    assert len(builder.builds) == 2


def test_an_incomplete_build_is_an_error_not_an_image(tmp_path: Path) -> None:
    class Forgetful(FakeBuilder):
        def build(self, into: Path, cache_dir: Path, progress: Progress) -> None:
            (into / "kernel").write_bytes(b"k")

    with pytest.raises(LabError, match="without its initrd, disk"):
        ensure_image("small", cache_dir=tmp_path, builder=Forgetful())
    assert cached_images(tmp_path) == []


def test_waiting_for_somebody_elses_build_has_an_end(tmp_path: Path) -> None:
    inside, done = threading.Barrier(2), threading.Barrier(2)
    slow = FakeBuilder(meanwhile=[inside, done])
    thread = threading.Thread(
        target=ensure_image, args=("small",), kwargs={"cache_dir": tmp_path, "builder": slow}
    )
    thread.start()
    inside.wait(10)
    with pytest.raises(DeadlineError):
        ensure_image("small", cache_dir=tmp_path, builder=FakeBuilder(), deadline_s=0.05)
    done.wait(10)
    thread.join(10)


def test_an_unknown_kind_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no guest image 'bsd'"):
        ensure_image("bsd", cache_dir=tmp_path)


def test_the_cache_directory_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VIRTGRID_CACHE_DIR", str(tmp_path))
    assert image.cache_dir_from_environment() == tmp_path
    monkeypatch.delenv("VIRTGRID_CACHE_DIR")
    assert image.cache_dir_from_environment() == Path("/var/cache/virtgrid/images")


def test_lists_are_refreshed_when_apt_does_not_know_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fake_run(argv: list[str], *, deadline_s: float) -> str:
        asked.append(argv[0])
        if asked == ["apt-cache"]:
            raise LabError("no packages found")
        return "Package: a\nVersion: 1.2\nDescription: long\n text: here\n\nPackage: b\nVersion: 3\n"

    monkeypatch.setattr(image, "run", fake_run)
    assert image.apt_versions(["a", "b"]) == {"a": "1.2", "b": "3"}
    assert asked == ["apt-cache", "apt-get", "apt-cache"]
