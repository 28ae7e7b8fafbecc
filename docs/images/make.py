"""Draw the pictures of the README again, from the journal of a real migration in docs/examples.

Run from anywhere: ``python docs/images/make.py [DIRECTORY]``. The live view is the one people see,
taken at a moment of the hold; the report is ``virtgrid migration report``'s PNG.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from virtgrid.core import journal
from virtgrid.report.fold import Fold
from virtgrid.report.png import render_png
from virtgrid.report.timeline import Timeline
from virtgrid.report.view import render_model

HERE = Path(__file__).parent
JOURNAL = HERE.parent / "examples" / "20261122T044647-web.jsonl"
#: Seconds into the hold at which the live view is taken.
MOMENT_S = 3.75
WIDTH = 96


def live_svg(path: Path) -> str:
    """The live view at the moment, as SVG without fonts from elsewhere."""
    fold = Fold()
    hold_began_s = None
    for record in journal.read(path):
        at_s = fold.seconds(record) if fold.status().id else 0.0
        if hold_began_s is not None and at_s > hold_began_s + MOMENT_S:
            break
        fold.add(record)
        if record.event == "phase" and record["phase"] == "hold":
            hold_began_s = fold.seconds(record)
    assert hold_began_s is not None, "the journal has no hold"
    console = Console(
        record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(render_model(fold.status(), hold_began_s + MOMENT_S, width=WIDTH))
    text = console.export_svg(
        title="virtgrid migrate web qemu+tcp://alice/system --copy-storage-all", unique_id="live"
    )
    text = re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.S)
    text = text.replace("Fira Code", "DejaVu Sans Mono")
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def report_png(path: Path) -> bytes:
    """The report's figure as PNG."""
    return render_png(Timeline.from_records(journal.read(path)))


def main() -> None:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    (directory / "live.svg").write_text(live_svg(JOURNAL), encoding="utf-8")
    (directory / "report.png").write_bytes(report_png(JOURNAL))


if __name__ == "__main__":
    main()
