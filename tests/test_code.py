"""What other code has begun is not gone on with; what it has finished stays."""

import json
import shutil

import pytest
from support.damage import edit_json
from support.recipes import digests

from pipeline import code
from pipeline.code import ROOMS, code_digest, digest_of
from pipeline.errors import OutputError

BEFORE = '''"""A room."""
STRENGTH = 3.0
"""What it is."""
# Why.
def f(x: int) -> int:
    """Docs."""
    return x
'''


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("3.0", "3.5", True),
        ("return x", "return -x", True),
        ("# Why.", "# Why not.", False),
        ("Docs.", "Other docs.", False),
        ("What it is.", "What it was.", False),
        ("    return x", "\n    return x", False),
    ],
)
def test_what_counts_is_what_the_code_does(tmp_path, old, new, counts):
    found = []
    for text in (BEFORE, BEFORE.replace(old, new)):
        file = tmp_path / "quantize" / "methods" / "m.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        found.append(digest_of(tmp_path, ("quantize",)))
    assert (found[0] != found[1]) == counts


def test_every_constant_of_the_solver_counts(tmp_path):
    """Those that were once thought of; the code itself is what is digested."""
    package = shutil.copytree(code.Path(code.__file__).parent, tmp_path / "pipeline")
    assert digest_of(package, ROOMS) == code_digest()
    for file, constant in {
        "stages/experts.py": "STRENGTH = 3.0",
        "stages/sensitivity.py": "ROUTER_SHARE = 0.5",
        "quantize/rows.py": "ROW_BLOCKS = 6",
        "quantize/hessian.py": "PRIOR = 10.0",
        "quantize/correction.py": "DAMPING = 0.03",
        "hybrid/delta_kernels.py": "CHUNK = 64",
    }.items():
        before = (package / file).read_text()
        assert constant in before
        (package / file).write_text(before.replace(constant, constant + "1"))
        assert digest_of(package, ROOMS) != code_digest(), file
        (package / file).write_text(before)


def test_unfinished_work_of_other_code_is_refused(project, finished, monkeypatch):
    project.run(until="dequantize")
    before = digests(project.partial, ())
    monkeypatch.setattr("pipeline.run.code_digest", lambda: "0123456789abcdef")
    said = f"code was {code_digest()}, is now 0123456789abcdef; undo the change, or start again"
    with pytest.raises(OutputError, match=said):
        project.run(until="shard")
    assert digests(project.partial, ()) == before
    monkeypatch.undo()
    project.run(until="shard")
    assert digests(project.output) == digests(finished.output)


def test_a_result_of_other_code_stays(project, finished, monkeypatch):
    shutil.copytree(finished.output, project.output)
    monkeypatch.setattr("pipeline.run.code_digest", lambda: "0123456789abcdef")
    project.run(until="shard")
    note = "the code has changed since, --fresh makes it anew"
    assert project.said == [f"{project.output} is in place and up to date; {note}"]
    assert digests(project.output) == digests(finished.output)
    made = json.loads((project.output / "conversion.json").read_text())
    assert made["fingerprint"]["code"] == code_digest()
    edit_json(project.output / "conversion.json", lambda table: table.update(fingerprint=3))
    with pytest.raises(OutputError, match=r"conversion.json is damaged"):
        project.run(until="shard")
