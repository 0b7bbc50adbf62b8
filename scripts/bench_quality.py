"""What quantisation costs, ours beside the peers': one table from one source and one set of tokens.

    python scripts/bench_quality.py [--groups 128,32] [--rows ours]

The source is the demo recipe's model in bf16 (peers cannot read NF4).  Every row is a conversion
in a process of its own, calibrated on the same token ids; what it wrote is dequantised and goes
through one evaluator, the streaming pass in float32, so that only the weights differ: in bf16 the
noise of the arithmetic is as large as the effect on this model.  The peers live in environments of
their own, made on first use by scripts/quality/make_env.sh.  Rows are kept as JSON in --folder and
made again only when something changed that can change them, so that any part may be run alone;
--table prints what there is.  At the end the projects whose formats we write judge what was written
(scripts/oracles/check_packers.py): exit code 1 where a bit differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from quality import packers
from quality.methods import METHODS, SOURCE, slug
from quality.rows import known_rows, make_environment, row, source_row
from quality.table import against_rounding, comparisons, table, versions
from quality.workplace import prepare

from pipeline.errors import OutputError, UserError

BEGIN, END = "<!-- bench_quality.py -->", "<!-- end -->"


def chosen(text: str) -> list[str]:
    """Rows by name, or all of `ours` or `peers`; names those that are unknown."""
    kinds = {
        "ours": [n for n, m in METHODS.items() if not m.environment and n != SOURCE.name],
        "peers": [n for n, m in METHODS.items() if m.environment],
    }
    known = [*kinds["ours"], *kinds["peers"]]
    names = [n for name in text.split(",") for n in kinds.get(name.strip(), [name.strip()])]
    for name in names:
        if name not in known:
            said = f"no row is called {name!r}; known: {', '.join([*kinds, *known])}"
            raise argparse.ArgumentTypeError(said)
    return names


def sizes(text: str) -> list[int]:
    """Group sizes, comma separated."""
    return [int(size) for size in text.split(",")]


def main() -> None:
    """Parse arguments, convert, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--groups", type=sizes, default="128,32", help="comma separated")
    parser.add_argument(
        "--rows", type=chosen, default="ours,peers", help="rows by name, ours, or peers"
    )
    parser.add_argument("--folder", type=Path, default=Path("out/quality"), help="kept here")
    parser.add_argument("--samples", type=int, help="calibration sequences (default: the recipe's)")
    parser.add_argument("--windows", type=int, help="of each evaluation text (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="for us and for the peers")
    parser.add_argument("--again", action="store_true", help="make rows that are known again")
    parser.add_argument("--table", action="store_true", help="print what is known, make nothing")
    parser.add_argument("--docs", type=Path, help="page into which the tables are put as well")
    arguments = parser.parse_args()
    try:
        failed = bench(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(1 if failed else 0)


def bench(arguments: argparse.Namespace) -> bool:
    """Make what is asked for and print it; whether an oracle found our packing wrong."""
    torch.set_num_threads(arguments.threads)
    place = prepare(arguments.folder, arguments.samples, arguments.windows)
    names, groups = arguments.rows, arguments.groups
    if arguments.table:
        rows = known_rows(place, names, groups)
    else:
        for name in names:
            make_environment(METHODS[name])
        rows = [
            row(METHODS[name], group, place, arguments.threads, arguments.again)
            for group in groups
            for name in names
        ]
    made = {(found["method"], found["group"]) for found in rows}
    missing = [f"{name} ({g})" for g in groups for name in names if (name, g) not in made]
    if arguments.table:
        packing = packers.known(place.folder)
    else:
        packing = packers.check(place.folder, packed_by_us(place.folder))
    source = source_row(place)
    parts = [table(rows, source), against_rounding(rows, source), comparisons(rows)]
    parts += [versions(rows), packing.text]
    if missing:
        parts.append(f"Not made yet: {', '.join(missing)}.")
    said = "\n\n".join(parts)
    print(said)
    if arguments.docs:
        insert(arguments.docs, said)
    return packing.failed


def packed_by_us(folder: Path) -> list[Path]:
    """Results of ours in both formats, as far as they are made, whatever rows are asked for."""
    names = [slug(name, group) for name in ("ours gptq", "ours awq") for group in (128, 32)]
    return [path for path in (folder / "models" / name for name in names) if path.is_dir()]


def insert(page: Path, text: str) -> None:
    """Put the tables between the two marks of a page."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise OutputError(f"{page} has no {BEGIN} ... {END} to put the tables into")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    main()
