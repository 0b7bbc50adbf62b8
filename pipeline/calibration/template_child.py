"""Renders a stranger's chat template in a process of its own: lines of JSON in, lines of JSON out.

The first line is `{"template", "variables"}`, answered by `{"ready": true}`; every further one is
a list of messages, answered by `{"text"}` or `{"error"}`.  transformers' sandbox keeps a template
from code; memory is limited here, time by the parent (`templates.py`).  Run as a file, not as a
module of the package, which would import torch.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

MEMORY_BYTES = 1 << 30
"""On top of what the process has when it is ready."""


def limit_memory(more: int) -> None:
    """Let this process allocate so many bytes on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + more
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def answer(template: str, variables: dict[str, Any], messages: Any) -> dict[str, str]:  # noqa: ANN401
    """What a conversation becomes, or why it does not."""
    try:
        made = render_jinja_template([messages], chat_template=template, **variables)
        return {"text": str(made[0][0])}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_BYTES >> 30} GiB"}
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        return {"error": " ".join(str(error).split())[:300]}
    except RecursionError:
        return {"error": "it calls itself without end"}


def main() -> None:
    """Answer until the parent closes the pipe."""
    asked = json.loads(sys.stdin.readline())
    limit_memory(MEMORY_BYTES)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        found = answer(asked["template"], asked["variables"], json.loads(line))
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
