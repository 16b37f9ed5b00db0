"""Quantities with units."""

import pytest

from petra_zoo.errors import UserError
from petra_zoo.planning.quantities import format_bytes, parse_bandwidth, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("24 GiB", 24 * 2**30), ("1.5e3MB", 1.5e9), (".5kB", 500.0), ("7B", 7.0)]
)
def test_bytes(text: str, size: float) -> None:
    assert parse_bytes(text, "--memory") == size


@pytest.mark.parametrize(
    ("text", "rate"), [("10GB/s", 1e10), ("100Gbit/s", 12.5e9), ("100Gb/s", 12.5e9), ("800Mbps", 1e8)]
)
def test_bandwidth(text: str, rate: float) -> None:
    assert parse_bandwidth(text, "--bandwidth") == rate


@pytest.mark.parametrize(("text", "seconds"), [("10us", 1e-5), ("0.1ms", 1e-4), ("0s", 0.0), ("5µs", 5e-6)])
def test_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text, "--latency") == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_bytes("24", "--memory"), "--memory '24': the unit is missing; write it like 24GB"),
        (lambda: parse_bytes("24gigs", "--memory"), "the unit 'gigs' is unknown"),
        (lambda: parse_bytes("much", "--memory"), "not a number with a unit"),
        (lambda: parse_bytes("-1GB", "--memory"), "not a number with a unit"),
        (lambda: parse_bytes("0GB", "--memory"), "must be more than 0"),
        (lambda: parse_bandwidth("10GB", "--bandwidth"), "the unit 'GB' is unknown; write it like 10GB/s"),
        (lambda: parse_seconds("10m", "--latency"), "write it like 10us"),
    ],
)
def test_what_is_no_quantity_is_refused(call: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_bytes_for_people() -> None:
    assert [format_bytes(n) for n in (0, 999, 1500, 2_097_152, 24e9)] == ["0 B", "999 B", "1.5 kB", "2.1 MB", "24 GB"]
