"""Quantities with units, as people write them: 10GB/s, 10us, 24GiB."""

from __future__ import annotations

import re

from petra_zoo.errors import UserError

_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_PREFIXES |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}
_BYTES = {f"{prefix}B": factor for prefix, factor in _PREFIXES.items()}
_RATES = {f"{name}/s": factor for name, factor in _BYTES.items()}
_RATES |= {f"{prefix}{bit}": f / 8 for prefix, f in _PREFIXES.items() for bit in ("b/s", "bit/s", "bps")}
_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([^\s0-9]*)\s*")


def parse_bytes(text: str, name: str) -> float:
    """Bytes from, for example, 24GB (1e9) or 24GiB (2**30); `name` is what an error calls it."""
    return _parse(text, name, _BYTES, "24GB, 24GiB or 500MB")


def parse_bandwidth(text: str, name: str) -> float:
    """Bytes per second from, for example, 10GB/s, or 100Gbit/s, of which 8 are a byte."""
    return _parse(text, name, _RATES, "10GB/s, 900MB/s or 100Gbit/s")


def parse_seconds(text: str, name: str) -> float:
    """Seconds from, for example, 10us, 0.1ms or 0s."""
    return _parse(text, name, _SECONDS, "10us, 0.1ms or 0s", zero=True)


def format_bytes(size: float) -> str:
    """Bytes for people, in powers of 1000: 1.25 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 999.5 * factor else f"{size / factor:.0f} {unit}"
    return f"{size:.0f} B"


def _parse(text: str, name: str, units: dict[str, float], examples: str, zero: bool = False) -> float:
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None:
        raise UserError(f"{name} {text!r} is not a number with a unit: write it like {examples}")
    number, unit = float(match[1]), match[2]
    if unit not in units:
        given = f"the unit {unit!r} is unknown" if unit else "the unit is missing"
        raise UserError(f"{name} {text!r}: {given}; write it like {examples}")
    if number == 0 and not zero:
        raise UserError(f"{name} {text!r} must be more than 0")
    return number * units[unit]
