"""The oracles of our packing as a part of the benchmark: see scripts/oracles/check_packers.py."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.sums import SUMS_NAME
from pipeline.checkpoint.writer import write_json
from pipeline.errors import OutputError
from quality.rows import SCRIPTS, code_version, digest, machine, read_json, tree

ENVIRONMENTS = Path(".env-oracles")
"""Relative to the directory that the benchmark runs in, as the peers' are."""
ORACLES = ("autoawq", "autogptq")
RECORD = "packers.json"


@dataclass(frozen=True)
class Verdict:
    """What the oracles said."""

    text: str
    """Their output for the page, with our version, date and machine."""
    failed: bool


def check(folder: Path, directories: Sequence[Path]) -> Verdict:
    """Hold our packers against AutoAWQ's and AutoGPTQ's own code, and keep what they say.

    folder: the benchmark's; directories: results of ours in either format, each matrix of which is
    checked beside the random ones.  The oracles' environments are made where they are missing.
    What was said stands until code or directories change.
    """
    scripts = SCRIPTS / "oracles"
    sums = [(path / SUMS_NAME).read_text() for path in directories]
    made_from = digest(tree("pipeline"), tree("scripts/oracles"), *sums)
    if read_json(folder / RECORD).get("made_from") == made_from:
        return known(folder)
    if not all((ENVIRONMENTS / name / "bin" / "python").exists() for name in ORACLES):
        made = subprocess.run([scripts / "make_env.sh", ENVIRONMENTS], check=False)
        if made.returncode:
            raise OutputError(f"{ENVIRONMENTS} could not be made; {scripts}/make_env.sh says why")
    command = [sys.executable, str(scripts / "check_packers.py")]
    command += ["--environments", str(ENVIRONMENTS), *map(str, directories)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    record = {
        "made_from": made_from,
        "output": done.stdout.strip(),
        "failed": done.returncode != 0,
        "by": f"{code_version()}, {time.strftime('%Y-%m-%d')}, {machine()}",
    }
    write_json(folder / RECORD, record)
    return known(folder)


def known(folder: Path) -> Verdict:
    """What was kept of the last check."""
    record = read_json(folder / RECORD)
    if not record:
        return Verdict("Our packers have not been checked yet.", False)
    output = "\n".join(f"    {line}" for line in record["output"].splitlines())
    return Verdict(
        f"Our packers judged by the formats' own projects ({record['by']}):\n\n{output}",
        record["failed"],
    )
