"""`requant nightly` against five models of which three go wrong, with real speeds.

    python scripts/nightly/judge.py [--good-nights 7] [--rounds 3]

Converts the micro model, copies it five times, lives through good nights, and then, in each round:
one model loses its config.json, one gets two of its scales tripled (and its checksums renewed), and
the process of one is stopped two thirds of the time, which makes it three times slower.  The night
is run by the command line, a second start is tried while it runs, and the exit code, the outcomes,
the JUnit file and the history's rows are compared with what they must be.  After each round the
models are mended and a good night is run.  Exit code 0: everything as it must be, in all rounds.

What is measured here is speed: on a machine that other work shares, good models are called slow and
slow ones well, and rightly so.  The load average is printed with each night.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import yaml
from brake import Brake
from safetensors.torch import load_file

from pipeline.checkpoint.shard_map import MAP_NAME
from pipeline.checkpoint.sums import write_sums
from pipeline.checkpoint.writer import write_safetensors
from pipeline.nightly.history import History

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "broken": "broken",
    "changed": "regression",
    "slow": "regression",
    "well-1": "ok",
    "well-2": "ok",
}
RECIPE = {
    "source": {"model": str(ROOT / "tests/models/micro-nf4")},
    "requantize": {"group_size": 32},
    "calibration": {
        "sources": [str(ROOT / "calibration/docs-calib.txt")],
        "samples": 8,
        "sequence_length": 64,
    },
    "validate": {
        "text": str(ROOT / "calibration/docs-eval.txt"),
        "window": 64,
        "stride": 32,
        "max_windows": 4,
        "thresholds": {"perplexity_ratio": 2.0},
    },
    "limits": {"threads": 1},
}


class Place:
    """Five models, their recipes and their history in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        recipe = folder / "micro.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE | {"output": {"path": str(folder / "model")}}))
        self._requant("run", recipe)
        (folder / "recipes").mkdir()
        for name in EXPECTED:
            self.mend(name)
            keys = {"model": str(folder / name), "threads": 1, "time_limit_minutes": 10}
            (folder / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(keys))

    def mend(self, name: str) -> None:
        """Put a model back as it was converted."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.copytree(self.folder / "model", self.folder / name)

    def harm(self) -> None:
        """Break one model, change another."""
        (self.folder / "broken" / "config.json").unlink()
        changed = self.folder / "changed"
        shard = min(changed.glob("model-experts-layer-*.safetensors"))
        tensors = load_file(shard)
        for name in [n for n in tensors if n.endswith("down_proj.scales")][:2]:
            tensors[name] = tensors[name] * 3
        write_safetensors(shard, tensors)
        (changed / MAP_NAME).unlink()  # it holds the digest of what it was
        write_sums(changed)

    def night(self) -> tuple[int, dict[str, Any], str]:
        """One night: exit code, summary, and what a second start said to it."""
        # Absolute, so that the brake knows this night's jobs by their command lines.
        command = self._command("nightly", "recipes", "--state", self.folder / "state")
        with subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as running:
            assert running.stderr is not None
            said = running.stderr.readline()
            second = subprocess.run(
                command, cwd=self.folder, capture_output=True, text=True, check=False
            )
            said += running.stderr.read()
        if running.returncode == 2 and b"[1/" not in said:  # no night was begun
            raise SystemExit(f"the night did not start: {said.decode().strip()}")
        refused = f"exit code {second.returncode}: {second.stderr.strip()}"
        summary = json.loads((self.folder / "state/latest/summary.json").read_text())
        return running.returncode, summary, refused

    def rows(self) -> dict[str, int]:
        """Rows of the history by job."""
        history = History(self.folder / "state/history")
        return {name: len(history.of(name)) for name in EXPECTED}

    def junit(self) -> dict[str, str]:
        """Outcome of each job as a reader of JUnit files sees it."""
        words = {"error": "broken", "failure": "regression"}
        suites = ET.parse(self.folder / "state/latest/junit.xml").getroot()
        found = {}
        for case in suites.iter("testcase"):
            bad = [words[child.tag] for child in case if child.tag in words]
            found[str(case.get("name"))] = bad[0] if bad else "ok"
        return found

    def _requant(self, *arguments: object) -> None:
        subprocess.run(self._command(*arguments), cwd=ROOT, check=True, capture_output=True)

    @staticmethod
    def _command(*arguments: object) -> list[str]:
        return [sys.executable, "-m", "pipeline", *map(str, arguments)]


def speeds(summary: dict[str, Any]) -> str:
    """The load of the machine, and what every run of a night decoded, for people to judge by."""
    runs = [
        " and ".join(f"{run.get('decode_tokens_per_second', 0):.0f}" for run in job["runs"])
        for job in summary["jobs"]
    ]
    return f"load {os.getloadavg()[0]:.1f}, tokens/s {', '.join(runs)}"


def bad_night(place: Place) -> list[str]:
    """Live through one bad night; what was not as it must be."""
    before = place.rows()
    place.harm()
    with Brake("slow", 1 / 3, place.folder):
        code, summary, refused = place.night()
    found = {job["job"]: job["outcome"] for job in summary["jobs"]}
    print(f"  {speeds(summary)}")
    for job in summary["jobs"]:
        if job["outcome"] != "ok":
            print(f"  {job['job']}: {job['outcome']} ({job['state']}): {'; '.join(job['reasons'])}")
    checks = {
        f"outcomes {found}": found == EXPECTED,
        f"exit code {code}": code == 2,
        f"JUnit {place.junit()}": place.junit() == EXPECTED,
        f"rows {place.rows()}": place.rows() == {name: count + 1 for name, count in before.items()},
        f"second start {refused}": refused.startswith("exit code 2: requant: another night is"),
    }
    for name in ("broken", "changed"):
        place.mend(name)
    return [what for what, right in checks.items() if not right]


def main() -> int:
    """Good nights, then rounds of a bad and a good one."""
    parser = argparse.ArgumentParser(description="five models, three of them bad")
    parser.add_argument("--good-nights", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        started = time.monotonic()
        for number in range(1, given.good_nights + 1):
            code, summary, _ = place.night()
            print(f"good night {number}, {speeds(summary)}: exit code {code}", flush=True)
            wrong += [f"good night {number}: {summary['summary']}"] if code else []
        for number in range(1, given.rounds + 1):
            print(f"bad night {number}:", flush=True)
            wrong += [f"bad night {number}: {what}" for what in bad_night(place)]
            code, summary, _ = place.night()
            states = {job["job"]: job["state"] for job in summary["jobs"]}
            print(f"  mended: exit code {code}; {states}")
            wrong += [f"after bad night {number}: {summary['summary']}"] if code else []
        print(f"{time.monotonic() - started:.0f} s")
    print("\n".join(wrong) if wrong else "everything as it must be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
