"""Files that come with virtgrid and are not Python: XML templates, hooks."""

from __future__ import annotations

from pathlib import Path

import virtgrid


def shipped(directory: str, name: str) -> Path:
    """Where such a file is: inside the installed package, or beside it in a source tree."""
    package = Path(virtgrid.__file__).parent
    installed = package / directory / name
    return installed if installed.exists() else package.parent / directory / name
