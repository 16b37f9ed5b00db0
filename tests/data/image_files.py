"""Image files as people have them."""

from pathlib import Path


def damage(path: Path) -> Path:
    """Damages a file such that Pillow's plugin raises neither OSError nor ValueError: AVIF or DDS."""
    content = bytearray(path.read_bytes())
    if path.suffix == ".dds":
        content[80:84] = bytes(4)  # the flags of the pixel format: NotImplementedError
    else:
        at = content.index(b"iloc")
        content[at : at + 4] = b"free"  # the box that says where the pixels are: RuntimeError
    path.write_bytes(content)
    return path
