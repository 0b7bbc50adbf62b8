"""Put every verb's --help into docs/commands.md, between its heading's marks.

python scripts/command_docs.py            rewrite the page
python scripts/command_docs.py --check    exit code 1 when it is out of step
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

from pipeline.cli import app

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
BLOCK = re.compile(r"(<!-- help: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
WIDTH = 96


def help_of(verb: str) -> str:
    """What `requant VERB --help` prints, WIDTH columns wide."""
    answer = CliRunner().invoke(
        app, [verb, "--help"], prog_name="requant", terminal_width=WIDTH, max_content_width=WIDTH
    )
    if answer.exit_code != 0:
        raise SystemExit(f"there is no verb {verb}")
    return "\n".join(line.rstrip() for line in answer.stdout.strip().splitlines())


def in_step(page: str) -> str:
    """The page with all its help texts as they are now; SystemExit when a verb has no section."""
    missing = set(verbs()) ^ {match[2] for match in BLOCK.finditer(page)}
    if missing:
        raise SystemExit(f"{PAGE.name} and the verbs differ by: {', '.join(sorted(missing))}")
    return BLOCK.sub(lambda m: f"{m[1]}```\n{help_of(m[2])}\n```\n{m[4]}", page)


def verbs() -> list[str]:
    """All verbs of the command line."""
    return sorted(get_command(app).commands)  # type: ignore[attr-defined]


def main() -> int:
    """Exit code."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", action="store_true")
    check = arguments.parse_args().check
    old = PAGE.read_text(encoding="utf-8")
    new = in_step(old)
    if not check:
        PAGE.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{PAGE} is out of step; run python scripts/command_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
