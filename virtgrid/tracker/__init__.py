"""Frames in, connection states out. No I/O and no clock: time is an argument."""
