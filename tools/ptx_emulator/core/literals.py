"""Immediates as bits."""

import struct

from ptx_emulator.core.syntax import TYPE_BYTES


def round_up(value: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-value // unit) * unit


def literal_bits(text: str, kind: str) -> int:
    """The bit pattern of an immediate as an operand of type `kind`."""
    floating = kind in ("f16", "f32", "f64", "bf16", "tf32")
    if text[:2] in ("0f", "0F"):
        bits = int(text[2:], 16)
        return (
            bits
            if kind != "f64"
            else int.from_bytes(struct.pack("<d", struct.unpack("<f", struct.pack("<I", bits))[0]), "little")
        )
    if text[:2] in ("0d", "0D"):
        bits = int(text[2:], 16)
        return (
            bits
            if TYPE_BYTES[kind] == 8
            else int.from_bytes(struct.pack("<f", struct.unpack("<d", struct.pack("<Q", bits))[0]), "little")
        )
    text = text.rstrip("U")
    if floating and ("." in text or "e" in text.lower()) and not text.lower().startswith("0x"):
        if kind == "f64":
            return int.from_bytes(struct.pack("<d", float(text)), "little")
        if kind in ("f32", "tf32"):
            return int.from_bytes(struct.pack("<f", float(text)), "little")
        if kind == "f16":
            return int.from_bytes(struct.pack("<e", float(text)), "little")
        return int.from_bytes(struct.pack("<f", float(text)), "little") >> 16
    digits = text.lstrip("-")
    octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    return int(text, 8 if octal else 0)
