"""report.html: what it says, that hostile names stay text, and how a browser shows it."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from support.browser import CHROMIUM, Browser

from pipeline.checkpoint.seal import sealed, with_digest
from pipeline.errors import CheckpointError, OutputError, UserError
from pipeline.report import optional
from pipeline.report.model_page import model_page, write_page
from pipeline.report.optional import page_beside
from pipeline.report.record import read_record

browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt: chromium)")

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>$\\frac{1}{$ {{ 7*7 }}"
VOID = {"meta", "link", "img", "br", "path", "use", "image"}


class Outline(HTMLParser):
    """Elements with their attributes, their nesting checked, and the text outside them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.text += data

    def values(self, attribute):
        return [given[attribute] for _, given in self.elements if attribute in given]


@pytest.fixture(scope="module")
def page(finished):
    return (finished.output / "report.html").read_text()


@pytest.fixture
def model(finished, tmp_path):
    """The small files of a finished model, to be written to."""
    folder = tmp_path / "model"
    shutil.copytree(finished.output, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def change(folder, **keys):
    """Change report.json and give it the digest that fits."""
    report = json.loads((folder / "report.json").read_text()) | keys
    (folder / "report.json").write_text(json.dumps(with_digest(report)))


def test_says_what_was_measured(page, finished):
    report, text = finished.report(), Outline(page).text
    for words in (
        "✓ Passed",
        f"{report['perplexity_ratio']:.4f}",
        f"{report['source']['perplexity']:.4f}",
        f"{report['quantized']['perplexity']:.4f}",
        f"{report['kl_divergence']:.5f}",
        "≤ 2",
        "loss of every layer's experts",
        "loss by module class",
        "tokens per expert, by layer",
        "Time and memory by stage",
        "Where the model is",
        report["machine"]["transformers"],
        finished.text.splitlines()[0],
        report["digest"][:16],
    ):
        assert words in text, words


def test_the_same_record_gives_the_same_page(page, finished):
    assert page == sealed(model_page(read_record(finished.output)) + "\n")


def test_is_one_file(page):
    """No script, nothing to load, and no identifier twice."""
    outline = Outline(page)
    assert "script" not in [tag for tag, _ in outline.elements]
    for attribute in ("src", "href", "xlink:href"):
        for address in outline.values(attribute):
            assert address.startswith(("#", "data:")), address
    assert not re.search(r"url\((?!#|data:)", page)
    ids = outline.values("id")
    assert len(ids) == len(set(ids))
    links = {a[1:] for a in outline.values("href") + outline.values("xlink:href") if a[0] == "#"}
    assert links <= set(ids)


def test_pictures_have_words(page):
    outline = Outline(page)
    pictures = [given for tag, given in outline.elements if tag == "svg"]
    assert len(pictures) >= 6 and all(given["role"] == "img" for given in pictures)
    assert all(len(given["aria-label"]) > 20 for given in pictures)
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]\b", page)  # every colour has become a variable


def test_roads(model):
    """A model that was spread: each road with its size and calls, each layer below."""
    change(
        model,
        placement={
            "request": "auto",
            "device": "cuda:0",
            "bytes": {"experts": 7 << 20, "quantized_linears": 0, "dense": 3 << 20},
            "expert_bytes": {"resident": 2 << 20, "zero-copy": 1 << 20, "cpu": 4 << 20},
            "experts": {"0": "zero-copy", "1": {"resident": 3, "cpu": 5}},
            "use": {"0": {"zero-copy": 1.0}, "1": {"resident": 0.75, "cpu": 0.25}},
            "device_memory_limit": 10 << 30,
            "ledger": {"resident experts": 3 << 20, "CUDA context": 2 << 20},
        },
    )
    text = Outline(model_page(read_record(model))).text
    text = text.replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "of which 10.0 GiB may be used; experts were placed as auto says",
        "experts: zero-copyRAM, read by the GPU over PCIe1.0 MiB50.00 %",
        "resident experts3.0 MiB",
        "all5.0 MiB",
        "Experts of each layer",
        "37.50 %",  # of all calls, resident
        "75.00 %",
    ):
        assert words in text, words


def test_failed(model):
    change(model, passed=False, failures=["kl_divergence 2 is above 1"], thresholds={})
    text = Outline(model_page(read_record(model))).text
    assert "✗ Failed" in text and "KL divergence 2 is above 1" in text
    change(model, passed=True, failures=[])
    assert "Measured, not judged" in Outline(model_page(read_record(model))).text


def test_hostile_names_stay_text(model):
    """Whatever a checkpoint, a recipe or a report says is shown and never obeyed."""
    known = json.loads((model / "report.json").read_text())
    change(
        model,
        model=HOSTILE,
        baseline=HOSTILE,
        validated=HOSTILE,
        failures=[HOSTILE],
        passed=False,
        text={HOSTILE: HOSTILE, "text": HOSTILE},
        machine=known["machine"] | {HOSTILE: HOSTILE, "device": HOSTILE},
        stages={HOSTILE: {"seconds": 1.0}},
        placement=known["placement"] | {"device": HOSTILE, "backends": {HOSTILE: {HOSTILE: 1}}},
    )
    conversion = json.loads((model / "conversion.json").read_text())
    conversion["layers"][0]["dense_loss"] = {HOSTILE: 0.5}
    conversion["fingerprint"][HOSTILE] = HOSTILE
    (model / "conversion.json").write_text(json.dumps(conversion))
    (model / "recipe.yaml").write_text(f"</pre>{HOSTILE}")
    page = model_page(read_record(model))
    outline = Outline(page)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in outline.elements)
    assert not [name for _, given in outline.elements for name in given if name.startswith("on")]
    assert outline.text.count(HOSTILE) >= 10  # as it is, not as a template would make it


