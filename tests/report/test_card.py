"""The model card: what it says, for either format, and what hostile files cannot make it say."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from support.hub.store import card_errors

from pipeline.checkpoint.seal import is_sealed, with_digest
from pipeline.recipe import OVERRIDDEN
from pipeline.report.card import Wishes, make_card, plain, write_card

EVIL = "x|<script>alert(1)</script> ```\n---\n# Heading [a](http://b) {{ 7 * 7 }} `c` *d*"


@pytest.fixture
def model(finished, tmp_path) -> Path:
    """The small files of a finished conversion, and its sums."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in finished.output.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    return folder


def _change(path: Path, **keys) -> dict:
    table = json.loads(path.read_text()) | keys
    path.write_text(json.dumps(table))
    return table


def test_metadata(model):
    _change(model / "conversion.json", source={
        "named": "org/base", "model": "org/base", "commit": "c" * 40, "license": "other",
        "license_name": "qwen", "license_link": "https://example.org/l", "language": ["en", "zh"],
    })  # fmt: skip
    text = make_card(model, Wishes("acme/result"))
    assert not card_errors(text)
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == ("org/base", "quantized")
    assert (data.license, data.license_name, data.language) == ("other", "qwen", ["en", "zh"])
    assert "c" * 40 in text and 'snapshot_download("acme/result")' in text
    assert "on no package index" in text and "pip install requant" not in text
    assert (
        ModelCard(make_card(model, Wishes("acme/result", "mit"))).data.get("license_name") is None
    )


def test_a_table_ends_where_it_should(model):
    """At an empty line: what follows without one would be a row of it."""
    lines = make_card(model).split("\n")
    for line, after in pairwise(lines):
        assert after == "" or after.startswith("|") or not line.startswith("|")


def test_a_recipe_that_does_not_say_all(model):
    plain_words = "makes the same weights from it.\n"
    assert plain_words in make_card(model)
    path = model / "recipe.yaml"
    path.write_text(f"{OVERRIDDEN}calibration.seed=7\n{path.read_text()}")
    text = make_card(model)
    assert plain_words not in text
    assert "given the options in its first\nline." in text


def test_hostile_files(model):
    _change(model / "config.json", model_type=EVIL)
    report = _change(model / "report.json", baseline=EVIL, text={"text": EVIL})
    (model / "report.json").write_text(json.dumps(with_digest(report)))
    _change(model / "conversion.json", method=EVIL, source={"named": EVIL, "commit": EVIL,
            "license": EVIL, "language": EVIL, "pipeline_tag": EVIL})  # fmt: skip
    recipe = "# ````\n# </pre><script>\n---\n"
    (model / "recipe.yaml").write_text(recipe)
    card = ModelCard(make_card(model))
    assert card.data.license == EVIL  # as data, for `publish` to refuse
    lines = card.text.split("\n")
    start = lines.index("`````yaml")
    end = lines.index("`````", start)
    assert "\n".join(lines[start + 1 : end]) + "\n" == recipe
    outside = "\n".join(lines[:start] + lines[end:])
    assert "<script" not in outside.replace("\\<", "") and "\n# Heading" not in outside
    assert "49" not in outside.partition("## Use")[0].partition("## Results")[0]
    for name in ("[a](", "`c`"):
        assert name not in outside


def test_plain_is_one_line_of_nothing_but_text():
    assert plain("a\nb  c") == "a b c"
    assert plain("<b>") == "\\<b\\>"
    assert plain("x_y|z") == "x\\_y\\|z"


def test_awq(model):
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "version": "gemm", "bits": 4,
                                     "group_size": 128, "zero_point": True}  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    text = make_card(model)
    assert "AWQ, 4 bits, group 128" in text and "asymmetric" in text and "layout gemm" in text
    assert "awq" in ModelCard(text).data.tags


def test_calibration_texts_and_their_licences(model):
    resolved = yaml.safe_load((model / "recipe.resolved.yaml").read_text())
    resolved["calibration"]["sources"] = [
        {"builtin": "docs-calib"}, {"dataset": "org/texts"}, {"file": "/home/me/own.txt"}
    ]  # fmt: skip
    (model / "recipe.resolved.yaml").write_text(yaml.safe_dump(resolved))
    _change(model / "conversion.json", text_licences={"docs-calib": "MIT"})
    section = make_card(model).partition("## Calibration")[2].partition("## Recipe")[0]
    assert "- docs-calib: licences MIT" in section
    assert "org/texts: licences see the data set's own card" in section
    assert "own.txt: licences not stated" in section and "/home/me" not in section


def test_an_edited_card_is_left_alone(model):
    path = model / "README.md"
    assert is_sealed(path.read_text()) and write_card(model)
    path.write_text(path.read_text().replace("Limits", "Remarks"))
    before = path.read_bytes()
    assert not write_card(model) and path.read_bytes() == before
    path.unlink()
    assert write_card(model) and is_sealed(path.read_text())
