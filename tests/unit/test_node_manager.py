"""The NodeManager does what its table says in every state, and remembers it through kill -9."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest

from tests.unit.scripted_host import HOSTS, INIT, KEYS, OTHER, Bench
from tests.wire_ends import until
from virtgrid.core.errors import PeerUnreachableError, RefusedError, VirtgridError
from virtgrid.grid.messages.host import Stage, View
from virtgrid.grid.messages.node import Command, State
from virtgrid.grid.node import states
from virtgrid.grid.node.states import Event
from virtgrid.wire.message import BadMessageError

ROOT = Path(__file__).parents[2]
WORKING = {state: row.work for state, row in states.TABLE.items() if row.work}


@pytest.mark.parametrize("command", Command)
@pytest.mark.parametrize("state", State)
async def test_every_command_in_every_state(state: State, command: Command, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(state)
    row, before = (
        states.TABLE[state],
        (bench.manager.status(), bench.manager.outbox.last, list(bench.host.done)),
    )
    if command in row.asks:
        assert await bench.say(command) or command is Command.EXEC
        assert bench.manager.state is state
    elif command in row.commands:
        assert await bench.say(command) == {}
        assert bench.manager.state is row.commands[command]
    else:
        with pytest.raises(RefusedError, match=f"{command} is not possible in {state}, only in") as caught:
            await bench.say(command)
        assert "there may come" in (caught.value.hint or "")
        await asyncio.sleep(0)
        assert (bench.manager.status(), bench.manager.outbox.last, bench.host.done) == before
    await bench.manager.close()


@pytest.mark.parametrize("state", State)
async def test_shut_down_twice_in_every_state_ends_in_done(state: State, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(state)
    assert await bench.say(Command.SHUT_DOWN) == {}
    assert await bench.say(Command.SHUT_DOWN) == {}
    if gate := bench.host.gates.get("remove"):
        gate.set()
    await bench.until(State.DONE)
    assert await bench.say(Command.SHUT_DOWN) == {}
    assert bench.host.view.stage is Stage.ABSENT
    assert bench.host.done.count("remove") == 1
    told = [note["state"] for note in bench.told("state")]
    assert told[-2:] == ["SHUTTING_DOWN", "DONE"]
    assert told.count("DONE") == 1
    bench.manager.acknowledged(bench.manager.outbox.last)
    assert bench.manager.told.is_set()


@pytest.mark.parametrize("state", State)
async def test_the_end_of_the_reservation_is_a_shut_down_in_every_state(state: State, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(state)
    if gate := bench.host.gates.get("remove"):
        gate.set()
    await bench.manager.until_end()  # an hour of a fake clock
    await bench.until(State.DONE)
    assert bench.host.view.stage is Stage.ABSENT


@pytest.mark.parametrize("state", State)
async def test_killed_in_any_state_it_goes_on_where_it_was(state: State, tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(state)
    told = bench.told("state")
    reason = bench.manager.status().reason
    for gate in bench.host.gates.values():
        gate.set()
    await bench.again()
    assert bench.told("state")[: len(told)] == told, "what was not acknowledged is still to be told"
    assert bench.manager.standing.incarnation == 2
    following = {
        State.INITIATING: State.HOST_READY,
        State.STARTING_UP: State.RUNNING,
        State.SHUTTING_DOWN: State.DONE,
    }
    await bench.until(following.get(state, state))
    if state not in following:
        assert bench.manager.status().reason == reason
    await bench.say(Command.SHUT_DOWN)
    await bench.until(State.DONE)
    assert bench.host.view.stage is Stage.ABSENT


@pytest.mark.parametrize("state", [State.HOST_READY, State.KEYS_READY, State.RUNNING])
async def test_a_sandbox_that_went_while_nobody_looked_is_a_failure_with_its_reason(
    state: State, tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(state)
    bench.host.view = View(stage=Stage.ABSENT)
    await bench.again()
    assert bench.manager.state is State.FAILED
    assert bench.manager.status().reason == "the sandbox should be there, but it is absent"


async def test_a_sandbox_that_ends_by_itself_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(State.RUNNING)
    bench.manager.sandbox_ended("its memory was used up")
    assert bench.manager.state is State.FAILED
    assert bench.told("state")[-1]["reason"] == "the sandbox ended: its memory was used up"


@pytest.mark.parametrize(("step", "state"), [("prepare", State.INITIATING), ("start", State.STARTING_UP)])
async def test_a_step_that_fails_says_why_and_its_sandbox_is_stopped(
    step: str, state: State, tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    bench.host.broken[step] = VirtgridError("it cannot be", cause="the disk is full")
    if state is State.STARTING_UP:
        await bench.bring_to(State.KEYS_READY)
        await bench.say(Command.RUN)
    else:
        await bench.say(Command.INIT)
    await bench.until(State.FAILED)
    assert bench.manager.status().reason == "it cannot be: the disk is full"
    await asyncio.sleep(0)
    assert bench.host.done[-1] == "stop"


async def test_a_virtgridd_that_is_being_restarted_is_waited_for(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.host.broken["prepare"] = PeerUnreachableError("virtgridd cannot be reached")
    await bench.say(Command.INIT)
    await until(lambda: bench.host.done.count("prepare") >= 3)
    assert bench.manager.state is State.INITIATING
    del bench.host.broken["prepare"]
    await bench.until(State.HOST_READY)


async def test_one_that_never_comes_back_is_a_failure(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.host.broken["prepare"] = PeerUnreachableError("virtgridd cannot be reached")
    await bench.say(Command.INIT)
    await bench.until(State.FAILED)
    assert bench.clock.monotonic_s() > 30


async def test_shut_down_overtakes_what_is_under_way(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(State.STARTING_UP)
    await bench.say(Command.SHUT_DOWN)
    await bench.until(State.DONE)
    assert [note["state"] for note in bench.told("state")] == [
        "INITIATING", "HOST_READY", "KEYS_READY", "STARTING_UP", "SHUTTING_DOWN", "DONE",
    ]  # fmt: skip


# -- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"user": "root"}, {"user": "../x"}, {"user": "x" * 65}, {"user": ""}, {"user": "a:b"},
        {"user": "a\nb"}, {"address": "10.77.0.300"}, {"address": "fe80::1"}, {"address": "127.0.0.1"},
        {"address": "224.0.0.1"}, {"address": 7}, {"prefix": 0}, {"prefix": 33}, {"prefix": "24"},
        {"prefix": True}, {"tag": 0}, {"tag": 1 << 24}, {"tag": 4.5}, {"hostname": "a"},
        {"unknown": 1}, {"key": "short"}, {"user": None},
    ],
)  # fmt: skip
async def test_init_takes_nothing_but_what_it_should(changes: dict[str, Any], tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with pytest.raises(BadMessageError, match=f"INIT: {next(iter(changes))}"):
        await bench.say(Command.INIT, **changes)
    assert bench.manager.state is State.INITIAL
    assert bench.manager.outbox.last == 0


def _hosts(**changes: Any) -> dict[str, Any]:
    first, second = HOSTS["hosts"]
    return {"hosts": [first, {**second, **changes}]}


@pytest.mark.parametrize(
    "params",
    [
        {"hosts": []}, {"hosts": "x"}, {}, _hosts(hostname="r-42-1"), _hosts(address="10.77.0.21"),
        _hosts(host_key="ssh-rsa " + "x" * 68), _hosts(host_key=KEYS.host_key + "\n* ssh-ed25519 x"),
        _hosts(user_key='command="x" ' + KEYS.user_key), _hosts(user_key=KEYS.user_key + " comment"),
        _hosts(hostname="n2 slots=1"), _hosts(hostname="localhost"), _hosts(slots=0), _hosts(extra=1),
    ],
)  # fmt: skip
async def test_set_keys_takes_nothing_that_could_break_out_of_a_file(
    params: dict[str, Any], tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(State.HOST_READY)
    with pytest.raises(BadMessageError, match="SET_KEYS"):
        await bench.manager.command("SET_KEYS", params)
    assert bench.manager.state is State.HOST_READY
    assert "set_keys" not in bench.host.done


@pytest.mark.parametrize(
    "own",
    [
        {"hostname": "other"},
        {"address": "10.77.0.99"},
        {"host_key": OTHER.host_key},
        {"user_key": OTHER.user_key},
    ],
)
async def test_set_keys_knows_its_own_node(own: dict[str, str], tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(State.HOST_READY)
    first, second = HOSTS["hosts"]
    with pytest.raises(RefusedError, match="this node"):
        await bench.say(Command.SET_KEYS, hosts=[{**first, **own}, second])
    assert bench.manager.state is State.HOST_READY


@pytest.mark.parametrize(
    "params",
    [
        {}, {"argv": []}, {"argv": "ls"}, {"argv": ["a\0b"]}, {"argv": ["x" * (129 << 10)]},
        {"argv": ["x" * (100 << 10)] * 3}, {"argv": ["ls"], "env": {"A=B": "c"}},
        {"argv": ["ls"], "env": {"A": 1}}, {"argv": [7]}, {"argv": ["ls"], "cwd": "/"},
    ],
)  # fmt: skip
async def test_exec_takes_nothing_a_program_cannot_be_given(params: dict[str, Any], tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(State.RUNNING)
    with pytest.raises(BadMessageError, match="EXEC"):
        await bench.manager.command("EXEC", params)
    assert bench.manager.status().execs == ()


async def test_half_a_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadMessageError, match="INIT: Invalid JSON"):
        await Bench(tmp_path).say(Command.INIT, user="\ud800")


async def test_there_is_no_other_command(tmp_path: Path) -> None:
    with pytest.raises(BadMessageError, match="there is no method REBOOT"):
        await Bench(tmp_path).manager.command("REBOOT", {})


# -- keys of questions ---------------------------------------------------------------------------


async def test_a_question_asked_again_is_answered_again_and_done_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.say(Command.INIT, key="key-00000001")
    await bench.until(State.HOST_READY)
    assert await bench.say(Command.INIT, key="key-00000001") == {}
    with pytest.raises(RefusedError, match="used for another question"):
        await bench.say(Command.SHUT_DOWN, key="key-00000001")
    with pytest.raises(RefusedError, match="INIT is not possible in HOST_READY"):
        await bench.say(Command.INIT, key="key-00000002")
    assert bench.host.done == ["prepare"]


async def test_answers_and_refusals_outlive_a_kill(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(State.RUNNING)
    started = await bench.say(Command.EXEC, key="key-00000001")
    with pytest.raises(RefusedError, match="INIT is not possible in RUNNING"):
        await bench.say(Command.INIT, key="key-00000002")
    await bench.again()
    assert await bench.say(Command.EXEC, key="key-00000001") == started
    with pytest.raises(RefusedError, match="INIT is not possible in RUNNING"):
        await bench.say(Command.INIT, key="key-00000002")
    assert bench.host.done.count("exec") <= 1


async def test_set_keys_that_could_not_be_written_may_be_tried_again(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(State.HOST_READY)
    bench.host.broken["set_keys"] = PeerUnreachableError("virtgridd cannot be reached")
    with pytest.raises(PeerUnreachableError):
        await bench.say(Command.SET_KEYS, key="key-00000001")
    assert bench.manager.state is State.HOST_READY
    del bench.host.broken["set_keys"]
    assert await bench.say(Command.SET_KEYS, key="key-00000001") == {}
    assert bench.manager.state is State.KEYS_READY


# -- programs ------------------------------------------------------------------------------------


async def test_output_and_end_of_a_program_are_told_in_order(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(State.RUNNING)
    assert await bench.say(Command.EXEC) == {"exec": "e1"}
    bench.host.writes(b"\xff\0one")
    bench.host.writes(b"two", error=True)
    bench.host.exits(3)
    await until(lambda: not bench.manager.status().execs)
    output = bench.told("output")
    assert [(o["exec"], o["stream"], base64.b64decode(o["data"])) for o in output] == [
        ("e1", "stdout", b"\xff\0one"), ("e1", "stderr", b"two"),
    ]  # fmt: skip
    (finished,) = bench.told("finished")
    assert (finished["status"], finished["problem"]) == (3, None)
    assert finished["usage"] == {"user_s": 0.5, "system_s": 0.0, "max_rss_bytes": 1024, "elapsed_s": 1.0}


async def test_a_crm_that_takes_nothing_stops_the_program_and_not_the_memory(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(State.RUNNING)
    await bench.say(Command.EXEC)
    piece = b"x" * (32 << 10)
    for _ in range(200):
        bench.host.writes(piece)
    bench.host.exits(0)
    seen = -1
    while seen != bench.host.streamed:
        seen = bench.host.streamed
        for _ in range(50):
            await asyncio.sleep(0)
    assert 20 <= seen <= 40, "about a MiB is kept, the rest waits with the program"

    def taken() -> bool:
        bench.manager.acknowledged(bench.manager.outbox.last)
        return not bench.manager.status().execs

    await until(taken)
    assert bench.host.streamed == 201


async def test_a_program_whose_pilot_was_killed_is_told_as_unknown(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    await bench.bring_to(State.RUNNING)
    await bench.say(Command.EXEC)
    await asyncio.sleep(0)
    await bench.again()
    (finished,) = bench.told("finished")
    assert finished["status"] is None
    assert "restarted" in finished["problem"]
    assert bench.manager.status().execs == ()
    assert await bench.say(Command.EXEC) == {"exec": "e2"}


async def test_output_nobody_takes_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtgrid.grid.node.manager._BURY_S", 0.05)
    bench = Bench(tmp_path)
    await bench.bring_to(State.RUNNING)
    await bench.say(Command.EXEC)
    for _ in range(200):
        bench.host.writes(b"x" * (32 << 10))
    await bench.say(Command.SHUT_DOWN)
    await bench.until(State.DONE)
    (finished,) = bench.told("finished")
    assert "not all of its output was taken" in finished["problem"]


# -- the record ----------------------------------------------------------------------------------


async def test_a_record_is_private_and_holds_no_private_key(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "pilot")
    await bench.bring_to(State.KEYS_READY)
    path = tmp_path / "pilot" / "nodemanager.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert "PRIVATE" not in path.read_text()


async def test_a_command_that_cannot_be_written_down_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("virtgrid.grid.node.record.Store.save", full)
        with pytest.raises(VirtgridError, match="cannot write its record"):
            await bench.say(Command.INIT)
    assert bench.manager.state is State.INITIAL
    assert bench.manager.outbox.last == 0
    assert bench.host.done == []
    await bench.say(Command.INIT)
    await bench.until(State.HOST_READY)


@pytest.mark.parametrize("text", ["", "{", "{}", '{"v": 2}', "[]", "\x00"])
async def test_a_record_nobody_of_us_wrote_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "nodemanager.json").write_text(text)
    with pytest.raises(RefusedError, match="not the record of a NodeManager"):
        Bench(tmp_path)


async def test_each_pilot_has_its_own_record(tmp_path: Path) -> None:
    await Bench(tmp_path).say(Command.INIT)
    with pytest.raises(RefusedError, match="another pilot"):
        Bench(tmp_path, id="ticket-0002")


# -- the table -----------------------------------------------------------------------------------


def test_every_state_can_be_reached_and_left() -> None:
    reached, ahead = set[State](), [State.INITIAL]
    while ahead:
        state = ahead.pop()
        if state not in reached:
            reached.add(state)
            row = states.TABLE[state]
            ahead += [*row.commands.values(), *row.events.values()]
    assert reached == set(State)
    for state in set(State) - {State.DONE}:
        row = states.TABLE[state]
        assert {*row.commands.values(), *row.events.values()} - {state}
        assert Command.SHUT_DOWN in row.commands
        assert Event.ENDED in row.events


def test_the_reference_page_has_the_table_as_it_is() -> None:
    page = (ROOT / "docs/reference/node.md").read_text(encoding="utf-8")
    assert states.markdown() in page, "python -m virtgrid.grid.node.states prints it"


def test_init_is_the_paper_s() -> None:
    assert {"address", "tag", "user"} < set(INIT)
