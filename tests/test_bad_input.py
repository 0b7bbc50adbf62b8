"""Whatever is wrong with what a user gives: one clear line, exit code 2, nothing half-made."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.damage import dense_experts, edit_json, edit_tensors, header_end

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2))
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture
def source(project, micro):
    """A copy of the micro model to spoil, and a recipe for it."""
    copy = shutil.copytree(micro, project.folder / "source")
    project.change(source={"model": str(copy)})
    return copy


@pytest.fixture
def refused(project, cli):
    """`requant run` fails as it should; returns the line that it said."""

    def run(*options, progress=False):
        answer = cli("run", project.write(), *options)
        assert answer.code == 2, answer
        *before, line = answer.err.splitlines()
        assert line.startswith("requant: ") and len(line) > 20
        assert progress or before == []
        assert "Traceback" not in answer.err + answer.out
        assert not line.endswith(".")
        return line

    yield run
    assert not project.output.exists()


def _config(**changes):
    return lambda source: edit_json(source / CONFIG, lambda table: table.update(changes))


def _index(old, new):
    def edit(table):
        files = table["weight_map"]
        files.update({name: new for name, file in files.items() if file == old})

    return lambda source: edit_json(source / INDEX, edit)


def _truncate(keep):
    def cut(source):
        file = source / SECOND
        data = file.read_bytes()
        file.write_bytes(data[: keep(data)])

    return cut


def _rename(old, new):
    """Rename parts of stored tensors' names, in headers and index, without moving a byte."""
    assert len(old) == len(new)

    def edit(source):
        for file in [*source.glob("*.safetensors"), source / INDEX]:
            file.write_bytes(file.read_bytes().replace(old.encode(), new.encode()))

    return edit


def _without(part):
    return lambda source: edit_tensors(source, lambda _name, _tensor: None, part)


def _poison(part, value):
    """Put a value into the middle of the tensors whose name ends so."""

    def put(_name, tensor):
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return lambda source: edit_tensors(source, put, part)


NAN, INF = float("nan"), float("inf")
BEFORE = {
    "shard missing": (lambda s: (s / SECOND).unlink(), [SECOND, "not in"]),
    "shard truncated": (_truncate(lambda d: len(d) - 7), [SECOND, "truncated"]),
    "shard without data": (_truncate(header_end), [SECOND, "truncated after its header"]),
    "shard cut in its header": (_truncate(lambda _d: 100), [SECOND, "truncated within its header"]),
    "shard empty": (_truncate(lambda _d: 0), [SECOND, "too few"]),
    "no index": (lambda s: (s / INDEX).unlink(), [INDEX, "missing"]),
    "index not JSON": (lambda s: (s / INDEX).write_text("{"), [INDEX, "not JSON"]),
    "index names no file": (_index(SECOND, "model-9.safetensors"), ["model-9.safetensors: not in"]),
    "index leads outside": (_index(SECOND, "../x.safetensors"), ["../x.safetensors", "outside"]),
    "index leads away": (_index(SECOND, "/etc/x.safetensors"), ["/etc/x.safetensors", "outside"]),
    "index names a pickle": (_index(SECOND, "model.bin"), ["model.bin", "pickle"]),
    "index names a text": (_index(SECOND, "notes.txt"), ["notes.txt", "not a safetensors file"]),
    "no config": (lambda s: (s / CONFIG).unlink(), [CONFIG, "download"]),
    "config not JSON": (lambda s: (s / CONFIG).write_text("x"), [CONFIG, "not JSON"]),
    "other architecture": (
        _config(model_type="mixtral"),
        ["'mixtral'", "known: qwen3_moe, qwen3_next"],
    ),
    "no architecture": (
        _config(model_type=None),
        ["model_type None", "known: qwen3_moe, qwen3_next"],
    ),
    "config lacks a size": (
        lambda s: edit_json(s / CONFIG, lambda c: c.pop("num_experts")),
        ["'num_experts' is missing"],
    ),
    "config of a wrong type": (_config(hidden_size="big"), ["config.json is malformed", "'big'"]),
    "config that makes no model": (_config(num_attention_heads=0), ["config.json is malformed"]),
    "config: other width": (_config(moe_intermediate_size=64), [".weight has shape", "asks for"]),
    "config: fewer experts": (_config(num_experts=4), ["(8, 128)", "asks for (4, 128)"]),
    "config: more experts": (_config(num_experts=9), ["experts.8.gate_proj.weight is missing"]),
    "config: fewer layers": (
        _config(num_hidden_layers=1, layer_types=["linear_attention"]),
        ["model.layers.1.", "has no place"],
    ),
    "config: other vocabulary": (_config(vocab_size=600), ["(512, 128)", "asks for (600, 128)"]),
    "config: other layers": (
        _config(layer_types=["full_attention", "linear_attention"]),
        ["model.layers.0.self_attn", "is missing"],
    ),
    "unknown quantisation": (_rename("bitsandbytes__nf4", "bitsandbytes__nf5"), ["nf5", "known:"]),
    "no quant_state": (
        _without(f"{EXPERT}.quant_state.bitsandbytes__nf4"),
        [EXPERT, "quant_state"],
    ),
    "no absmax": (_without(f"{EXPERT}.absmax"), [EXPERT, "no absmax"]),
    "no nested_absmax": (_without(f"{EXPERT}.nested_absmax"), [EXPERT, "no nested_absmax"]),
    "no norm": (
        _without("layers.1.input_layernorm.weight"),
        ["1.input_layernorm.weight is missing"],
    ),
    "unknown tensor": (
        _rename("layers.0.input_layernorm.weight", "layers.0.inner_layernorm.weight"),
        ["layernorm.weight"],
    ),
    "no tokenizer": (lambda s: (s / "tokenizer.json").unlink(), ["holds no tokenizer"]),
    "tokenizer damaged": (
        lambda s: (s / "tokenizer.json").write_text("{}"),
        ["the tokenizer cannot be loaded"],
    ),
}


