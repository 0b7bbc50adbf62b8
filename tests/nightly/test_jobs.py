"""Targets of a night, and nightly recipes."""

import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.errors import RecipeError, UserError
from pipeline.nightly.jobs import collect
from pipeline.nightly.recipe import load_nightly, parse_nightly

ROOT = Path(__file__).parents[2]


def write(path, **keys):
    path.write_text(yaml.safe_dump(keys))
    return path


def test_the_shipped_recipes_are_jobs(monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs = collect(["recipes/nightly"], [ROOT])
    assert jobs and all(job.problem is None for job in jobs)
    assert "demo" in {job.name for job in jobs}


def test_every_kind_of_target(tmp_path, micro):
    folder = tmp_path / "night"
    folder.mkdir()
    write(folder / "b.yaml", model=str(tmp_path / "m"))
    write(folder / "a.yml", model="org/name", revision="v1")
    (folder / "README.md").write_text("not a recipe")
    jobs = collect([str(folder), str(micro), "org/other@refs/pr/1", "org/plain"], [tmp_path])
    assert [job.name for job in jobs] == [
        "a",
        "b",
        "micro-nf4",
        "org-other-refs-pr-1",
        "org-plain",
    ]
    recipes = [job.recipe for job in jobs]
    assert [(r.model, r.revision) for r in recipes[3:]] == [
        ("org/other", "refs/pr/1"),
        ("org/plain", None),
    ]


def test_a_conversion_recipe_stands_for_its_output(tmp_path, project):
    (job,) = collect([str(project.write())], [tmp_path])
    assert job.name == "recipe" and job.recipe.model == str(project.output)
    assert job.recipe.threads == 1
    assert job.recipe.thresholds.perplexity_ratio == 2.0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "model is missing"),
        ({"model": "m", "modell": "m"}, "unknown key 'modell'; did you mean 'model'?"),
        (
            {"model": "m", "thresholds": {"perplexity_ration": 1}},
            "unknown key 'thresholds.perplexity_ration'; did you mean 'perplexity_ratio'?",
        ),
        (
            {"model": "m", "relative": {"night": 3}},
            "unknown key 'relative.night'; did you mean 'nights'?",
        ),
        ({"model": "m", "time_limit_minutes": 0}, "time_limit_minutes"),
        ({"model": "m", "device_memory": "lots"}, "device_memory"),
        ({"model": 3}, "model"),
        ({"model": "m", "text": "t.txt"}, "text goes with source"),
    ],
)
def test_what_a_recipe_refuses(keys, words):
    with pytest.raises(RecipeError, match=r"r\.yaml") as caught:
        parse_nightly(keys, "r.yaml")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_is_frozen(tmp_path):
    recipe = load_nightly(write(tmp_path / "r.yaml", model="m"))
    with pytest.raises(ValueError, match="frozen"):
        recipe.model = "other"


def test_paths_outside_the_roots_are_refused(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    for number, keys in enumerate(
        (
            {"model": str(outside)},
            {"model": str(inside / ".." / "outside")},
            {"model": str(inside / "link")},
            {"model": str(inside), "source": str(outside)},
            {"model": str(inside), "source": str(inside), "text": "/etc/passwd"},
            {"model": "~/model"},
            {"model": "../outside"},
        )
    ):
        path = write(inside / f"r{number}.yaml", **keys)
        (job,) = collect([str(path)], [inside])
        assert job.recipe is None and "lies outside" in job.problem and "--root" in job.problem
    assert collect([str(inside / "r0.yaml")], [inside, outside])[0].problem is None
    # A conversion's recipe: its output is what is validated.
    data = {"source": {"model": "x/y"}, "output": {"path": str(outside)}}
    path = write(inside / "conversion.yaml", **data)
    (job,) = collect([str(path)], [inside])
    assert job.recipe is None and "model" in job.problem and "lies outside" in job.problem
    assert collect([str(path)], [inside, outside])[0].problem is None
    # A model named on the command line is the user's own word.
    (outside / "config.json").write_text("{}")
    assert collect([str(outside)], [inside])[0].recipe.model == str(outside)


def test_one_bad_recipe_leaves_the_others(tmp_path):
    write(tmp_path / "a.yaml", model=str(tmp_path))
    (tmp_path / "b.yaml").write_text("model: [")
    (tmp_path / "c.yaml").write_text("- model")
    (tmp_path / "d.yaml").write_bytes(b"\xff\xfe\xff")
    jobs = collect([str(tmp_path)], [tmp_path])
    assert [job.problem is None for job in jobs] == [True, False, False, False]
    assert all("\n" not in job.problem for job in jobs[1:])


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nothing.yaml", "no recipe at nothing.yaml"),
        ("nothing", "neither a recipe"),
        ("a/b/c", "neither a recipe"),
        ("../x", "neither a recipe"),
        ("empty", "holds neither a model"),
    ],
)
def test_targets_that_are_none(tmp_path, monkeypatch, target, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        collect([target], [tmp_path])


def test_two_jobs_of_one_name(tmp_path, micro):
    shutil.copytree(micro, tmp_path / "micro-nf4")
    with pytest.raises(UserError, match="two jobs are called micro-nf4"):
        collect([str(micro), str(tmp_path / "micro-nf4")], [])


def test_without_the_extra_it_says_what_to_install(cli, monkeypatch):
    monkeypatch.setattr("pipeline.verbs.share.find_spec", lambda _name: None)
    answer = cli("nightly", "recipes/nightly")
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert "pip install -e '.[nightly]' in requant's checkout" in answer.err
