"""GGUF files written byte by byte, from the description of the format."""

import struct

__all__ = ["write"]


def _string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value):
    """Type and bytes of a metadata value."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    kind = struct.unpack("<I", _value(value[0])[:4])[0]
    return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(_value(one)[4:] for one in value)


def write(path, tensors, metadata, *, version=3, endian="<"):
    """A file of `tensors`, {name: (shape, type, bytes)}."""
    header = b"GGUF" + struct.pack(endian + "I", version) + struct.pack("<QQ", len(tensors), len(metadata))
    header += b"".join(_string(name) + _value(value) for name, value in metadata.items())
    body = b""
    for name, (shape, kind, content) in tensors.items():
        dimensions = shape[::-1]
        header += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *dimensions, kind, len(body))
        body += content + bytes(-len(content) % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + body)
    return path