@pytest.mark.parametrize("case", BEFORE)
def test_sources_refused_before_any_work(project, source, refused, case):
    spoil, said = BEFORE[case]
    spoil(source)
    line = refused()
    assert all(part in line for part in said), line
    assert not project.partial.exists()


DURING = {
    "NaN in a norm": (_poison("layers.1.input_layernorm.weight", NAN), "1.input_layernorm.weight"),
    "Inf in the embedding": (_poison("model.embed_tokens.weight", INF), "embed_tokens.weight"),
    "NaN in the head": (_poison("lm_head.weight", NAN), "lm_head.weight"),
    "Inf in the router's scales": (
        _poison("layers.1.mlp.gate.weight.nested_absmax", INF),
        "model.layers.1.mlp.gate.weight",
    ),
    "NaN in an expert's scales": (_poison(f"{EXPERT}.nested_absmax", NAN), EXPERT),
    "NaN in the table of values": (_poison(f"{EXPERT}.quant_map", NAN), EXPERT),
}


@pytest.mark.parametrize("case", DURING)
def test_non_finite_weights_are_named(project, source, refused, case):
    spoil, name = DURING[case]
    spoil(source)
    line = refused(progress=True)
    assert name in line and "NaN" in line, line
    # Experts are read when their layer is solved; by then layer 0 is done and can be resumed after.
    assert project.partial.exists() == (name == EXPERT)


OVERFLOWS = {
    # two factors of 1e20 are more than bfloat16 holds, each of them is not
    "shared expert": (["0.mlp.shared_expert.up_proj", "0.mlp.shared_expert.down_proj"], "layer 0 "),
    "attention": (["1.self_attn.v_proj", "1.self_attn.o_proj"], "layer 1 "),
    "experts": (["1.mlp.experts.5.up_proj"], "layer 1, gate and up of experts 0 to 7: matrix 5"),
}


@pytest.mark.parametrize("case", OVERFLOWS)
def test_numbers_that_overflow_are_named(source, refused, case):
    """Every weight is finite; what comes out of them is not."""
    parts, said = OVERFLOWS[case]
    for part in parts:
        edit_tensors(source, lambda _name, t: t * 1e20, f"{part}.weight.nested_absmax")
    line = refused(progress=True)
    assert said in line and "NaN" in line, line


