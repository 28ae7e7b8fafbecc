"""Coverage-guided fuzzing of the tracker, for longer than the tests take: ``make fuzz``.

    run.py TARGET [SECONDS]     one of targets.TARGETS; exits with an error when a promise is broken

The input that broke it is left in crash-* in the present directory; with it as the only further
argument, it is played again: run.py TARGET FILE. Atheris is needed (the dependency group "fuzz").
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

_TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_TESTS), str(_TESTS / "captures"), str(_TESTS / "fuzz")]

with atheris.instrument_imports(include=["virtgrid.tracker"]):
    import targets

#: A single input may take so long; beyond, the tracker hangs.
TIMEOUT_S = 20
INPUT_BYTES_MAX = 4096
MEMORY_MIB_MAX = 2048


def main(name: str, what: str) -> None:
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(targets.seeds(name)):
            Path(corpus, str(number)).write_bytes(seed)
        options = [f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={MEMORY_MIB_MAX}", f"-max_len={INPUT_BYTES_MAX}"]
        if what.isdigit():
            options += [f"-max_total_time={what}", "-print_final_stats=1", corpus]
        else:
            options.append(what)
        atheris.Setup([sys.argv[0], *options], targets.TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in targets.TARGETS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(targets.TARGETS)} [SECONDS | FILE]")
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "60")
