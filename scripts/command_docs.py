"""Put every verb's --help into docs/commands/VERB.md, between its marks.

python scripts/command_docs.py            rewrite the pages
python scripts/command_docs.py --check    exit code 1 when one is out of step
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

from pipeline.cli import app

PAGES = Path(__file__).parents[1] / "docs" / "commands"
BLOCK = re.compile(r"(<!-- help -->\n)(.*?)(<!-- end -->)", re.DOTALL)
WIDTH = 96


def help_of(verb: str) -> str:
    """What `requant VERB --help` prints, WIDTH columns wide."""
    answer = CliRunner().invoke(
        app, [verb, "--help"], prog_name="requant", terminal_width=WIDTH, max_content_width=WIDTH
    )
    if answer.exit_code != 0:
        raise SystemExit(f"there is no verb {verb}")
    return "\n".join(line.rstrip() for line in answer.stdout.strip().splitlines())


def in_step(verb: str, page: str) -> str:
    """The verb's page with its help text as it is now; SystemExit when it has no place for it."""
    new, count = BLOCK.subn(lambda m: f"{m[1]}```\n{help_of(verb)}\n```\n{m[3]}", page)
    if count != 1:
        raise SystemExit(f"{verb}.md has {count} places for a help text, between its marks")
    return new


def verbs() -> list[str]:
    """All verbs of the command line."""
    return sorted(get_command(app).commands)  # type: ignore[attr-defined]


def main() -> int:
    """Exit code."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", action="store_true")
    check = arguments.parse_args().check
    missing = set(verbs()) ^ {path.stem for path in PAGES.glob("*.md")}
    if missing:
        raise SystemExit(f"{PAGES} and the verbs differ by: {', '.join(sorted(missing))}")
    for verb in verbs():
        path = PAGES / f"{verb}.md"
        old = path.read_text(encoding="utf-8")
        new = in_step(verb, old)
        if new != old and check:
            print(f"{path} is out of step; run python scripts/command_docs.py", file=sys.stderr)
            return 1
        if new != old:
            path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
