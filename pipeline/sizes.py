"""Sizes in bytes, as users write them."""

from __future__ import annotations

from pydantic import ByteSize, TypeAdapter, ValidationError

from pipeline.errors import UserError


def parse_size(size: str | int) -> int:
    """Bytes of a number, or of a size such as 10GiB; UserError for anything else."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        raise UserError(f"{size!r} is not a size; give one such as 10GiB") from None
