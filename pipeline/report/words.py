"""Numbers as pages write them."""

from __future__ import annotations


def percent(part: float, digits: int = 2, sign: bool = False) -> str:
    """0.0123 as "1.23 %", with a space that does not break."""
    return f"{100 * part:{'+' if sign else ''},.{digits}f}\N{NO-BREAK SPACE}%"
