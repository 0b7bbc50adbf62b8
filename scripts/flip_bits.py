"""Flip random bits of a finished directory, one at a time, and see what `requant verify` says.

    python scripts/flip_bits.py out/demo --flips 1000            as it is
    python scripts/flip_bits.py out/demo --flips 300 --renew     with SHA256SUMS and the digests in
                                                                 shard_map.json written anew after
                                                                 the flip: what the values tell

Works on a copy.  Half of the flips fall on a byte of the whole, half on a byte of a file chosen
first, so that small files get their share.  Prints a table by kind of file and exits with 1 if a
flip was not found (without --renew).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.header import read_header
from pipeline.checkpoint.seal import edited_card
from pipeline.checkpoint.shard_map import MAP_NAME
from pipeline.checkpoint.sums import SUMS_NAME, UNSEALED, digest_file, write_sums
from pipeline.checkpoint.writer import write_json
from pipeline.stages.verify import verify_model


@dataclass(frozen=True)
class Flip:
    """One bit of one file."""

    file: str
    position: int
    bit: int


def flips(model: Path, count: int, rng: random.Random) -> list[Flip]:
    """Random bits of the files of a directory; see the module's text."""
    sizes = {str(p.relative_to(model)): p.stat().st_size for p in sorted(model.rglob("*"))
             if p.is_file()}  # fmt: skip
    names = list(sizes)
    found = []
    for number in range(count):
        weights = [sizes[name] for name in names] if number % 2 else None
        name = rng.choices(names, weights)[0]
        found.append(Flip(name, rng.randrange(sizes[name]), rng.randrange(8)))
    return found


def flipped(model: Path, flip: Flip, look: Callable[[], bool]) -> bool:
    """What `look` says while one bit of `model` is the other way round."""
    path = model / flip.file
    with path.open("r+b") as stream:
        stream.seek(flip.position)
        value = stream.read(1)[0]
        stream.seek(flip.position)
        stream.write(bytes([value ^ 1 << flip.bit]))
        stream.flush()
        try:
            return look()
        finally:
            stream.seek(flip.position)
            stream.write(bytes([value]))


def kind(model: Path, flip: Flip) -> str:
    """A file, or in a weight file its header or a part of its tensors, for the table."""
    if not flip.file.endswith(".safetensors"):
        return flip.file
    for entry in read_header(model / flip.file, flip.file).entries:
        if entry.offset <= flip.position < entry.offset + entry.nbytes:
            if "validation" in flip.file:
                return f"{flip.file}: {entry.name}"
            part = entry.name.rpartition(".")[2]
            return f"weights: {'dense' if part in ('weight', 'bias') else part}"
    return "headers of weight files"


def renew(model: Path) -> None:
    """Write the sums anew, in SHA256SUMS and in the shard map, if that can still be read."""
    try:
        table = json.loads((model / MAP_NAME).read_bytes())
        for file in table["files"]:
            file["sha256"] = digest_file(model / file["name"])
        write_json(model / MAP_NAME, table)
    except (ValueError, KeyError, TypeError, OSError):
        pass  # the flip fell on the map itself
    write_sums(model)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--renew", action="store_true")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(shutil.copytree(wanted.model, Path(folder) / wanted.model.name))
        kept = {name: (model / name).read_bytes() for name in (SUMS_NAME, MAP_NAME)}
        if verify_model(model):
            sys.exit(f"{wanted.model} does not pass verification as it is")
        seen: Counter[str] = Counter()
        found: Counter[str] = Counter()

        def look() -> bool:
            if wanted.renew:
                renew(model)
            return bool(verify_model(model)) or edited_card(model) is not None

        candidates = flips(model, wanted.flips, random.Random(wanted.seed))
        for flip in candidates:
            if wanted.renew and flip.file in (SUMS_NAME, *UNSEALED):
                continue
            what = kind(model, flip)
            seen[what] += 1
            found[what] += flipped(model, flip, look)
            for name, data in kept.items() if wanted.renew else ():
                (model / name).write_bytes(data)
    for what in sorted(seen):
        print(f"{what:55} {found[what]:5} of {seen[what]:5}")
    print(f"{'all':55} {found.total():5} of {seen.total():5}")
    sys.exit(0 if wanted.renew or found.total() == seen.total() else 1)


if __name__ == "__main__":
    main()
