"""A token in every place that one can come from is found nowhere else."""

import json
import os
import random
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HUB_TOKEN

from pipeline import secrets as module
from pipeline.nightly.night import run_night


def word() -> str:
    return "hf_" + "".join(random.choices(string.ascii_letters, k=34))


@pytest.fixture
def planted(hub, monkeypatch, tmp_path):
    """Secrets in all places; the first is the one that the Hub's client takes."""
    home = tmp_path / "home"
    home.mkdir()
    found = {"HF_TOKEN": HUB_TOKEN, "HUGGING_FACE_HUB_TOKEN": word(), "file": word()}
    found["stored"], found["webhook"] = word(), f"http://127.0.0.1:9/{word()}"
    (home / "token").write_text(found["file"] + "\n")
    (home / "stored_tokens").write_text(f"[mine]\nhf_token = {found['stored']}\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, found[name])
    monkeypatch.setenv("REQUANT_NIGHTLY_WEBHOOK", found["webhook"])
    return found


@pytest.fixture
def children(monkeypatch):
    """Arguments of every process that is started; the processes really start."""
    seen = []
    real = subprocess.Popen.__init__

    def record(self, arguments, *rest, **options):
        seen.append(" ".join(map(str, arguments)))
        real(self, arguments, *rest, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", record)
    return seen


def holders(folder: Path, planted) -> list[str]:
    """Files below a folder that hold a secret."""
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "home"
        if any(secret.encode() in path.read_bytes() for secret in planted.values())
    ]


def test_all_are_known(planted):
    assert set(planted.values()) <= set(module.secrets())
    line = " ".join(planted.values())
    assert module.redacted(f"at {line}!") == f"at {' '.join(['***'] * 5)}!"
    assert not any(value in str(module.without_secrets(dict(os.environ))) for value in
                   (planted["HF_TOKEN"], planted["webhook"]))  # fmt: skip


def test_nothing_tells_them(planted, children, finished, tmp_path, cli):
    """Publishing, a refusal by the Hub, a missing model, and a night with a webhook."""
    model = shutil.copytree(finished.output, tmp_path / "model")
    said = []
    for words in (
        ("publish", model, "--repo", "acme/m", "--license", "mit", "--dry-run"),
        ("publish", model, "--repo", "acme/m", "--license", "mit"),
        ("publish", model, "--repo", "others/m", "--license", "mit"),
        ("inspect", f"acme/{planted['file']}"),
        ("inspect", "acme/none"),
        ("verify", model, "--json"),
        ("report", model),
        ("doctor", "--json"),
    ):
        answer = cli(*words)
        said += [answer.out, answer.err.replace(f"acme/{planted['file']}", "")]
    assert "http" in said[2]  # it was published
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    night = run_night(
        [str(broken)], tmp_path / "state", roots=[tmp_path], accept=(), keep_nights=2,
        keep_rows=2, announce=said.append,
    )  # fmt: skip
    assert night.code == 2 and any("webhook" in line and "could not" in line for line in said)
    assert len(children) > 1
    everything = "\n".join([*map(str, said), *children, json.dumps(night.records, default=str)])
    assert [name for name, secret in planted.items() if secret in everything] == []
    assert holders(tmp_path, planted) == []


def test_a_recipe_that_holds_one_is_refused(planted, project, cli):
    for name in ("HF_TOKEN", "file"):
        project.write()
        recipe = project.folder / "recipe.yaml"
        recipe.write_text(f"# {planted[name]}\n{recipe.read_text()}")
        answer = cli("run", recipe)
        assert answer.code == 2 and "the recipe holds a token of yours" in answer.err
        assert planted[name] not in answer.err
    assert not project.output.exists() and not project.partial.exists()


def test_tracebacks(planted):
    """Of an error that nobody foresaw."""
    code = (
        "import sys; from pipeline.secrets import redact_tracebacks; redact_tracebacks();"
        f"raise RuntimeError('token ' + {planted['file']!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "RuntimeError: token ***" in done.stderr
    assert planted["file"] not in done.stderr
