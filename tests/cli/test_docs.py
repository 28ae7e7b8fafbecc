"""The documents keep their word: links lead somewhere, generated pages are current, nothing is left out."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from virtgrid.cli import man_text, manpage
from virtgrid.cli.migrate import REFUSED
from virtgrid.config import Config
from virtgrid.core.errors import VirtgridError

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *DOCS.rglob("*.md"),
        ROOT / "hooks" / "README.md",
        ROOT / "xml-templates" / "README.md",
    ]
)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def _anchors(text: str) -> set[str]:
    """The anchors a page's headings get where it is shown."""
    titles = re.findall(r"^#+ (.*)$", _without_code(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    broken = []
    for target in _LINK.findall(_without_code(page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        if not there.exists() or (anchor and anchor not in _anchors(there.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


def test_every_page_is_reached_from_the_readme() -> None:
    seen, ahead = set[Path](), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        for target in _LINK.findall(_without_code(page.read_text(encoding="utf-8"))):
            if not target.startswith("http"):
                ahead.append((page.parent / target.partition("#")[0]).resolve())
    assert set(DOCS.rglob("*.md")) <= seen


@pytest.mark.parametrize("name", sorted(manpage.pages()))
def test_a_generated_page_is_current(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == manpage.pages()[name], (
        "python -m virtgrid.cli.manpage writes it again"
    )


@pytest.mark.parametrize("name", ["man/virtgrid.1", "man/virtgrid-migrate.1"])
def test_a_man_page_has_only_requests_that_are_known(name: str) -> None:
    known = {"TH", "SH", "SS", "PP", "TP", "RS", "RE", "nf", "fi", "nh", "ad"}
    lines = (DOCS / name).read_text(encoding="utf-8").splitlines()
    requests = [line[1:].split()[0] for line in lines if line.startswith(".") and not line.startswith('.\\"')]
    assert set(requests) <= known
    assert not [line for line in lines if line.startswith("'") or not line]
    assert requests.count("nf") == requests.count("fi")
    assert requests.count("RS") == requests.count("RE")
    escapes = set(re.findall(r"\\(f[BIR]|\(..|.)", "\n".join(lines)))
    assert escapes <= {"fB", "fI", "fR", "(->", "(cq", "(aq", "(ga", "e", "-", "&", '"'}


@pytest.mark.parametrize("name", ["man/virtgrid.1", "man/virtgrid-migrate.1"])
def test_a_man_page_renders_without_a_warning(name: str) -> None:
    if not (groff := shutil.which("groff")):
        pytest.skip("groff is not installed; the requests are checked by the test above")
    ran = subprocess.run(
        [groff, "-man", "-Tascii", "-ww", str(DOCS / name)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert ran.returncode == 0
    assert not ran.stderr
    assert "EXIT STATUS" in re.sub("\x1b\\[[0-9;]*m|.\x08", "", ran.stdout)


@pytest.mark.parametrize(
    ("text", "roff"),
    [(".profile", "\\&.profile"), ("a-b", "a\\-b"), ("C:\\x", "C:\\ex"), ("'quoted'", "\\(aqquoted\\(aq")],
)
def test_no_text_becomes_a_request_of_roff(text: str, roff: str) -> None:
    assert manpage.escape(text) == roff


def test_every_exit_status_of_an_error_is_told() -> None:
    def family(kind: type[VirtgridError]) -> Iterator[type[VirtgridError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from family(child)

    told = {status for status, _ in man_text.EXIT_STATUS}
    ours = {
        str(kind.exit_status) for kind in family(VirtgridError) if kind.__module__.startswith("virtgrid.")
    }
    assert ours <= told
    howto = (DOCS / "howto" / "virsh-users.md").read_text(encoding="utf-8")
    assert told == set(re.findall(r"^\| (\d+) \|", howto, re.M))


def test_every_option_of_migrate_is_told_to_users_of_virsh() -> None:
    howto = (DOCS / "howto" / "virsh-users.md").read_text(encoding="utf-8")
    (migrate,) = (noun for noun in manpage.tree().below if noun.words[1] == "migrate")
    options = [name for one in migrate.parameters if not one.argument for name in one.names]
    names = [*options, *(f"--{name.replace('_', '-')}" for name in REFUSED)]
    assert [name for name in names if name not in howto and not name.startswith("--backoff-")] == []


def _keys(model: type[BaseModel], section: str = "") -> Iterator[tuple[str, str, object]]:
    for key, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{section}.{key}".lstrip("."))
        else:
            yield section, key, info.default


def test_every_key_of_the_configuration_is_told_with_its_default() -> None:
    page = (DOCS / "reference" / "configuration.md").read_text(encoding="utf-8")
    told = {}
    for title, body in re.findall(r"^## `\[(.+?)\]`\n(.*?)(?=^## )", page, re.M | re.S):
        for key, default in re.findall(r"^\| `(\w+)` \| (.+?) \|", body, re.M):
            text = default.strip("`")
            told[title, key] = None if text == "(none)" else tomllib.loads(f"value = {text}")["value"]
    wanted = {
        (section, key): list(default) if isinstance(default, tuple) else default
        for section, key, default in _keys(Config)
    }
    assert told == wanted


def test_the_example_of_a_configuration_is_one() -> None:
    page = (DOCS / "reference" / "configuration.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```toml\n(.*?)^```", page, re.M | re.S):
        Config.model_validate(tomllib.loads(block))


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    page = (DOCS / "design" / "0001-dependencies.md").read_text(encoding="utf-8")
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    names = [re.split(r"[<>=~! ]", wish)[0] for wish in wanted]
    assert [name for name in names if name not in page] == []


@pytest.mark.parametrize("page", sorted((DOCS / "design").glob("*.md")), ids=lambda page: page.stem)
def test_every_decision_has_the_same_sections(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.match(r"# \d{4}: ", text)
    assert text.startswith(f"# {page.stem[:4]}: ")
    assert re.search(r"^Created: \d{4}-\d\d-\d\d · Status: (accepted|replaced by .+)$", text, re.M)
    assert re.findall(r"^## (.*)$", text, re.M) == [
        "Current state and shortcomings",
        "Decision",
        "Why, and why not otherwise",
    ]


def test_the_pictures_are_small_and_can_be_drawn_again(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_pictures", DOCS / "images" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    drawn = make.live_svg(make.JOURNAL)
    assert "unsuitable" in drawn
    assert "release" in drawn
    assert "http" not in re.sub(r"http://www\.w3\.org\S*|https://www\.textualize\.io|http&#160;", "", drawn)
    for picture in (DOCS / "images").glob("*.[sp][vn]g"):
        assert picture.stat().st_size < 200_000
