"""Pages that would otherwise fall behind the program."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.recipe import parse_recipe

ROOT = Path(__file__).parents[1]


def test_help_texts_are_in_step():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "command_docs.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def commands() -> list[str]:
    """Every `requant` command of the pages, in code blocks."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    blocks = [b for p in pages for b in re.findall(r"```\n(.*?)```", p.read_text(), re.DOTALL)]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return sorted({line for line in lines if re.match(r"requant [a-z]+ [^\[|]*$", line)})


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_pages_exist(line, cli):
    """Their verbs and options are known: with --help at the end nothing else is looked at."""
    words = shlex.split(line, comments=True)
    assert cli(words[1], "--help").code == 0, line
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    known = cli(words[1], "--help").out
    assert all(f"{option} " in known or f"{option}\n" in known for option in options), line


def keys(section: dict, prefix: str = "") -> dict:
    """Every key of a resolved recipe by its dotted name."""
    found = {}
    for name, value in section.items():
        if isinstance(value, dict):
            found |= keys(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def test_every_key_of_a_recipe_is_documented_with_its_default():
    page = (ROOT / "docs" / "recipe.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| (.*?) \| .+ \|$", page, re.MULTILINE)
    needed = {"source": {"model": "m"}, "output": {"path": "o"}}
    known = keys(parse_recipe(needed, "needed").resolved())
    assert [name for name, _ in rows] == list(known)
    given: dict = {}
    for name, default in rows:
        *sections, last = name.split(".")
        node = given
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = yaml.safe_load(default)
    written = keys(parse_recipe(given, "documented").resolved())
    assert written == known | {"source.model": "required", "output.path": "required"}


def test_recipes_named_in_the_pages_exist():
    names = {name for line in commands() for name in re.findall(r"recipes/[\w.-]+\.yaml", line)}
    assert len(names) >= 2
    for name in names:
        assert yaml.safe_load((ROOT / name).read_text())["source"]["model"]