RECIPES = {
    "unknown section": (["requantise.bits=4"], ["'requantise'", "did you mean 'requantize'?"]),
    "unknown key": (["requantize.groupsize=32"], ["requantize.groupsize", "'group_size'?"]),
    "unknown key far from any": (["limits.zzz=1"], ["limits.zzz", "known here: device_memory,"]),
    "unknown key deep down": (
        ["validate.thresholds.perplexity=1"],
        ["validate.thresholds.perplexity", "did you mean 'perplexity_ratio'?"],
    ),
    "wrong type": (["calibration.samples=many"], ["calibration.samples", "integer", "'many'"]),
    "a bool for a number": (["requantize.damping=yes"], ["requantize.damping", "number"]),
    "a text for a bool": (["requantize.symmetric=maybe"], ["requantize.symmetric", "boolean"]),
    "a number for a list": (["calibration.sources=3"], ["calibration.sources", "list"]),
    "not a size": (["limits.host_memory=much"], ["limits.host_memory", "10GiB"]),
    "a negative size": (["limits.device_memory=-1"], ["limits.device_memory", "10GiB"]),
    "a value for a section": (["limits=3"], ["limits", "section"]),
    "no value": (["output.path="], ["output.path", "string"]),
    "a revision of a directory": (["source.revision=v2"], ["is a directory", "no revision v2"]),
    "unknown bits": (["requantize.bits=3"], ["requantize.bits", "4 or 8"]),
    "unknown group": (["requantize.group_size=48"], ["requantize.group_size", "32, 64, 128 or -1"]),
    "unknown method": (["requantize.method=quip"], ["'quip'", "known: awq, awq+gptq, gptq, rtn"]),
    "unknown modules": (
        ["requantize.modules=[experts, heads]"],
        ["'heads'", "known here: experts"],
    ),
    "no modules": (["requantize.modules=[]"], ["requantize.modules", "at least one"]),
    "without experts": (["requantize.modules=[attention]"], ["must name experts"]),
    "stride over window": (["validate.stride=65"], ["validate.stride 65", "validate.window 64"]),
    "not an override": (["requantize.bits"], ["key=value", "'requantize.bits'"]),
    "override below a value": (["output.path.name=x"], ["path is not a section"]),
    "override not YAML": (["output.path=[1"], ["not YAML"]),
    "no such source": (["source.model=nowhere/at/all"], ["nowhere/at/all does not exist"]),
    "no network": (["source.model=nobody/nothing"], ["nobody/nothing", "cannot be reached"]),
    "text missing": (["calibration.sources=[/gone.txt]"], ["/gone.txt does not exist"]),
    "too few sequences": (
        ["calibration.samples=100000"],
        ["calibration.txt", "100000 were asked for", "set calibration.samples="],
    ),
    "not one sequence": (
        ["calibration.sequence_length=1000000"],
        ["calibration.txt", "not one sequence of 1000000 tokens"],
    ),
    "evaluation too short": (
        ["validate.window=1000000"],
        ["evaluation.txt", "one window needs 1000000", "validate.window"],
    ),
    "host limit too small": (
        ["limits.host_memory=1MiB"],
        ["limits.host_memory is 1.0 MiB", "needs"],
    ),
    "too small for validation": (
        ["validate.device_memory=100KiB"],
        ["validate.device_memory is 100.0 KiB", "outside the experts take"],
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_refused_before_any_work(project, refused, case, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    overrides, said = RECIPES[case]
    line = refused(*(word for override in overrides for word in ("--set", override)))
    assert all(part in line for part in said), line
    assert not project.partial.exists()


def test_group_size_that_does_not_divide(project, source, refused):
    dense_experts(source, 96)
    for size in (64, 128):
        line = refused("--set", f"requantize.group_size={size}")
        assert f"group_size {size} does not divide the 96 inputs of the experts' down" in line
    dense_experts(source, 36)
    line = refused("--set", "requantize.group_size=-1")
    assert "gate and up is 36 x 128" in line and "multiples of 8" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        ("f\u00fcr".encode("latin-1"), "is not UTF-8 (byte 1)"),
        (None, "cannot be read: Is a directory"),
    ],
)
@pytest.mark.parametrize("key", ["calibration.sources", "validate.text"])
def test_texts_that_are_none(project, refused, key, content, said):
    path = project.folder / "bad.txt"
    path.mkdir() if content is None else path.write_bytes(content)
    value = f"[{path}]" if key.endswith("sources") else path
    assert refused("--set", f"{key}={value}").endswith(f"{path} {said}")


RECIPE_FILES = {
    "not YAML": (b"source: [", "is not YAML"),
    "a list": (b"- source", "holds no recipe"),
    "empty": (b"", "holds no recipe"),
    "not UTF-8": (b"source: \xff", "cannot read the recipe"),
    "without output": (b"source: {model: x}", "output is missing"),
    "number for a key": (b"1: 2", "keys should be strings"),
    "misspelt": (b"source: {model: x}\nouput: {path: y}", "did you mean 'output'?"),
}


@pytest.mark.parametrize("case", RECIPE_FILES)
def test_recipe_files(tmp_path, cli, case):
    content, said = RECIPE_FILES[case]
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    answer = cli("plan", path)
    assert answer.code == 2 and len(answer.err.splitlines()) == 1
    assert str(path) in answer.err and said in answer.err


def test_no_recipe_at_all(tmp_path, cli):
    answer = cli("run", tmp_path / "none.yaml")
    assert (answer.code, answer.err) == (2, f"requant: no recipe at {tmp_path}/none.yaml\n")


OUTPUTS = {
    "not empty": (lambda out: (out.mkdir(), (out / "thesis.tex").touch()), "is not empty and was"),
    "a file": (lambda out: out.touch(), "is not a directory"),
    "a link": (lambda out: out.symlink_to(out.parent), "is a symbolic link"),
    "a dangling link": (lambda out: out.symlink_to(out / "nowhere"), "is a symbolic link"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_that_are_not_ours(project, cli, case):
    make, said = OUTPUTS[case]
    make(project.output)
    before = sorted(project.folder.rglob("*"))
    for options in ((), ("--fresh",)):
        answer = cli("run", project.write(), *options)
        assert answer.code == 2 and len(answer.err.splitlines()) == 1
        assert said in answer.err and str(project.output) in answer.err
    assert sorted(project.folder.rglob("*")) == sorted([*before, project.folder / "recipe.yaml"])


def test_work_directory_that_is_not_ours(project, refused):
    project.partial.mkdir()
    (project.partial / "thesis.tex").touch()
    for options in ((), ("--fresh",)):
        assert "is no work directory of requant; move it away" in refused(*options)
    assert list(project.partial.iterdir()) == [project.partial / "thesis.tex"]


def test_output_below_a_file(project, refused):
    (project.folder / "file").touch()
    line = refused("--set", f"output.path={project.folder}/file/out")
    assert f"{project.folder}/file: cannot be written to" in line


def test_bf16_directory_that_is_not_ours(project, refused):
    target = project.folder / "out-bf16"
    target.mkdir()
    line = refused("--set", "dequantize.write=true")
    assert f"{target} exists and was not made by requant" in line
    target.rmdir()
    target.symlink_to(project.folder / "elsewhere")  # what it leads to is not ours to replace
    line = refused("--set", "dequantize.write=true")
    assert f"{target} is a symbolic link" in line
    assert target.is_symlink()


def test_output_in_the_source(project, source, refused):
    line = refused("--set", f"output.path={source}")
    assert "is not empty and was not made by requant" in line
    line = refused("--set", f"output.path={source}/out")
    assert "lies inside the source directory" in line
    assert not (source / "out.partial").exists()


def test_results_are_no_sources(project, finished, refused):
    line = refused("--set", f"source.model={finished.output}")
    assert "is already quantised as gptq" in line and "requant shard" in line
    line = refused("--set", f"source.model={finished.output / 'config.json'}")
    assert "config.json is a file; give the model's directory" in line


def test_stacked_experts_are_told_as_such(project, source, refused):
    """As transformers 5 holds them, and newer tools write them."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    edit_json(source / INDEX, lambda table: table["weight_map"].update({name: "x.safetensors"}))
    save_file({name: torch.zeros(8, 256, 128, dtype=torch.bfloat16)}, source / "x.safetensors")
    assert f"{name} stacks all experts in one tensor" in refused()


def test_tokens_outside_the_vocabulary(project, source, refused):
    """The tokenizer of another model."""

    def grow(table):
        token = {"id": 900, "content": "value", "special": False, "normalized": False}
        flags = {"single_word": False, "lstrip": False, "rstrip": False}
        table["added_tokens"].append(token | flags)

    edit_json(source / "tokenizer.json", grow)
    assert "do not belong together" in refused()
