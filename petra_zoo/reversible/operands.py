"""What torch hands to a mode that sees every call: its operands may be anything."""

from typing import Any

Operand = Any