def test_a_model_that_others_made(model):
    """A report alone gives a page without the sections that a conversion fills."""
    for path in model.iterdir():
        if path.name != "report.json":
            path.unlink()
    text = Outline(model_page(read_record(model))).text
    assert "Result against source" in text and "What the experts saw" not in text


def test_effective_rank(model):
    """In the picture's words and in the table; left out where layers do not record it."""
    conversion = json.loads((model / "conversion.json").read_text())
    conversion["layers"][0]["effective_rank"][3] = 1.25
    (model / "conversion.json").write_text(json.dumps(conversion))
    page = Outline(model_page(read_record(model)))
    assert "rank: lowest" in page.text and "1.2" in page.text
    assert any(f"the lowest is 1.2, in layer {conversion['layers'][0]['layer']}" in (v or "")
               for v in page.values("aria-label"))  # fmt: skip
    for layer in conversion["layers"]:
        del layer["effective_rank"]
    (model / "conversion.json").write_text(json.dumps(conversion))
    assert "ffective rank" not in Outline(model_page(read_record(model))).text


def test_experts_without_tokens(model):
    conversion = json.loads((model / "conversion.json").read_text())
    for layer in conversion["layers"]:
        layer["tokens"] = [0] * len(layer["tokens"])
    (model / "conversion.json").write_text(json.dumps(conversion))
    assert "(red: none)" in Outline(model_page(read_record(model))).text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: (m / "report.json").unlink(), "holds no report.json"),
        (lambda m: (m / "report.json").write_text("[1]"), "holds no report.json"),
        (lambda m: change(m, kl_divergence="low"), "Report has no usable kl_divergence"),
        (lambda m: change(m, stages={"shard": {}}), "no usable stages.shard.seconds"),
        (lambda m: (m / "conversion.json").write_text("{"), "conversion.json: not JSON"),
        (lambda m: (m / "conversion.json").write_text("[]"), "a table was expected"),
        (shutil.rmtree, "is not a directory"),
    ],
)
def test_refuses(model, damage, said):
    damage(model)
    with pytest.raises(CheckpointError, match=re.escape(said)) as refused:
        write_page(model)
    assert "\n" not in str(refused.value)


def test_without_the_extra(model, monkeypatch):
    """A model is measured and kept; only its page is not drawn, and the verb says what to do."""
    (model / "report.html").unlink()
    monkeypatch.setattr("pipeline.report.optional.find_spec", lambda _name: None)
    assert page_beside(model) is None and not (model / "report.html").exists()
    with pytest.raises(UserError, match=r"pip install -e '.\[report\]'"):
        optional.write_page(model)


def test_a_place_that_cannot_be_written_to(model):
    with pytest.raises(OutputError):
        write_page(model, model / "report.json" / "page.html")


@browser
@pytest.mark.xdist_group("browser")
def test_in_a_browser(finished):
    """Nothing fails to load, nothing is logged, nothing is wider than a phone or a desk."""
    page = finished.output / "report.html"
    with Browser() as chromium:
        for width in (400, 1400):
            for dark in (False, True):
                name = f"report-{width}-{'dark' if dark else 'light'}"
                seen = chromium.open(page, width, dark=dark, screenshot=name)
                assert seen.complaints == []
                assert seen.requests == [page.resolve().as_uri()]
                assert (seen.overflow, seen.wide) == (0, [])
                assert "Passed" in seen.text and "Recipe" in seen.text
        reached = chromium.tabbed(page, 9)
    assert reached[0] == "a Skip to the content"
    assert reached[1:8] == [f"a {name}" for name in SECTIONS]
    assert reached[8].startswith("div Result against source")


SECTIONS = (
    "Quality",
    "Damage, layer by layer",
    "What the experts saw",
    "Time and memory",
    "Placement",
    "Environment",
    "Recipe",
)


@browser
@pytest.mark.xdist_group("browser")
def test_the_browser_notices(tmp_path):
    """The checks above are worth something: a page with every fault is told of each."""
    page = tmp_path / "page.html"
    page.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><link rel=icon '
        'href="data:,"><p style="width:900px">wide</p><img src="missing.png">'
        '<script>console.error("oh"); nowhere()</script>'
    )
    with Browser() as chromium:
        seen = chromium.open(page, 400)
    found = " ".join(seen.complaints)
    assert "failed to load" in found and "console.error" in found and "threw" in found
    assert seen.overflow > 0 and len(seen.wide) == 1
    assert seen.requests == [page.as_uri(), (tmp_path / "missing.png").as_uri()]
