"""The files a guest serves, after SPECweb2005's Support workload: pages, images, downloads.

Sizes come from a seed, so that every build has the same ones and a load generator's figures can
be compared. ``/page/N.html`` 2 to 40 KB, ``/img/N.gif`` 1 to 30 KB, ``/download/N.bin`` 4 to 6 MiB.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Final

PAGES: Final = 50
IMAGES: Final = 200
DOWNLOADS: Final = 10
PAGE_BYTES: Final = (2_000, 40_000)
IMAGE_BYTES: Final = (1_000, 30_000)
# Ten names for two files: what counts is the length of the transfer, and the disk travels too.
DOWNLOAD_BYTES: Final = (4 * 2**20, 6 * 2**20)
_SEED: Final = 2005
_WORDS: Final = ("ticket", "driver", "manual", "firmware", "product", "answer", "printer", "update", "search")


def write_pages(root: Path) -> None:
    """``page/`` and ``img/`` below the document root."""
    rng = random.Random(_SEED)  # noqa: S311  # sizes, not secrets
    (root / "page").mkdir(parents=True)
    for number in range(PAGES):
        (root / "page" / f"{number}.html").write_bytes(_page(rng, number, rng.randint(*PAGE_BYTES)))
    (root / "img").mkdir()
    for number in range(IMAGES):
        body = b"GIF89a" + rng.randbytes(rng.randint(*IMAGE_BYTES) - 6)
        (root / "img" / f"{number}.gif").write_bytes(body)
    (root / "index.html").write_bytes(_page(rng, 0, PAGE_BYTES[0]))


def write_downloads(directory: Path) -> None:
    """``0.bin`` to ``9.bin`` in a directory, hard links to one file per length."""
    rng = random.Random(_SEED + 1)  # noqa: S311
    directory.mkdir(parents=True)
    for number in range(DOWNLOADS):
        path = directory / f"{number}.bin"
        if number < len(DOWNLOAD_BYTES):
            path.write_bytes(rng.randbytes(DOWNLOAD_BYTES[number]))
        else:
            os.link(directory / f"{number % len(DOWNLOAD_BYTES)}.bin", path)


def _page(rng: random.Random, number: int, size_bytes: int) -> bytes:
    head = f"<!DOCTYPE html><html><head><title>Support {number}</title></head><body>\n".encode()
    tail = b"</body></html>\n"
    body = bytearray()
    while len(body) < size_bytes:
        body += b"<p>" + " ".join(rng.choices(_WORDS, k=12)).encode() + b"</p>\n"
    room = size_bytes - len(head) - len(tail)
    return head + bytes(body[:room]) + tail
