"""What Slurm's programs say is read as it is meant, whatever people have written into it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtgrid.core.errors import DeadlineError, PeerUnreachableError, RefusedError
from virtgrid.grid.crm.slurm import tools, words
from virtgrid.grid.crm.slurm.tools import Slurm
from virtgrid.grid.messages.coalloc import Window

NIGHT = 1_795_824_000  # 2026-11-28T00:00:00Z
RESERVATIONS = """\
ReservationName=vg_alpha_key-0001 StartTime=2026-11-28T00:00:00 EndTime=2026-11-28T01:01:30 \
Duration=01:01:30 Nodes=n[1,3-4] NodeCnt=3 CoreCnt=3 Features=(null) PartitionName=(null) Flags=SPEC_NODES \
TRES=cpu=3 Users=root,kenji Groups=(null) Accounts=(null) Licenses=(null) \
State=INACTIVE BurstBuffer=(null) Watts=n/a
ReservationName=licences StartTime=2026-11-28T00:00:00 EndTime=2026-11-29T00:00:00 Nodes=(null) NodeCnt=0 \
Users=(null) Accounts=physics Licenses=matlab:10 State=INACTIVE
"""


def test_reservations_are_read() -> None:
    (one,) = words.read_reservations(RESERVATIONS)
    assert words.hold_of("alpha", one.name) == "key-0001"
    assert (one.begins_at_s, one.ends_at_s) == (NIGHT, NIGHT + 3690)
    assert one.nodes == {"n1", "n3", "n4"}
    assert one.users == ("root", "kenji")
    window = Window(begins_at_s=NIGHT, ends_at_s=NIGHT + 3600)
    assert one.covers(["n1", "n4"], window, NIGHT - 60)
    assert not one.covers(["n2"], window, NIGHT - 60)
    assert not one.covers(["n1"], Window(begins_at_s=NIGHT - 1, ends_at_s=NIGHT + 10), NIGHT - 60)
    assert one.covers(["n1"], Window(begins_at_s=NIGHT - 1, ends_at_s=NIGHT + 10), NIGHT)
    assert not one.covers(["n1"], Window(begins_at_s=NIGHT, ends_at_s=NIGHT + 3691), NIGHT)
    assert words.read_reservations("No reservations in the system\n") == []


@pytest.mark.parametrize(
    ("name", "hold"),
    [
        ("vg_alpha_key-0001", "key-0001"),
        ("vg_alpha_key_00_1", "key_00_1"),
        ("vg_alpha-2_key-0001", None),
        ("vg_alpha_short", None),
        ("vg_alpha_key 0001", None),
        ("xvg_alpha_key-0001", None),
    ],
)
def test_a_reservation_of_another_site_or_of_nobody_is_not_ours(name: str, hold: str | None) -> None:
    assert words.hold_of("alpha", name) == hold


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("n1|idle|none", None),
        ("n1|reserved|none", None),
        ("n1|mixed-|none", None),
        ("n1|idle~|none", None),
        ("n1|idle*|none", "does not answer"),
        ("n1|down*|Not responding", "is down: Not responding"),
        ("n1|drained|disk | State=IDLE is broken", "is drained: disk | State=IDLE is broken"),
        ("n1|draining|", "is draining"),
        ("n1|unknown|none", "Slurm has not heard of it yet"),
        ("n1|inval|Low RealMemory", "is inval: Low RealMemory"),
        ("n1|something_new|none", "is something_new"),
    ],
)
def test_why_a_node_cannot_be_had(line: str, problem: str | None) -> None:
    # A reason of several lines is cut, and does not pass for another node.
    read = words.read_nodes(f"{line}\nsecond line of it\nn1|idle|none\n")
    assert read.keys() == {"n1"}
    assert read["n1"].problem == problem


def test_jobs_are_read_and_a_job_may_be_called_anything() -> None:
    text = (
        "17|RUNNING|2026-11-28T00:00:00|2026-11-28T01:00:00|5001|vg_a_key-0001|vg_a_key-0001_n1-box\n"
        "9|CANCELLED|2026-11-28T00:00:00|2026-11-28T00:00:07|5001|(null)|vg_a_key-0001_n2-box\n"
        "20|PENDING|N/A|N/A|0|(null)|vg_a_key-0001_n3-box\n"
    )
    nine, seventeen, twenty = words.read_jobs(text)
    assert (nine.active, nine.began_s, nine.ended_s) == (False, NIGHT, NIGHT + 7)
    assert (seventeen.active, seventeen.reservation) == (True, "vg_a_key-0001")
    assert (twenty.active, twenty.began_s, twenty.reservation) == (True, None, "")
    with pytest.raises(RefusedError, match="squeue said what cannot be read"):
        words.read_jobs("17|RUNNING|2026-11-28T00:00:00|x|5001|r|a|b\n")


def test_allocations_are_read() -> None:
    (one, endless) = words.read_allocations("7|2026-11-28T00:00:00|(null)|n[1-2]\n8_3|N/A|maint|n4\n")
    assert (one.ends_at_s, one.reservation, one.nodes) == (NIGHT, "", {"n1", "n2"})
    assert (endless.job, endless.ends_at_s, endless.reservation) == ("8_3", None, "maint")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", {"n1"}),
        ("n[1-3,7],m1", {"n1", "n2", "n3", "n7", "m1"}),
        ("n[08-11]", {"n08", "n09", "n10", "n11"}),
        ("r[1-2]n[1-2]", {"r1n1", "r1n2", "r2n1", "r2n2"}),
        ("a[1-2]-ib,b", {"a1-ib", "a2-ib", "b"}),
        ("", set()),
    ],
)
def test_lists_of_nodes(text: str, names: set[str]) -> None:
    assert words.hosts(text) == names


@pytest.mark.parametrize("text", ["n[1-9999999]", "n[x]", "n[1-]", "n[0-999]m[0-999]", "n[]"])
def test_a_list_that_is_none_or_too_long_is_refused(text: str) -> None:
    with pytest.raises(RefusedError):
        words.hosts(text)


@given(st.text(alphabet="n[]-,0123456789|=()\n abT:", max_size=60))
def test_whatever_is_said_it_is_read_or_refused(text: str) -> None:
    for read in (
        words.read_reservations,
        words.read_nodes,
        words.read_allocations,
        words.read_jobs,
        words.hosts,
    ):
        with contextlib.suppress(RefusedError):
            read(text)


@given(st.lists(st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))))
def test_a_script_becomes_the_very_words(more: list[str]) -> None:
    said: list[tuple[str, list[str]]] = []
    program = ["/usr/bin/env", *more]
    body = words.script(program).decode().replace("import os\n", "")
    exec(body, {"os": type("os", (), {"execv": lambda path, argv: said.append((path, argv))})})
    assert said == [("/usr/bin/env", program)]


# -- programs ------------------------------------------------------------------------------------


def _python(text: str) -> list[str]:
    return [sys.executable, "-I", "-c", text]


async def test_a_program_that_does_not_answer_is_ended_and_what_it_said_is_told() -> None:
    text = "import sys, time; print('Munge encode failed', file=sys.stderr, flush=True); time.sleep(1000)"
    with pytest.raises(DeadlineError, match=r"did not answer within 0.5 s") as failed:
        await Slurm(answer_s=0.5).ask(_python(text))
    assert failed.value.cause in ("Munge encode failed", None)  # it may not have come so far


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("exit('slurm_load_jobs error: Unable to contact slurm controller')", PeerUnreachableError, "answer"),
        ("exit('sbatch: error: Invalid partition name')", RefusedError, "Slurm refused: Invalid partition"),
        ("exit(3)", RefusedError, "ended with 3"),
        ("print('x' * 100)", RefusedError, "more than 0 MiB"),
    ],
)
async def test_what_goes_wrong_is_one_sentence(
    text: str, kind: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "OUTPUT_LIMIT_BYTES", 99)
    with pytest.raises(kind, match=says):
        await Slurm(answer_s=30).ask(_python(text))


async def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(RefusedError, match="no-such-program is not on this host"):
        await Slurm().ask(["no-such-program"])


async def test_the_environment_of_who_asks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_FORMAT", "%j")
    told = await Slurm(Path(__file__), answer_s=30).ask(_python("import os; print(sorted(os.environ))"))
    assert "SQUEUE_FORMAT" not in told
    assert "SLURM_CONF" in told


def test_a_configuration_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(RefusedError, match=r"there is no /no/slurm.conf"):
        Slurm(Path("/no/slurm.conf"))


async def test_many_at_once_wait_for_their_turn() -> None:
    slurm = Slurm(answer_s=30)
    assert len(await asyncio.gather(*(slurm.ask(["true"]) for _ in range(40)))) == 40
