"""Publishing over real HTTP: all or nothing, resumed, verified, and never a token in sight."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import HUB_TOKEN
from huggingface_hub import ModelCard, constants, snapshot_download
from support.hub import HubServer
from support.kill import process_context

from pipeline.cli import main
from pipeline.hub import client

REPO = "acme/micro-gptq"
SAID = ["--repo", REPO, "--license", "apache-2.0"]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(client, "WAITS", (0.01, 0.02, 0.04))


@pytest.fixture
def model(finished, tmp_path) -> Path:
    """A finished conversion of one's own."""
    return shutil.copytree(finished.output, tmp_path / "micro")


def _visible(hub: HubServer, repo: str = REPO, branch: str = "main") -> dict[str, bytes]:
    """The files of a branch without the one that the Hub makes itself."""
    found = hub.store.repos.get(("model", repo))
    tree = found.head(branch) if found else {}
    return {name: blob.data for name, blob in tree.items() if name != ".gitattributes"}


def _on_disk(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}


def _never_half(hub: HubServer, model: Path) -> None:
    """Every state that the repository was ever in is the first one or a whole model."""
    names = set(_on_disk(model)) | {".gitattributes"}
    for commit in list(hub.store.repos["model", REPO].commits.values())[1:]:
        assert set(commit.tree) == names


