"""What quantisation costs, ours beside the peers': one table from one source and one set of tokens.

    scripts/quality/make_env.sh gptqmodel        (and gptqmodel-awq, llm-compressor, auto-round)
    python scripts/bench_quality.py [--groups 128,32] [--rows ours]

The source is the demo recipe's model in bf16 (peers cannot read NF4).  Every row is a conversion
in a process of its own, calibrated on the same token ids; what it wrote is dequantised and goes
through one evaluator, the streaming pass in float32, so that only the weights differ: in bf16 the
noise of the arithmetic is as large as the effect on this model.  Rows are kept as JSON in
--folder and made again only when something changed that can change them, so that any part may be
run alone and the table is printed from all there are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from quality.methods import METHODS, SOURCE
from quality.rows import known_rows, row, source_row
from quality.table import comparisons, table, versions
from quality.workplace import prepare


def chosen(text: str) -> list[str]:
    """Rows by name, or all of `ours` or `peers`; SystemExit names those that are unknown."""
    kinds = {
        "ours": [n for n, m in METHODS.items() if not m.environment and n != SOURCE.name],
        "peers": [n for n, m in METHODS.items() if m.environment],
    }
    known = [*kinds["ours"], *kinds["peers"]]
    names = [n for name in text.split(",") for n in kinds.get(name.strip(), [name.strip()])]
    for name in names:
        if name not in known:
            print(f"no row is called {name!r}; known: {', '.join([*kinds, *known])}")
            raise SystemExit(2)
    return names


def main() -> None:
    """Parse arguments, convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--groups", default="128,32", help="group sizes, comma separated")
    parser.add_argument("--rows", default="ours,peers", help="rows by name, ours, or peers")
    parser.add_argument("--folder", type=Path, default=Path("out/quality"), help="kept here")
    parser.add_argument("--samples", type=int, help="calibration sequences (default: the recipe's)")
    parser.add_argument("--windows", type=int, help="of each evaluation text (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="for us and for the peers")
    parser.add_argument("--again", action="store_true", help="make rows that are known again")
    parser.add_argument("--table", action="store_true", help="print what is known, make nothing")
    arguments = parser.parse_args()
    names = chosen(arguments.rows)
    torch.set_num_threads(arguments.threads)
    place = prepare(arguments.folder, arguments.samples, arguments.windows)
    groups = [int(size) for size in arguments.groups.split(",")]
    if arguments.table:
        rows = known_rows(place, names, groups)
    else:
        rows = [
            row(METHODS[name], group, place, arguments.threads, arguments.again)
            for group in groups
            for name in names
        ]
    print(table(rows, source_row(place)))
    print()
    print(comparisons(rows))
    print()
    print(versions(rows))


if __name__ == "__main__":
    main()
