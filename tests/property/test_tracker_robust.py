"""Whatever comes, nothing breaks, nothing grows without bound, and nobody who waits is called suitable.

The promises are tests/fuzz/targets.py's; here they are held against a bounded number of inputs on
every run, there (``make fuzz``) against as many as there is time for.
"""

from __future__ import annotations

import pytest
import targets
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

SETTINGS = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

#: (what is done, to which connection, with what): see targets.story.
steps = st.builds(
    lambda up, kind, line, rest: bytes([up | kind << 1 | line << 5]) + rest,
    st.integers(0, 1),
    st.integers(0, 15),
    st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5, 6]),
    st.binary(min_size=1, max_size=4),
)
stories = st.builds(
    lambda first, parts: bytes([first]) + b"".join(parts), st.integers(0, 255), st.lists(steps, max_size=40)
)


@SETTINGS
@given(data=stories)
def test_any_order_of_segments_is_no_trouble_and_what_is_kept_is_bounded(data: bytes) -> None:
    targets.tracker(data)


@SETTINGS
@given(data=stories)
def test_frames_fed_together_and_one_by_one_come_to_the_same(data: bytes) -> None:
    targets.blocks(data)


@SETTINGS
@given(data=stories)
def test_nobody_who_certainly_waits_is_called_suitable_whatever_happens(data: bytes) -> None:
    targets.waiting(data)


@SETTINGS
@given(data=st.lists(st.sampled_from(range(len(targets.WORDS))), max_size=40), line=st.integers(0, 4))
def test_nobody_who_waits_is_called_suitable_in_any_dialogue_of_known_words(
    data: list[int], line: int
) -> None:
    targets.waiting(bytes([1, *(b for word in data for b in (line << 5 | word & 1, word))]))


@SETTINGS
@given(data=st.binary(max_size=300))
@example(data=b"\x45" * 80)
def test_any_bytes_are_a_frame_or_none(data: bytes) -> None:
    targets.frames(data)


@SETTINGS
@given(data=st.binary(max_size=400))
def test_any_bytes_are_a_capture_file_or_refused(data: bytes) -> None:
    targets.capture(data)


lines = st.lists(
    st.sampled_from(
        [
            "protocol y", "port 1 2", "unit head max 1KiB", "unit line", "case ignore", "greeting",
            "field n content-length", "detect client /^[a-z]+ /", "detect server /^[0-9]/", "pause idle ok",
            "pause new hold 3s", "pause busy hold", "pause moving ok", "pause opaque quiet 1s 2s",
            "pause waiting ok", "large 1MiB",
            "client /^(?P<t>[a-z]) (?P<n>[0-9]{1,9})/ -> push one t ; body bytes n",
            "client /^[a-z]/ -> push word ; ask until \\r\\n.\\r\\n", "server /^(?P<t>[a-z]) / -> pop t",
            "server /^[0-9]/ if word -> pop ; body until \\r\\n.\\r\\n", "server /^3/ -> reply ; go",
            "server /^[a-z]/ -> note ; more", "server more /^[a-z]/ -> more", "client /^/ -> note",
            "server /^2/ -> pop ; become tls", "client /^T/ -> push t ; transfer", "x", "",
        ]
    )
    | st.text(max_size=30),
    max_size=25,
).map("\n".join)  # fmt: skip


@SETTINGS
@given(text=lines)
def test_any_definition_is_played_without_trouble_or_refused(text: str) -> None:
    targets.definition(text.encode("latin-1", "replace"))


@SETTINGS
@given(text=st.text(alphabet="ab01 ^$.*+?{},|()[]\\-:<>P=dws", max_size=60))
def test_any_pattern_takes_linear_time_or_is_refused(text: str) -> None:
    targets.pattern(text.encode())


@SETTINGS
@given(data=st.binary(max_size=200), cut=st.integers(0, 4000))
def test_any_bytes_are_a_state_or_refused(data: bytes, cut: int) -> None:
    (whole,) = targets.seeds("state")
    targets.state(data)
    targets.state(whole[:cut] + data + whole[cut + len(data) :])


@pytest.mark.parametrize("name", targets.TARGETS)
def test_the_fuzzers_seeds_pass(name: str) -> None:
    seeds = list(targets.seeds(name))
    assert seeds or name == "capture"
    for data in seeds:
        targets.TARGETS[name](data)
