"""Reading recipes: defaults, overrides, and that nothing unknown slips through."""

import difflib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ByteSize, ValidationError

from pipeline.errors import RecipeError
from pipeline.recipe import load_recipe, parse_recipe

SMALL = {"source": {"model": "m"}, "output": {"path": "o"}}
GIB = 1 << 30


def _with(section, **values):
    return parse_recipe(SMALL | {section: values}, "r.yaml")


def _load(tmp_path, *overrides, text="source: {model: m}\noutput: {path: o}\n"):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


def test_defaults():
    recipe = parse_recipe(SMALL, "r.yaml")
    assert recipe.requantize.method == "gptq" and recipe.requantize.modules == ("experts",)
    assert (recipe.requantize.bits, recipe.requantize.group_size) == (4, 128)
    assert recipe.limits.device_memory == 24 * GIB and recipe.limits.threads is None
    assert recipe.validate_.thresholds.perplexity_ratio == 1.03
    assert not recipe.dequantize.write and recipe.publish.repo is None
    for section in ("validate", "limits", "calibration", "publish"):
        assert recipe.resolved()[section]


def test_resolved_is_a_recipe_that_says_the_same(tmp_path):
    recipe = _with("validate", thresholds={"kl_divergence": 0.5}, device_memory="8GiB")
    text = yaml.safe_dump(recipe.resolved())
    again, _ = _load(tmp_path, text=text)
    assert again == recipe and again.validate_.device_memory == 8 * GIB


def test_the_text_is_kept_as_written(tmp_path):
    text = "# a remark\nsource: {model: m}\noutput:\n  path: o   # here\n"
    recipe, kept = _load(tmp_path, "requantize.bits=8", text=text)
    assert kept == f"# with --set requantize.bits=8\n{text}" and recipe.requantize.bits == 8


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("requantize.group_size=32", lambda r: r.requantize.group_size == 32),
        ("requantize.group_size=-1", lambda r: r.requantize.group_size == -1),
        ("requantize.modules=[experts, attention]", lambda r: len(r.requantize.modules) == 2),
        ("requantize.symmetric=false", lambda r: r.requantize.symmetric is False),
        ("requantize.damping=1", lambda r: r.requantize.damping == 1.0),
        (
            "validate.thresholds.perplexity_ratio=null",
            lambda r: not r.validate_.thresholds.perplexity_ratio,
        ),
        ("validate.max_windows=null", lambda r: r.validate_.max_windows is None),
        ("limits.host_memory=1.5GiB", lambda r: r.limits.host_memory == 1.5 * GIB),
        ("limits.host_memory=1000", lambda r: r.limits.host_memory == 1000),
        ("output.path=a=b", lambda r: r.output.path == "a=b"),
    ],
)
def test_overrides(tmp_path, override, found):
    assert found(_load(tmp_path, override)[0])


def test_later_overrides_win(tmp_path):
    recipe, _ = _load(tmp_path, "requantize.bits=8", "requantize.bits=4")
    assert recipe.requantize.bits == 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("requantize.bits=5", "--set: requantize.bits: input should be 4 or 8 (got 5)"),
        ("requantize.bit=4", "--set: unknown key 'requantize.bit'; did you mean 'bits'?"),
        ("more.bits=4", "--set: unknown key 'more'; "),
        ("source={}", "--set: source.model is missing"),
        ("validate.stride=600", "--set: validate.stride 600 is larger than validate.window 512"),
    ],
)
def test_mistakes_are_blamed_on_where_they_are(tmp_path, override, said):
    text = "source: {model: m}\noutput: {path: o}\nvalidate: {window: 512}\n"
    with pytest.raises(RecipeError) as error:
        _load(tmp_path, "limits.threads=1", override, text=text)
    assert str(error.value).startswith(said)
    wrong = text.replace("512", "8")
    with pytest.raises(RecipeError, match=f"^{tmp_path}/r.yaml: validate.window: "):
        _load(tmp_path, "limits.threads=1", text=wrong)


