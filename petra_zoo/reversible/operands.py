"""What torch hands to, and takes from, whoever sees every call: an operand may be anything."""

from typing import Any

Operand = Any
