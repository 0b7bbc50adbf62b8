"""Rows from standard input into trackio's history, in the folder that TRACKIO_DIR names."""

from __future__ import annotations

import json
import sys

import trackio

from pipeline.nightly.history import PROJECT, RECORD


def main() -> None:
    """One row per record, each in the run of its job; trackio writes when a run is finished."""
    for row in json.load(sys.stdin):
        run = trackio.init(
            project=PROJECT,
            name=row[RECORD]["job"],
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        run.log(row)
        trackio.finish()


if __name__ == "__main__":
    main()
