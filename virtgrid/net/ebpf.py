"""eBPF without a compiler: an assembler for what our programs use, and bpf(2) through ctypes.

Encoding: kernel Documentation/bpf/standardization/instruction-set.rst. Registers: r0 result, r1 to
r5 arguments and lost in calls, r6 to r9 kept over calls, r10 the frame pointer (stack grows down).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import Final, NamedTuple

R0, R1, R2, R3, R4, R6, R7, R8, R9, FP = 0, 1, 2, 3, 4, 6, 7, 8, 9, 10
PROGRAM_SOCKET_FILTER: Final = 1
MAP_LRU_HASH: Final = 9
HELPER_MAP_LOOKUP: Final = 1
HELPER_SKB_LOAD_BYTES: Final = 26

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD = 0, 1, 2, 3, 5
#: The system call's number; machines that are not listed do without.
_SYS_BPF: Final = {
    "x86_64": 321, "aarch64": 280, "riscv64": 280, "loongarch64": 280, "ppc64le": 361, "s390x": 351,
}  # fmt: skip
_ATTR_BYTES: Final = 128
_LOG_BYTES: Final = 1 << 16

_libc: Final = ctypes.CDLL(None, use_errno=True)


# -- the assembler -------------------------------------------------------------------------


class Instruction(NamedTuple):
    """One of 8 bytes. offset: of a memory access, or how many instructions a jump passes over."""

    code: int
    to: int = 0
    source: int = 0
    offset: int = 0
    value: int = 0

    def encoded(self) -> bytes:
        # The order of the register halves follows the machine's byte order, as in struct bpf_insn.
        little = struct.pack("=H", 1) == b"\1\0"
        registers = self.to | self.source << 4 if little else self.to << 4 | self.source
        value = self.value - (1 << 32) if self.value >= 1 << 31 else self.value
        return struct.pack("=BBhi", self.code, registers, self.offset, value)


class Assembler:
    """Instructions in order, with labels for jumps; ``program()`` puts the distances in.

    Methods are named after what they do to their first argument. Those that end in 32 work on the
    lower half and clear the upper one.
    """

    def __init__(self) -> None:
        self._code: list[Instruction] = []
        self._labels: dict[str, int] = {}
        self._jumps: list[tuple[int, str]] = []

    def label(self, name: str) -> None:
        """What comes next can be jumped to. A name is given once."""
        assert name not in self._labels, name
        self._labels[name] = len(self._code)

    def program(self) -> list[Instruction]:
        """The finished program. Errors: KeyError for a jump to a label that is not there."""
        code = list(self._code)
        for at, name in self._jumps:
            code[at] = code[at]._replace(offset=self._labels[name] - at - 1)
        return code

    def _add(self, code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> None:
        self._code.append(Instruction(code, to, source, offset, value))

    # Values: 0x_7 is 64 bits with a constant, 0x_f with a register; 0x_4 and 0x_c are 32 bits.
    def set(self, to: int, value: int) -> None:
        self._add(0xB7, to, value=value)

    def set_map(self, to: int, descriptor: int) -> None:
        """A map's address; the verifier puts it in place of the descriptor."""
        self._add(0x18, to, source=1, value=descriptor)
        self._add(0x00)

    def copy(self, to: int, source: int) -> None:
        self._add(0xBF, to, source)

    def add(self, to: int, value: int) -> None:
        self._add(0x07, to, value=value)

    def add32(self, to: int, source: int) -> None:
        self._add(0x0C, to, source)

    def subtract(self, to: int, source: int) -> None:
        self._add(0x1F, to, source)

    def subtract32(self, to: int, source: int) -> None:
        self._add(0x1C, to, source)

    def shift_left(self, to: int, bits: int) -> None:
        self._add(0x67, to, value=bits)

    def shift_right(self, to: int, bits: int) -> None:
        self._add(0x77, to, value=bits)

    def from_network(self, to: int, bits: int) -> None:
        """16, 32 or 64 bits in network order -> a number."""
        self._add(0xDC, to, value=bits)

    # Memory. size: 1, 2, 4 or 8 bytes.
    def load(self, size: int, to: int, base: int, offset: int) -> None:
        self._add({1: 0x71, 2: 0x69, 4: 0x61, 8: 0x79}[size], to, base, offset)

    def store(self, size: int, base: int, offset: int, source: int) -> None:
        self._add({1: 0x73, 2: 0x6B, 4: 0x63, 8: 0x7B}[size], base, source, offset)

    def load_packet(self, size: int, offset: int) -> None:
        """r0 = a number of the packet that r6 points at, 1, 2 or 4 bytes; r1 to r5 are lost.

        Outside the packet the program ends with 0.
        """
        self._add({1: 0x30, 2: 0x28, 4: 0x20}[size], value=offset)

    # Jumps.
    def go(self, label: str) -> None:
        self._jump(0x05, label)

    def if_equal(self, register: int, value: int, label: str) -> None:
        self._jump(0x15, label, register, value=value)

    def if_not_equal(self, register: int, value: int, label: str) -> None:
        self._jump(0x55, label, register, value=value)

    def if_any_bit(self, register: int, value: int, label: str) -> None:
        self._jump(0x45, label, register, value=value)

    def if_not_positive(self, register: int, label: str) -> None:
        """Signed."""
        self._jump(0xD5, label, register)

    def if_above32(self, register: int, other: int, label: str) -> None:
        """Unsigned."""
        self._jump(0x2E, label, register, other)

    def _jump(self, code: int, label: str, to: int = 0, source: int = 0, value: int = 0) -> None:
        self._jumps.append((len(self._code), label))
        self._add(code, to, source, value=value)

    def call(self, helper: int) -> None:
        self._add(0x85, value=helper)

    def exit(self) -> None:
        self._add(0x95)


