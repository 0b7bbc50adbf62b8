"""Every hostile case of docs/security.md gets the line that the page shows, and nothing else."""

import re
import resource
import shutil
from pathlib import Path

import pytest
from cases import CHECKPOINTS, RECIPES

from pipeline.cli import main  # noqa: F401  (imported before memory is looked at)

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
ROW = re.compile(r"^\| ([^|]+?) \| `(.*)` \|$", re.MULTILINE)
MEGABYTE = 1 << 20


@pytest.fixture(scope="session")
def shown():
    """Case -> line, as the page has them."""
    return dict(ROW.findall(PAGE.read_text()))


def line_of(answer, *places):
    """The one line that was said, with the test's own paths in words."""
    assert answer.code in (1, 2) and "Traceback" not in answer.err, answer
    line = answer.err if answer.code == 2 else answer.out.splitlines()[0] + "\n"
    for path, word in places:
        line = line.replace(str(path), word)
    assert line.endswith("\n") and line.count("\n") == 1, line
    assert line.rstrip("\n").isprintable() and len(line) < 700
    return line.rstrip("\n").removeprefix("requant: ").replace("|", "/")


def meet(name, tmp_path, micro, finished, project, cli):
    spoil, verb = CHECKPOINTS[name]
    source = finished.output if verb.endswith("gptq") else micro
    model = shutil.copytree(source, tmp_path / "model")
    spoil(model)
    before = peak()
    if verb == "plan":
        project.change(source={"model": str(model)})
        answer = cli("run", project.write())
        assert not project.partial.exists() and not project.output.exists()
    elif verb.startswith("verify"):
        (model / "SHA256SUMS").unlink()
        answer = cli("verify", model)
    else:
        answer = cli(verb, model)
    grown = peak() - before
    return line_of(answer, (model, "MODEL"), (tmp_path, "TMP")), grown


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name, tmp_path, micro, finished, project, cli, shown):
    line, grown = meet(name, tmp_path, micro, finished, project, cli)
    print(f"| {name} | `{line}` |")
    assert line == shown.get(name)
    assert grown < 500 * MEGABYTE


def meet_recipe(name, tmp_path, cli):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(RECIPES[name])
    return line_of(cli("plan", path), (path, "RECIPE"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, tmp_path, cli, shown):
    line = meet_recipe(name, tmp_path, cli)
    print(f"| {name} | `{line}` |")
    assert line == shown.get(name)


def test_the_page_shows_no_case_that_is_not_tested(shown):
    assert shown.keys() <= CHECKPOINTS.keys() | RECIPES.keys()
