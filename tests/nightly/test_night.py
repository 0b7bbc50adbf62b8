"""A real night: five models, one broken, one with a changed weight, one slower than it was."""

import fcntl
import json
import random
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from flip_bits import renew
from huggingface_hub import constants
from safetensors.torch import load_file
from support.browser import CHROMIUM, Browser

from pipeline.checkpoint.writer import write_safetensors
from pipeline.errors import UserError
from pipeline.nightly import night
from pipeline.nightly.attempt import Attempt
from pipeline.nightly.history import History
from pipeline.nightly.night import run_night
from pipeline.nightly.recipe import parse_nightly
from pipeline.nightly.worker import examine
from pipeline.stages import validate

pytestmark = pytest.mark.xdist_group("nightly")

NAMES = ("broken", "changed", "slow", "well-1", "well-2")
SPEEDS = ("decode_tokens_per_second", "prefill_tokens_per_second")
OUTCOMES = {
    "broken": "broken",
    "changed": "regression",
    "slow": "regression",
    "well-1": "ok",
    "well-2": "ok",
}


def triple_one_scale(model: Path) -> None:
    """A changed weight in a directory that is otherwise consistent, checksums included."""
    shard = sorted(model.glob("model-experts-layer-*.safetensors"))[0]
    tensors = load_file(shard)
    for name in [n for n in tensors if n.endswith("down_proj.scales")][:2]:
        tensors[name] = tensors[name] * 3
    write_safetensors(shard, tensors)
    renew(model)