def test_frozen():
    recipe = parse_recipe(SMALL, "r.yaml")
    with pytest.raises(ValidationError):
        recipe.requantize.bits = 8
    assert hash(recipe.requantize) == hash(parse_recipe(SMALL, "").requantize)
    assert isinstance(recipe.limits.host_memory, ByteSize)


def _keys(section, where=()):
    for name, value in section.items():
        yield (*where, name)
        if isinstance(value, dict):
            yield from _keys(value, (*where, name))


KEYS = sorted(_keys(parse_recipe(SMALL, "").resolved()))


@given(st.sampled_from(KEYS), st.data())
def test_every_slip_of_the_pen_is_refused_and_helped(path, data):
    """Two neighbouring letters swapped in any key of any depth."""
    name = path[-1]
    at = data.draw(st.integers(0, len(name) - 2))
    wrong = name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    if wrong == name:
        return
    recipe = parse_recipe(SMALL, "").resolved()
    section = recipe
    for part in path[:-1]:
        section = section[part]
    section[wrong] = section.pop(name)
    with pytest.raises(RecipeError) as error:
        parse_recipe(recipe, "r.yaml")
    said = str(error.value)
    assert said.startswith("r.yaml: unknown key ") and repr(".".join([*path[:-1], wrong])) in said
    close = difflib.get_close_matches(wrong, [name], cutoff=0.5)
    assert not close or "did you mean" in said
    assert "\n" not in said


@given(
    st.sampled_from([path for path in KEYS if len(path) > 1]),
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=80),
        st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=2), st.integers()),
    ),
)  # fmt: skip
def test_any_value_is_taken_or_refused_in_one_line(path, value):
    recipe = parse_recipe(SMALL, "").resolved()
    section = recipe
    for part in path[:-1]:
        section = section[part]
    section[path[-1]] = value
    try:
        parse_recipe(recipe, "r.yaml").resolved()
    except RecipeError as error:
        assert str(error).startswith("r.yaml: ") and len(str(error).splitlines()) == 1
        assert len(str(error)) < 300


def test_sources_of_calibration():
    """Strings are files, mappings name what they need; resolved, only what was given is said."""
    chat = {"dataset": "org/chat", "split": "held", "chat": True, "weight": 2.5}
    recipe = _with("calibration", sources=["a.txt", {"builtin": "docs-calib"}, chat])
    plain, builtin, remote = recipe.calibration.sources
    assert (plain.file, builtin.builtin, remote.dataset) == ("a.txt", "docs-calib", "org/chat")
    resolved = recipe.resolved()
    assert resolved["calibration"]["sources"] == [
        {"file": "a.txt"},
        {"builtin": "docs-calib"},
        chat,
    ]
    assert parse_recipe(resolved, "r.yaml") == recipe


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"fil": "a"}, "unknown key 'calibration.sources.0.fil'; did you mean 'file'?"),
        ({"column": "a"}, "calibration.sources.0: give one of builtin, file and dataset"),
        ({"file": "a", "builtin": "b"}, "give one of builtin, file and dataset"),
        ({"file": "a", "split": "train"}, "split goes with dataset only"),
        ({"file": "a", "weight": -1}, "calibration.sources.0.weight: input should be greater"),
        ({"file": ""}, "calibration.sources.0.file: must not be empty"),
        (7, "calibration.sources.0: "),
    ],
)
def test_sources_that_are_none(source, said):
    with pytest.raises(RecipeError) as error:
        _with("calibration", sources=[source])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_kept_text_names_what_was_overridden(tmp_path):
    text = "source: {model: m}\noutput: {path: o}\n"
    assert _load(tmp_path, "output.path=/tmp/x")[1] == text
    recipe, kept = _load(
        tmp_path, "calibration.seed=7", "output.path=/tmp/x", "validate.text='a\r\u2028 b'"
    )
    first, _, rest = kept.partition("\n")
    assert first.startswith("# with --set calibration.seed=7 --set 'validate.text=")
    assert "output" not in first
    assert len(kept.splitlines()) == 3  # whatever the value holds
    assert rest == text
    assert recipe.calibration.seed == 7