def _shard_bytes(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def test_round_trip(cli, hub, model, tmp_path):
    answer = cli("publish", model, *SAID, "--json")
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    assert _visible(hub) == _on_disk(model)
    assert hub.received == _shard_bytes(model)
    _never_half(hub, model)
    folder = Path(snapshot_download(REPO, endpoint=hub.url, cache_dir=tmp_path / "fresh"))
    assert folder.name == told["commit"]
    assert cli("verify", folder).code == 0
    measured = cli("validate", folder)
    assert measured.code == 0, measured.err
    again = json.loads((folder / "report.json").read_text())
    before = json.loads((model / "report.json").read_text())
    assert again["quantized"]["perplexity"] == pytest.approx(before["quantized"]["perplexity"])


def test_the_same_command_again_sends_nothing(cli, hub, model):
    assert cli("publish", model, *SAID).code == 0
    sent, commits = hub.received, len(hub.store.repos["model", REPO].commits)
    answer = cli("publish", model, *SAID)
    assert answer.code == 0
    assert "as it was" in answer.out
    assert (hub.received, len(hub.store.repos["model", REPO].commits)) == (sent, commits)


def test_a_new_card_alone_is_sent(cli, hub, model):
    assert cli("publish", model, *SAID).code == 0
    sent = hub.received
    card = model / "README.md"
    card.write_text(card.read_text().replace("## Limits", "## What to mind"))
    answer = cli("publish", model, *SAID)
    assert answer.code == 0, answer.err
    assert "was edited" in answer.err
    assert hub.received == sent
    assert _visible(hub)["README.md"] == card.read_bytes()


def test_another_model_of_ours_replaces_the_first(cli, hub, model):
    assert cli("publish", model, *SAID).code == 0
    repo = hub.store.repos["model", REPO]
    old = repo.head() | {"model-experts-layer-099.safetensors": repo.head()["config.json"]}
    repo.commit("main", "one layer more", old)
    assert cli("publish", model, *SAID).code == 0
    assert _visible(hub) == _on_disk(model)


STEPS = (
    "POST /api/validate-yaml",
    "POST /api/repos/create",
    "batch",
    "PUT /put",
    "POST .*/commit/",
    "GET .*/tree/",
)
FAULTS = [(kind, where) for kind in ("status", "cut", "lost") for where in STEPS]


@pytest.mark.parametrize(("kind", "where"), [*FAULTS, ("flip", "PUT /put")])
def test_single_faults_are_got_over(cli, hub, model, kind, where):
    hub.faults.add(kind, on=where, status=503)
    answer = cli("publish", model, *SAID)
    assert hub.faults.struck
    assert answer.code == 0, answer.err
    assert _visible(hub) == _on_disk(model)
    _never_half(hub, model)
    assert len(hub.store.repos["model", REPO].commits) == 2


def _publish_there(variables: dict[str, str], model: Path) -> None:
    """`requant publish` in a process of its own."""
    os.environ |= variables
    constants.HF_HUB_DISABLE_XET = True  # read when it was imported
    sys.argv = ["requant", "publish", str(model), *SAID]
    main()


def _start(hub: HubServer, model: Path):
    variables = hub.environment(HUB_TOKEN)
    process = process_context().Process(target=_publish_there, args=(variables, model))
    process.start()
    return process


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_a_killed_publication_goes_on_without_sending_a_shard_twice(hub, model, share):
    size = _shard_bytes(model)

    def kill(received: int) -> bool:
        if received < share * size:
            return False
        hub.watch = None
        first.kill()
        return True

    hub.watch = kill
    first = _start(hub, model)
    first.join()
    assert first.exitcode == -signal.SIGKILL
    assert not _visible(hub)
    whole = set(hub.store.repos["model", REPO].objects)
    second = _start(hub, model)
    second.join()
    assert second.exitcode == 0
    assert _visible(hub) == _on_disk(model)
    puts = [r.path.partition("?")[0].rpartition("/")[2] for r in hub.seen("PUT", "/put/")]
    assert all(puts.count(oid) == 1 for oid in whole)


def test_a_dry_run_writes_the_card_and_asks_nobody(cli, hub, model):
    answer = cli("publish", model, *SAID, "--dry-run")
    assert answer.code == 0, answer.err
    assert not hub.requests
    card = ModelCard.load(model / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert {"gptq", "4-bit", "requant", "qwen3_next"} <= set(card.data.tags)
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    report = json.loads((model / "report.json").read_text())
    assert figures["perplexity"] == pytest.approx(report["quantized"]["perplexity"], abs=1e-5)
    for part in ("pipeline.hybrid", "GPTQModel.load", "vllm serve", "## Limits", "baseline"):
        assert part in card.text
    assert (model / "recipe.yaml").read_text().strip() in card.text


def test_on_a_branch_and_private(cli, hub, model):
    assert cli("publish", model, *SAID, "--private", "--revision", "next").code == 0
    assert hub.store.repos["model", REPO].private
    assert not _visible(hub)
    assert _visible(hub, branch="next") == _on_disk(model)


def _refused(answer, *parts: str) -> None:
    assert answer.code == 2, answer
    assert answer.err.strip().count("\n") == answer.err.count("\n") - 1
    last = answer.err.strip().splitlines()[-1]
    assert last.startswith("requant: ")
    assert "Traceback" not in answer.err
    for part in parts:
        assert part in last, last
    assert HUB_TOKEN not in answer.out + answer.err


def test_refused_before_anything_is_sent(cli, hub, model, monkeypatch):
    _refused(cli("publish", model, "--repo", "acme/a--b"), "ORG/NAME")
    _refused(cli("publish", model, "--repo", "nameless"), "ORG/NAME")
    _refused(cli("publish", model, "--repo", REPO), "licence", "--license")
    _refused(cli("publish", model, "--repo", REPO, "--license", "My Own"), "none of the Hub's")
    _refused(cli("publish", model / "nowhere", *SAID), "not a directory")
    monkeypatch.delenv("HF_TOKEN")
    _refused(cli("publish", model, *SAID), "HF_TOKEN")
    assert not hub.requests


def test_what_is_not_validated_is_refused_or_says_so(cli, hub, model):
    (model / "report.json").unlink()
    _refused(cli("publish", model, *SAID), "not validated", "--unvalidated")
    assert cli("publish", model, *SAID, "--unvalidated").code == 0
    assert b"**Not validated.**" in _visible(hub)["README.md"]


def test_a_report_of_other_weights_does_not_count(cli, hub, model):
    with (model / "SHA256SUMS").open("a") as sums:
        sums.write("\n")
    _refused(cli("publish", model, *SAID), "changed since it was validated")


def test_a_damaged_model_is_refused(cli, hub, model):
    shard = next(model.glob("model-experts-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    _refused(cli("publish", model, *SAID), "verify", shard.name)
    assert not hub.requests


def test_what_a_kill_left_of_a_card_is_swept(cli, hub, model):
    left = model / f".README.md.{1 << 22}.tmp"  # no process of Linux has this number
    left.write_text("half")
    assert cli("publish", model, *SAID).code == 0
    assert not left.exists() and _visible(hub) == _on_disk(model)


def test_a_token_in_a_file_is_not_published(cli, hub, model):
    recipe = model / "recipe.yaml"
    recipe.write_text(f"# {HUB_TOKEN}\n{recipe.read_text()}")
    _refused(cli("publish", model, *SAID), "recipe.yaml", "take it out")
    assert not hub.requests


def test_a_card_that_the_hub_refuses(cli, hub, model):
    answer = cli("publish", model, "--repo", REPO, "--license", "my-own-2.0")
    _refused(answer, '"license" must be one of', "README.md", "--license")
    assert ("model", REPO) not in hub.store.repos  # neither made nor sent to
    assert cli("publish", model, *SAID).code == 0


def test_refused_by_the_hub(cli, hub, model, monkeypatch):
    hub.store.seed("acme/texts", {"a.txt": b"x"}, kind="dataset")
    words = ["--license", "apache-2.0"]
    _refused(cli("publish", model, "--repo", "acme/texts", *words), "data set")
    hub.store.seed("acme/theirs", {"model.safetensors": b"x"})
    _refused(cli("publish", model, "--repo", "acme/theirs", *words), "did not publish")
    hub.store.seed("acme/public", {})
    _refused(cli("publish", model, "--repo", "acme/public", *words, "--private"), "public")
    _refused(cli("publish", model, "--repo", "others/model", *words), "rights")
    commit = hub.store.seed("acme/empty", {})
    _refused(cli("publish", model, "--repo", "acme/empty", *words, "--revision", commit), "branch")
    unknown = ["--revision", "0" * 40]
    _refused(cli("publish", model, "--repo", "acme/empty", *words, *unknown), "no revision 000")
    hub.store.quota = 1000
    _refused(cli("publish", model, *SAID), "storage limit")
    hub.store.quota = None
    hub.faults.add("status", times=99, status=503)
    _refused(cli("publish", model, *SAID), "503", "goes on from here")
    hub.faults.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    _refused(cli("publish", model, *SAID), "refuses the token")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    _refused(cli("publish", model, *SAID), "cannot be reached")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    assert cli("publish", model, *SAID).code == 0
    assert _visible(hub) == _on_disk(model)


def test_a_token_that_expires_on_the_way(cli, hub, model):
    hub.faults.add("expire", on="batch", after=1)
    _refused(cli("publish", model, *SAID), "refuses the token")
    assert not _visible(hub)
    hub.store.tokens[HUB_TOKEN].expired = False
    assert cli("publish", model, *SAID).code == 0
    assert _visible(hub) == _on_disk(model)


def test_a_commit_of_someone_else_meanwhile(cli, hub, model):
    repo = hub.store.create("model", REPO, False, hub.store.tokens[HUB_TOKEN])

    def commit(received: int) -> bool:
        if received:
            hub.watch = None
            repo.commit("main", "meanwhile", dict(repo.head()))
        return False

    hub.watch = commit
    _refused(cli("publish", model, *SAID), "someone else")
    assert cli("publish", model, *SAID).code == 0


def test_the_token_is_nowhere(cli, hub, model, tmp_path):
    hub.faults.add("status", on="PUT", status=500)
    answer = cli("publish", model, *SAID)
    assert answer.code == 0
    assert HUB_TOKEN not in answer.out + answer.err
    assert any(HUB_TOKEN in r.headers.get("authorization", "") for r in hub.requests)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or HUB_TOKEN.encode() not in path.read_bytes(), path


def test_a_recipe_publishes_what_it_made(project, hub):
    project.change(publish={"repo": REPO, "license": "apache-2.0"})
    project.run()
    assert _visible(hub) == _on_disk(project.output)
    sent = hub.received
    project.run()
    assert hub.received == sent
    assert _visible(hub) == _on_disk(project.output)


def test_a_result_that_misses_its_thresholds_stays_here(project, hub):
    project.change(
        publish={"repo": REPO, "license": "apache-2.0"},
        validate={"thresholds": {"perplexity_ratio": 0.5}},
    )
    project.run()
    assert any("not published" in line for line in project.said)
    assert not hub.requests


def test_a_run_that_could_not_publish_is_refused_at_once(project, hub, monkeypatch):
    project.change(publish={"repo": REPO})
    with pytest.raises(Exception, match="licence"):
        project.run()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(Exception, match="HF_TOKEN"):
        project.run()
    assert not project.partial.exists()
