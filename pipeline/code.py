"""Which code makes the bytes of a result.

An upgrade of the program in the middle of a conversion could give the layers to come other
constants than those that are done.  No list of constants stays complete, so the fingerprint of the
work holds a digest of the code itself: of everything below the rooms that decide bytes.  Comments,
docstrings and layout do not count.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

ROOMS = (
    *("calibration", "checkpoint", "evaluate", "models", "quantize", "stages"),
    *("hybrid/delta_prefill.py", "hybrid/delta_kernels.py"),  # DeltaNet over texts on a GPU
)
"""The rooms, and single files of others, whose code can change a byte of a result."""


@cache
def code_digest() -> str:
    """Sixteen hex digits of the code in `ROOMS`, as it lies on the disk now.

    Another Python version may give another digest of the same code.
    """
    return digest_of(Path(__file__).parent, ROOMS)


def digest_of(package: Path, rooms: tuple[str, ...]) -> str:
    """Digest of some Python files of a package, and of all below some of its directories."""
    whole = hashlib.sha256()
    for room in rooms:
        place = package / room
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            whole.update(f"{path.relative_to(package)}\0".encode())
            whole.update(_meaning(path.read_text()).encode() + b"\0")
    return whole.hexdigest()[:16]


def _meaning(source: str) -> str:
    """The syntax tree of a file without what does nothing."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(line: ast.AST) -> bool:
    """A docstring, or the text below a constant that explains it."""
    return (
        isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    )
