"""What comes from a checkpoint is text in a card and on a page, whatever it holds."""

import json
import re
import shutil

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pipeline.checkpoint.seal import with_digest
from pipeline.report.card import CARD_FILE, Wishes, make_card, plain, write_card
from pipeline.report.optional import write_page

EVIL = (
    "<script>alert(1)</script> [x](javascript:alert(1)) ![i](http://e/i) `c` **b** | a\n---\n# h\n"
    "{{ 7 * 7 }} {% raw %} <!-- x --> &lt; ]]> \u202e '\"/>"
)
MARKS = st.text(alphabet="<>[]()!`*_#|&{}%-+=~:/.\\\"' \n\tax1", max_size=40)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(MARKS | st.text(max_size=20))
def test_plain_is_text_and_nothing_else(value):
    """By a Markdown reader of CommonMark with tables, as a paragraph, a cell and an item."""
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    text = plain(value)
    assert "\n" not in text and text.isprintable()
    for frame, allowed in (
        ("x {} y", {"p"}),
        ("| a |\n|---|\n| {} |", {"table", "thead", "tbody", "tr", "th", "td"}),
        ("- {}", {"ul", "li"}),
        ("# {}", {"h1"}),
    ):
        html = reader.render(frame.format(text))
        assert set(re.findall(r"</?([a-z0-9]+)[^>]*>", html)) <= allowed, (text, html)


def spoilt(finished, tmp_path):
    """A finished model whose every text is hostile."""
    model = shutil.copytree(finished.output, tmp_path / "model")
    for name in ("conversion.json", "report.json", "config.json"):
        table = json.loads((model / name).read_text())

        def spoil(value):
            if isinstance(value, dict):
                return {k: spoil(v) for k, v in value.items()}
            if isinstance(value, list):
                return [spoil(v) for v in value]
            return EVIL if isinstance(value, str) else value

        kept = {k: table[k] for k in ("question", "validated") if k in table}
        table = spoil(table) | kept
        if name == "conversion.json":
            table["source"] |= {"license": EVIL, "language": EVIL, "model": EVIL, "commit": EVIL}
        (model / name).write_text(json.dumps(with_digest(table)))
    (model / "recipe.yaml").write_text(f"# ```\n# ````` {EVIL!r}\n```\n<script>alert(1)</script>\n")
    return model


def test_a_card_of_hostile_texts(finished, tmp_path):
    model = spoilt(finished, tmp_path)
    text = make_card(model, Wishes(repo="acme/<script>x"))
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    assert isinstance(yaml.safe_load(front), dict)
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    outside = re.sub(r"<!-- requant: sha256 [^>]*-->", "", html)
    tags = set(re.findall(r"<([a-z!/][a-z0-9]*)", outside))
    safe = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "pre", "code", "ul",
            "li", "strong"}  # fmt: skip
    assert {tag.lstrip("/") for tag in tags} - {""} <= safe
    assert (model / CARD_FILE).unlink() is None and write_card(model)


def test_a_page_of_hostile_texts(finished, tmp_path):
    text = write_page(spoilt(finished, tmp_path), tmp_path / "page.html").read_text()
    assert "<script" not in text and 'javascript:alert(1)"' not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert re.findall(r"\son[a-z]+=", re.sub(r">[^<]*<", "><", text)) == []