# -- the system call -----------------------------------------------------------------------


def load(program: list[Instruction]) -> int:
    """A socket filter's descriptor. Errors: OSError; where the verifier said why, with its last words."""
    code = b"".join(one.encoded() for one in program)
    text = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(_LOG_BYTES)
    attr = struct.pack(
        "=IIQQIIQII",
        PROGRAM_SOCKET_FILTER,
        len(program),
        ctypes.addressof(text),
        ctypes.addressof(licence),
        1,
        _LOG_BYTES,
        ctypes.addressof(log),
        0,
        0,
    )
    try:
        return _bpf(_PROG_LOAD, attr)
    except OSError as error:
        said = log.value.decode("ascii", "replace").strip().splitlines()
        if said:
            raise OSError(error.errno, f"{error.strerror} ({said[-2 if len(said) > 1 else -1]})") from error
        raise


class Map:
    """A map in the kernel, gone when it and the programs that use it are closed. One thread at a time.

    Keys and values are bytes of fixed lengths. Errors: OSError.
    """

    def __init__(self, kind: int, key_bytes: int, value_bytes: int, entries_max: int) -> None:
        self._key = ctypes.create_string_buffer(key_bytes)
        self._value = ctypes.create_string_buffer(value_bytes)
        self.descriptor = _bpf(
            _MAP_CREATE, struct.pack("=IIIII", kind, key_bytes, value_bytes, entries_max, 0)
        )
        attr = struct.pack("=IIQ", self.descriptor, 0, ctypes.addressof(self._key))
        # The kernel refuses a command whose attributes go on behind those it knows.
        self._key_attr = ctypes.create_string_buffer(attr, _ATTR_BYTES)
        attr += struct.pack("=QQ", ctypes.addressof(self._value), 0)
        self._attr = ctypes.create_string_buffer(attr, _ATTR_BYTES)
        self._call = _number()

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self._key.raw = key
        self._value.raw = value
        if _libc.syscall(self._call, _MAP_UPDATE, self._attr, _ATTR_BYTES) < 0:
            raise _error()

    def get(self, key: bytes) -> bytes | None:
        self._key.raw = key
        if _libc.syscall(self._call, _MAP_LOOKUP, self._attr, _ATTR_BYTES) < 0:
            return None
        return self._value.raw

    def discard(self, key: bytes) -> None:
        """Drop an entry; no matter when there is none."""
        self._key.raw = key
        if _libc.syscall(self._call, _MAP_DELETE, self._key_attr, _ATTR_BYTES) < 0:
            error = _error()
            if error.errno != errno.ENOENT:
                raise error

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _bpf(command: int, attr: bytes) -> int:
    buffer = ctypes.create_string_buffer(attr, _ATTR_BYTES)
    result = int(_libc.syscall(_number(), command, buffer, _ATTR_BYTES))
    if result < 0:
        raise _error()
    return result


def _number() -> int:
    try:
        return _SYS_BPF[platform.machine()]
    except KeyError:
        raise OSError(
            errno.ENOSYS, f"the bpf system call's number on {platform.machine()} is not known"
        ) from None


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
