"""The files that start a night by themselves all run one command."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "nightly"
UNITS = [SCRIPTS / f"requant-nightly.{kind}" for kind in ("service", "timer")]
COMMAND = "scripts/nightly/run.sh"


def test_the_command_runs_from_anywhere(tmp_path):
    """In a checkout of its own, through a link, with a stand-in that says how it was called."""
    checkout = tmp_path / "check out"
    (checkout / "scripts" / "nightly").mkdir(parents=True)
    shutil.copy(SCRIPTS / "run.sh", checkout / COMMAND)
    stand_in = checkout / ".venv" / "bin" / "requant"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text('#!/bin/sh\npwd\nprintf "<%s>" "$@"\nexit 1\n')
    stand_in.chmod(0o755)
    (tmp_path / "link").symlink_to(checkout / COMMAND)
    for arguments, called in (
        ([], "<nightly><recipes/nightly>"),
        (["a b", "--json"], "<nightly><a b><--json>"),
    ):
        done = subprocess.run(
            [tmp_path / "link", *arguments], capture_output=True, text=True, check=False, cwd="/"
        )
        assert (done.returncode, done.stdout) == (1, f"{checkout}\n{called}")


def test_all_start_the_same_command():
    cron = [
        line for line in (SCRIPTS / "crontab").read_text().splitlines() if not line.startswith("#")
    ]
    assert len(cron) == 1 and cron[0].endswith(f"/{COMMAND}")
    assert f"ExecStart=%h/requant/{COMMAND}\n" in UNITS[0].read_text()
    steps = workflow()["jobs"]["nightly"]["steps"]
    assert sum(COMMAND in step.get("run", "") for step in steps) == 1


def workflow():
    return yaml.safe_load((SCRIPTS / "github-actions.yml").read_text())


def test_the_workflow_is_scheduled_off_the_hour_limited_and_alone():
    found = workflow()
    triggers = found[True]  # YAML 1.1 reads the key `on` as a truth value
    minute = triggers["schedule"][0]["cron"].split()[0]
    assert int(minute) % 15 != 0 and "workflow_dispatch" in triggers
    assert found["concurrency"] == {"group": "nightly", "cancel-in-progress": False}
    assert found["permissions"] == {"contents": "read"}
    (job,) = found["jobs"].values()
    assert job["timeout-minutes"] <= 120
    kept = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert len(kept) == 1 and "cancelled" in kept[0]["if"]  # after a bad night too


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not installed")
def test_the_workflow_passes_actionlint():
    done = subprocess.run(
        ["actionlint", SCRIPTS / "github-actions.yml"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_units_pass_systemd_analyze(tmp_path):
    (tmp_path / "requant").symlink_to(ROOT)
    (tmp_path / "run").mkdir()
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", *UNITS],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")},
    )
    assert (done.returncode, done.stderr) == (0, "")
