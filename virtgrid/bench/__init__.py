"""The papers' tables, measured: peers interleaved in one run."""