@pytest.fixture(scope="module")
def place(tmp_path_factory, finished):
    """Five models with their recipes, and the history of one good night.

    The slow one's history says that it was a thousand times as fast.  So no load of the machine
    that tests run on can hide that it is slower tonight; how well slowness of a process is found
    on a machine of its own is measured by scripts/nightly/judge.py.
    """
    root = tmp_path_factory.mktemp("nightly")
    (root / "recipes").mkdir()
    for name in NAMES:
        shutil.copytree(finished.output, root / name)
        recipe = {"model": str(root / name), "threads": 1, "time_limit_minutes": 10}
        if name == "slow":  # only here speed is compared from the second night on
            recipe["relative"] = {"minimum": 1}
        (root / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    first = go(root, "recipes/well-1.yaml")
    assert first.code == 0
    history = History(root / "state" / "history")
    good = first.records[0]
    faster = {f: s * (1000 if f in SPEEDS else 1) for f, s in good["runs"][0].items()}
    history.append(
        [
            good | {"job": name} | ({"runs": [faster]} if name == "slow" else {})
            for name in NAMES
            if name != "well-1"
        ]
    )
    return root


def go(root, *targets, said=None, **options):
    options = {"accept": (), "keep_nights": 30, "keep_rows": 400} | options
    return run_night(
        [str(root / target) for target in targets],
        root / "state",
        roots=[root],
        announce=(said if said is not None else []).append,
        **options,
    )


@pytest.fixture(scope="module")
def head():
    """The commit that this night is of."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@pytest.fixture(scope="module")
def bad(place, head):
    """The night on which three of the five went wrong."""
    (place / "broken" / "config.json").write_text("{")
    triple_one_scale(place / "changed")
    return go(place, "recipes")


def test_exactly_the_bad_ones_are_reported(bad):
    assert {r["job"]: r["outcome"] for r in bad.records} == OUTCOMES
    states = {r["job"]: r["state"] for r in bad.records}
    assert [states[name] for name in NAMES] == ["new", "new", "new", "ok", "ok"]
    assert bad.code == 2
    reasons = {r["job"]: " ".join(r["reasons"]) for r in bad.records}
    assert "config.json" in reasons["broken"]
    assert "kl_divergence" in reasons["changed"] and "tokens_per_second" not in reasons["changed"]
    assert "tokens_per_second" in reasons["slow"] and "kl_divergence" not in reasons["slow"]
    changed = {r["job"]: r["changed"] for r in bad.records}
    assert changed["changed"][0].startswith("the model's files: ") and changed["slow"] == []


def test_bad_jobs_ran_twice_and_good_ones_once(bad):
    assert [len(r["runs"]) for r in bad.records] == [2, 2, 2, 1, 1]


def test_history_grew_by_one_row_each(place, bad):
    history = History(place / "state" / "history")
    for record in bad.records:
        rows = history.of(record["job"])
        assert len(rows) == 2 and rows[-1] == record


def test_what_is_recorded(head, bad):
    record = bad.records[-1]
    assert record["seed"] == 0 and record["versions"].keys() >= {"torch", "requant", "python"}
    assert record["machine"]["threads"] == 1 and record["machine"]["cpu"]
    for key in ("source", "quantized", "placement", "experts", "stages", "load_seconds"):
        assert key in record["report"]
    assert (record["commit"] or "").rstrip("+") == head


def test_no_model_was_written_to(place, finished):
    for name in ("well-1", "slow"):
        for file in ("report.json", "SHA256SUMS"):
            assert (place / name / file).read_bytes() == (finished.output / file).read_bytes()


def test_junit_and_json(bad):
    suites = ET.parse(bad.folder / "junit.xml").getroot()
    (suite,) = suites
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("5", "2", "1")
    found = {case.get("name"): [child.tag for child in case] for case in suite}
    assert found["broken"][-1] == "error" and found["slow"][-1] == "failure"
    assert found["well-1"] == ["properties"]
    summary = json.loads((bad.folder / "summary.json").read_text())
    assert summary["exit_code"] == 2 and summary["jobs"] == list(bad.records)
    assert summary["summary"] == "5 jobs: 2 ok, 2 regression, 1 broken"
    latest = (bad.folder.parent.parent / "latest" / "summary.json").read_text()
    assert json.loads(latest)["started"] >= bad.started


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt: chromium)")
def test_the_page_in_a_browser(bad):
    page = bad.folder / "index.html"
    with Browser() as browser:
        for width, dark in ((400, False), (400, True), (1400, False), (1400, True)):
            name = f"nightly-{width}-{'dark' if dark else 'light'}"
            seen = browser.open(page, width, dark=dark, screenshot=name)
            assert seen.requests == [page.resolve().as_uri()] and seen.complaints == []
            assert seen.overflow <= 0 and seen.wide == []
            assert "5 jobs: 2 ok, 2 regression, 1 broken (3 new)." in seen.text
        reached = browser.tabbed(page, 9)
    assert reached[0] == "a Skip to the content"
    assert "a broken: broken (new)" in reached and "div Tonight's jobs" in reached


def test_accepted_figures_are_the_new_normal(place, bad):
    following = go(place, "recipes/changed.yaml", accept=["changed"])
    (record,) = following.records
    assert (record["outcome"], record["state"], record["accepted"]) == ("ok", "fixed", True)
    assert following.code == 0 and record["baseline"] == {}


def examined(place, **keys):
    """What one run misses, measured in this process."""
    recipe = parse_nightly({"model": str(place / "well-2"), "threads": 1} | keys, "here")
    return night._misses(recipe, Attempt(1.0, None, examine(recipe)))


def test_damage_is_a_miss_though_it_can_be_measured(place, bad, one_thread, monkeypatch):
    """A changed byte that costs no quality, in a directory whose sums say so."""
    monkeypatch.setattr(validate, "DECODE_TOKENS", 8)
    file = place / "well-2" / "tokenizer_config.json"
    before = file.read_bytes()
    file.write_bytes(before + b"\n")
    try:
        (miss,) = examined(place)
    finally:
        file.write_bytes(before)
    assert miss.startswith("damaged: tokenizer_config.json")


def test_absolute_bounds(place, bad, one_thread, monkeypatch):
    monkeypatch.setattr(validate, "DECODE_TOKENS", 8)
    misses = {
        "perplexity_ratio": 0.1,  # in place of the model's own 2.0
        "decode_tokens_per_second": 1e9,
        "load_seconds": 1e-6,
        "peak_host_bytes": "1MiB",
    }
    found = examined(place, verify=False, thresholds=misses)
    assert [miss.split()[0] for miss in found] == list(misses)


def test_a_job_past_its_time_limit_is_ended(place, bad):
    recipe = {"model": str(place / "well-1"), "time_limit_minutes": 0.005}
    (place / "late.yaml").write_text(yaml.safe_dump(recipe))
    late = go(place, "late.yaml")
    assert late.code == 2
    assert late.records[0]["reasons"] == ["took longer than its time limit of 0.3 s"]


def test_a_second_start_is_refused(place, cli, monkeypatch):
    """Against a night in another process, which is stopped as systemd stops it."""
    monkeypatch.chdir(place)
    command = [sys.executable, "-m", "pipeline", "nightly", "well-1", "--state", "other"]
    with subprocess.Popen(command, cwd=place, stderr=subprocess.PIPE, text=True) as running:
        assert "[1/1] well-1" in running.stderr.readline()
        running.send_signal(signal.SIGSTOP)  # it cannot end before the second one has begun
        answer = cli("nightly", "well-1", "--state", "other")
        running.terminate()
        running.send_signal(signal.SIGCONT)
        assert running.wait(120) == 130
        assert "Traceback" not in running.stderr.read()
    assert answer.code == 2 and answer.out == ""
    assert f"another night is running (process {running.pid}, since 20" in answer.err
    assert answer.err.count("\n") == 1
    with (place / "other" / "lock").open() as lock:  # free again
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for folder in Path("/proc").glob("[0-9]*"):  # its job was ended with it
        try:
            assert str(place / "other").encode() not in (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue


def test_old_nights_are_deleted(place, bad, monkeypatch):
    """Without a job to wait for: a recipe that cannot be read."""
    (place / "none.yaml").write_text("model: [")
    mine = place / "state" / "nights" / "mine"
    mine.mkdir()
    nights = [go(place, "none.yaml", keep_nights=2, keep_rows=3) for _ in range(4)]
    states = [found.records[0]["state"] for found in nights]
    assert states == ["new", *["still failing"] * 3]
    folders = [found.folder for found in nights]
    left = sorted(path for path in mine.parent.iterdir() if path != mine)
    assert left == folders[-2:] and mine.is_dir()
    assert (place / "state" / "latest").resolve() == folders[-1].resolve()
    assert len(History(place / "state" / "history").of("none")) == 3


def test_a_damaged_history_is_said_once(place, bad):
    (place / "none.yaml").write_text("model: [")
    (place / "state" / "history" / "nightly.db").write_bytes(b"no database")
    said: list[str] = []
    first = go(place, "none.yaml", said=said)
    assert "the history was damaged" in said[0] and "a new one begun" in first.notes[0]
    assert go(place, "none.yaml").notes == ()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "neither a recipe"),
        (["well-1", "--accept", "other"], "--accept other: no such job; tonight's are well-1"),
        (["well-1", "--state", "recipes/slow.yaml"], "cannot be written to"),
    ],
)
def test_mistakes_are_one_line(place, cli, monkeypatch, arguments, words):
    monkeypatch.chdir(place)
    answer = cli("nightly", *arguments)
    assert answer.code == 2 and words in answer.err and answer.err.count("\n") == 1


def test_an_unknown_hub_id_is_one_line(hub):
    recipe = parse_nightly({"model": "org/no-such-model", "revision": "no-such"}, "here")
    with pytest.raises(UserError) as caught:
        examine(recipe)
    words = str(caught.value)
    assert words.startswith("revision no-such: ") and "org/no-such-model" in words
    assert "\n" not in words


def test_a_model_from_the_hubs_cache(finished, tmp_path, one_thread, monkeypatch):
    """Laid out as huggingface_hub does: a snapshot of links, named after its commit."""
    commit = f"{random.getrandbits(160):040x}"
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(finished.output, repository / "blobs")
    for blob in (repository / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(validate, "DECODE_TOKENS", 8)
    for revision in (None, commit):
        found = examine(parse_nightly({"model": "org/name", "revision": revision}, "here"))
        assert found["revision"] == commit and found["problems"] == []
        assert found["report"]["perplexity_ratio"] == finished.report()["perplexity_ratio"]


def test_a_directory_has_no_revision(micro):
    recipe = parse_nightly({"model": str(micro), "revision": "v1"}, "here")
    with pytest.raises(UserError, match="revision goes with a Hub id"):
        examine(recipe)


def test_states_over_many_nights():
    """What is flaky: it went to and fro."""

    def state(past, bad, runs=1, watched=()):
        records = [{"outcome": "regression" if was else "ok"} for was in past]
        now = {"outcome": "regression" if bad else "ok", "runs": [{}] * runs, "watched": watched}
        return night._state(now, records)

    assert state([], True) == "new" and state([], False) == "ok"
    assert state([0, 0, 1], True) == "still failing"
    assert state([0, 0, 1, 1], False) == "fixed"
    assert state([0, 1, 0], True) == state([0, 1, 0, 1], False) == "flaky"
    assert state([0, 1, 0] + [0] * 9, True) == "new"
    assert state([0], False, runs=2) == "flaky"
    assert state([0], False, runs=2, watched=["slow"]) == "watched"
