"""Whatever bytes a stranger sends, a parser answers, or refuses in one line."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.checkpoint.formats import FORMATS
from pipeline.checkpoint.gptq_settings import settings_of
from pipeline.checkpoint.header import parse_header
from pipeline.checkpoint.index import check_against, listed_files
from pipeline.checkpoint.shard_map import check_version, mapped_files
from pipeline.checkpoint.stored import StoredWeight, TensorEntry
from pipeline.checkpoint.summary import summarise
from pipeline.checkpoint.untrusted import parse_table, shown
from pipeline.errors import UserError
from pipeline.models.skeleton import architecture_of, geometry_of
from pipeline.plain_yaml import PlainYamlError, parse_yaml
from pipeline.recipe import parse_recipe

NUMBERS = st.integers() | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**400, -1])
LEAVES = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8)
WORDS = st.sampled_from(["F32", "U8", "I32", "nf4", "..", "a/b", "x.safetensors", "m.bin", "gptq"])
VALUES = st.recursive(
    LEAVES | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=12,
)
QUICK = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


def bytes_of(table):
    return json.dumps(table).encode()


def mostly(**fields):
    """A table of those fields, each of them sound, odd or missing."""
    odd = {name: st.one_of(sound, VALUES) for name, sound in fields.items()}
    return st.fixed_dictionaries({}, optional=odd)


ENTRY = mostly(
    dtype=st.sampled_from(["F32", "U8", "I32", "F16", "F8_E4M3"]),
    shape=st.lists(st.integers(0, 4) | NUMBERS, max_size=3),
    data_offsets=st.lists(st.integers(0, 64) | NUMBERS, min_size=2, max_size=2),
)
PARTS = st.sampled_from(
    ["w.weight", "w.weight.absmax", "w.weight.quant_map", "m.qweight", "m.qzeros", "m.scales",
     "m.g_idx", "w.SCB", "w.weight_scale_inv", "w.weight.quant_state.bitsandbytes__nf4"]
)  # fmt: skip


def refused_or_done(call):
    try:
        call()
    except (UserError, PlainYamlError) as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


@QUICK
@given(
    st.dictionaries(PARTS | st.text(max_size=8), ENTRY | VALUES, max_size=5).map(bytes_of)
    | st.binary(max_size=80),
    st.integers(-1, 300),
    st.sampled_from(["gptq", "awq", "fp8", "bitsandbytes"]),
)
def test_headers(data, more, method):
    def call():
        found = parse_header(data, 8 + len(data) + more, "file")
        remaining = {entry.name: entry for entry in found.entries}
        for member in sorted((FORMATS[name] for name in FORMATS), key=lambda f: f.rank):
            config = {"quantization_config": {"quant_method": method, "bits": 4}}
            for weight in member.claim(remaining, config):
                for part in weight.parts.values():
                    del remaining[part.name]

    refused_or_done(call)


NAMES = ["model.layers.0.mlp.experts.0.up_proj", "m"]
SETTINGS = mostly(
    quant_method=st.sampled_from(["gptq", "awq", "fp8", "bitsandbytes"]),
    bits=st.sampled_from([2, 4, 8]),
    group_size=st.sampled_from([-1, 32, 128]),
    version=st.just("gemm"),
    weight_block_size=st.lists(NUMBERS, max_size=3),
    dynamic=st.dictionaries(st.text(max_size=8), st.just({}) | VALUES, max_size=2),
    modules_to_not_convert=st.lists(st.sampled_from(NAMES) | VALUES, max_size=2),
    desc_act=st.booleans(),
)
CONFIG = mostly(
    model_type=st.just("qwen3_next"),
    num_hidden_layers=st.just(2) | NUMBERS,
    num_experts=st.just(8) | NUMBERS,
    num_experts_per_tok=st.just(2),
    hidden_size=st.just(128) | NUMBERS,
    moe_intermediate_size=st.just(128),
    vocab_size=st.just(512),
    layer_types=st.lists(st.sampled_from(["full_attention", "linear_attention"]), max_size=3),
    mlp_only_layers=st.lists(NUMBERS, max_size=2),
    decoder_sparse_step=st.just(1) | NUMBERS,
    partial_rotary_factor=st.floats() | NUMBERS,
    dtype=st.just("bfloat16"),
)
PACKED = {
    "gptq": {"qweight": ("I32", (1, 8)), "qzeros": ("I32", (1, 1)), "scales": ("F16", (1, 8)),
             "g_idx": ("I32", (8,))},
    "fp8": {"weight": ("F8_E4M3", (4, 4)), "weight_scale_inv": ("F32", (1, 1))},
    "int8": {"weight": ("I8", (4, 4)), "SCB": ("F32", (4,))},
}  # fmt: skip


@QUICK
@given(CONFIG, SETTINGS, st.sampled_from(list(PACKED)))
def test_configs(config, quantization, kind):
    parts = PACKED[kind].items()
    entries = {f"m.{p}": TensorEntry(f"m.{p}", "f", d, s, 0, 4) for p, (d, s) in parts}

    def call():
        whole = config | {"quantization_config": quantization}
        found = []
        for member in sorted((FORMATS[name] for name in FORMATS), key=lambda f: f.rank):
            claimed = member.claim(entries, whole)
            found += claimed
            for part in [p for weight in claimed for p in weight.parts.values()]:
                del entries[part.name]
        summary = summarise({w.name: w for w in found}, whole, {})
        assert summary.verdict.isprintable()
        for name in NAMES:
            settings_of(name, quantization)

    refused_or_done(call)

    def describe():
        architecture = architecture_of(config, "MODEL")
        geometry = geometry_of(architecture, config, "MODEL")
        assert geometry.layers <= 1 << 16

    refused_or_done(describe)


ENTRIES = {"a": TensorEntry("a", "x.safetensors", "F32", (1,), 0, 4)}


@QUICK
@given(st.dictionaries(st.just("a") | st.text(max_size=8), WORDS | VALUES).map(bytes_of))
def test_indices(data):
    def call():
        table = parse_table(data, "index")
        listed_files(table)
        check_against(table, ENTRIES)

    refused_or_done(call)


@QUICK
@given(
    mostly(
        shape=st.lists(st.sampled_from([32, 64]) | NUMBERS, max_size=3),
        blocksize=st.sampled_from([64, 63]),
        quant_type=st.sampled_from(["nf4", "fp4"]),
        dtype=st.just("bfloat16"),
        nested_blocksize=st.just(256),
        nested_dtype=st.just("float32"),
        nested_offset=st.floats() | NUMBERS,
    ).map(bytes_of)
    | st.binary(max_size=60)
)
def test_quant_states(data):
    sizes = {"quant_state": 200, "weight": 1024, "absmax": 32, "quant_map": 16,
             "nested_absmax": 1, "nested_quant_map": 256}  # fmt: skip
    parts = {p: TensorEntry(f"w.{p}", "file", "U8", (n,), 0, n) for p, n in sizes.items()}
    weight = StoredWeight("w.weight", "nf4", parts, 2048)
    refused_or_done(lambda: FORMATS["bnb4"].parse_state(weight, data))


@QUICK
@given(
    mostly(
        schema_version=st.just(1),
        files=st.lists(
            mostly(
                name=WORDS,
                layer=st.none() | NUMBERS,
                bytes=NUMBERS,
                sha256=st.text(max_size=64),
                **{"class": st.sampled_from(["experts", "nonexpert"])},
            ),
            max_size=3,
        ),
    ).map(bytes_of)
)
def test_shard_maps(data):
    refused_or_done(lambda: mapped_files(check_version(parse_table(data, "shard_map.json"))))


SECTIONS = ["source", "output", "requantize", "calibration", "validate", "publish", "limits"]
KEYS = ["model", "path", "bits", "sources", "samples", "window", "device_memory", "repo", "modules"]


@QUICK
@given(
    st.dictionaries(
        st.sampled_from(SECTIONS) | st.text(max_size=5),
        st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), VALUES, max_size=3) | VALUES,
        max_size=4,
    ).map(json.dumps)
    | st.text(max_size=60)
    | st.lists(st.sampled_from(["a: ", "- ", "[", "{", "&a ", "*a", "!!set ", "? ", "|\n", "\n  ",
                                "<<: ", '"\\u0000"', "0x1f", "1:2", "2026-99-99"])).map("".join)
)  # fmt: skip
def test_recipes(text):
    def call():
        data = parse_yaml(text)
        if isinstance(data, dict):
            parse_recipe(data, "recipe")

    refused_or_done(call)


@QUICK
@given(VALUES)
def test_what_is_shown_is_one_short_printable_line(value):
    assert shown(value).isprintable() and len(shown(value)) <= 120


def test_sound_yaml_is_read_as_ever():
    text = 'a: {b: [1, 2.5, yes, null, "x\\ty"]}\nc: |\n  two\n  lines\nd: 0x10\n'
    wanted = {"a": {"b": [1, 2.5, True, None, "x\ty"]}, "c": "two\nlines\n", "d": 16}
    assert parse_yaml(text) == wanted
    with pytest.raises(PlainYamlError, match="second time"):
        parse_yaml("a: 1\na: 2")
