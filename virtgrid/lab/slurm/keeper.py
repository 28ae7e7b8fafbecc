"""The process a private Slurm hangs on: it holds a pid namespace, and clears up.

Slurm's jobs outlive its daemons on purpose, so ending the daemons is not enough. In a pid namespace the
kernel ends everything when the first process goes, and that one goes with this keeper. The end of standard
input means that the owner is gone, however it went.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path


def main() -> None:
    directory, words = Path(sys.argv[1]), sys.argv[2:]
    # The owner's terminal may send these to us too; the end of the input is what counts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    init = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        os.write(1, f"{init.pid}\n".encode())
        with contextlib.suppress(OSError):
            while os.read(0, 100):
                pass
    finally:
        init.kill()
        init.wait()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
