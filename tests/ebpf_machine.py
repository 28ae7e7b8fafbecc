"""eBPF as the kernel runs it, for the instructions our programs use: encoded bytes in, a result out."""

from __future__ import annotations

import struct

M64 = (1 << 64) - 1
M32 = (1 << 32) - 1
STACK_BYTES = 512
STACK = 0x7000_0000
CONTEXT = 0x1000
VALUES = 0x2000_0000


def taken(op: int, a: int, b: int) -> bool:
    """Whether a conditional jump is taken, on two registers or a register and a constant (64 bits)."""
    match op:
        case 0x15 | 0x1D:
            return a == b
        case 0x55:
            return a != b
        case 0x45:
            return bool(a & b)
        case 0xB5:
            return a <= b
        case 0xD5:
            return (a ^ (1 << 63)) <= (b ^ (1 << 63))  # signed
        case 0x2E:
            return (a & M32) > (b & M32)
    raise AssertionError(f"jump {op:#x}")


def run(
    code: bytes, frame: bytes, maps: dict[int, dict[bytes, bytearray]], wire_len: int | None = None
) -> int:
    """The program's result for a packet. maps: descriptor -> entries, which the program may change.

    A read of the stack that was never written, or outside of what is addressed, fails the test.
    """
    program = list(struct.iter_unpack("<BBhi", code))
    length = len(frame) if wire_len is None else wire_len
    r: list[int | None] = [None] * 11
    r[1], r[10] = CONTEXT, STACK
    stack: list[int | None] = [None] * STACK_BYTES
    values: list[bytearray] = []

    def get(n: int) -> int:
        value = r[n]
        assert value is not None, f"r{n} read before it was written"
        return value

    def memory(address: int, size: int) -> bytes:
        if CONTEXT <= address < CONTEXT + 4:
            return struct.pack("<I", length)[:size]
        if address >= STACK - STACK_BYTES and address + size <= STACK:
            at = address - STACK + STACK_BYTES
            assert at % size == 0 if size in (1, 2, 4, 8) else True, "the verifier wants it aligned"
            part = stack[at : at + size]
            assert None not in part, "stack read before it was written"
            return bytes(b for b in part if b is not None)
        which, at = divmod(address - VALUES, 64)
        assert at + size <= len(values[which])
        return bytes(values[which][at : at + size])

    at = 0
    for _ in range(10_000):
        op, registers, offset, value = program[at]
        to, source = registers & 15, registers >> 4
        at += 1
        constant = value & M64
        match op:
            case 0xB7:
                r[to] = constant
            case 0x18:
                r[to] = value & M32 if source else (value & M32) | (program[at][3] & M32) << 32
                at += 1
            case 0xBF:
                r[to] = get(source)
            case 0x07:
                r[to] = (get(to) + constant) & M64
            case 0x0C:
                r[to] = (get(to) + get(source)) & M32
            case 0x1F:
                r[to] = (get(to) - get(source)) & M64
            case 0x1C:
                r[to] = (get(to) - get(source)) & M32
            case 0x67:
                r[to] = (get(to) << value) & M64
            case 0x77:
                r[to] = get(to) >> value
            case 0xDC:
                size = value // 8
                r[to] = int.from_bytes((get(to) & ((1 << value) - 1)).to_bytes(size, "little"), "big")
            case 0x71 | 0x69 | 0x61 | 0x79:
                size = {0x71: 1, 0x69: 2, 0x61: 4, 0x79: 8}[op]
                r[to] = int.from_bytes(memory(get(source) + offset, size), "little")
            case 0x63:
                which, place = divmod(get(to) + offset - VALUES, 64)
                assert place + 4 <= len(values[which])
                values[which][place : place + 4] = struct.pack("<I", get(source) & M32)
            case 0x30 | 0x28 | 0x20:
                size = {0x30: 1, 0x28: 2, 0x20: 4}[op]
                assert get(6) == CONTEXT
                if value + size > len(frame):
                    return 0
                r[0] = int.from_bytes(frame[value : value + size], "big")
                r[1:6] = [None] * 5
            case 0x05:
                at += offset
            case 0x15 | 0x55 | 0x45 | 0xB5 | 0xD5 | 0x1D | 0x2E:
                other = get(source) if op & 8 else constant
                at += offset if taken(op, get(to), other) else 0
            case 0x85 if value == 26:
                assert get(1) == CONTEXT
                begin, where, size = get(2), get(3), get(4)
                place = where - STACK + STACK_BYTES
                assert place >= 0
                assert place + size <= STACK_BYTES
                if begin + size > len(frame):
                    stack[place : place + size] = bytes(size)
                    r[0] = M64
                else:
                    stack[place : place + size] = frame[begin : begin + size]
                    r[0] = 0
                r[1:6] = [None] * 5
            case 0x85 if value == 1:
                entries = maps[get(1)]
                size = 12 if get(1) == min(maps) else 36
                entry = entries.get(memory(get(2), size))
                if entry is None:
                    r[0] = 0
                else:
                    values.append(entry)
                    r[0] = VALUES + 64 * (len(values) - 1)
                r[1:6] = [None] * 5
            case 0x95:
                return get(0)
            case _:
                raise AssertionError(f"instruction {op:#x}")
    raise AssertionError("the program does not end")
