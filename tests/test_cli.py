"""Every verb as a user calls it, on the micro model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.damage import header_end

from pipeline import __version__
from pipeline.hybrid.native.library import find
from pipeline.stages import validate

REPORT = {
    ("source", "perplexity"): float,
    ("quantized", "perplexity"): float,
    ("perplexity_ratio",): float,
    ("perplexity_ratio_interval",): list,
    ("kl_divergence",): float,
    ("top1_agreement",): float,
    ("scored_tokens",): int,
    ("decode_tokens_per_second",): float,
    ("prefill_tokens_per_second",): float,
    ("load_seconds",): float,
    ("peak_host_bytes",): int,
    ("peak_device_bytes",): int,
    ("placement",): dict,
    ("experts", "count"): int,
    ("experts", "fallback"): int,
    ("experts", "tokens_min"): int,
    ("experts", "tokens_median"): (int, float),
    ("stages", "dequantize", "seconds"): float,
    ("stages", "requantize", "seconds"): float,
    ("stages", "shard", "seconds"): float,
    ("stages", "validate", "seconds"): float,
    ("passed",): bool,
    ("failures",): list,
}
"""Keys that others rely on, and what they hold."""

VERBS = ("doctor", "inspect", "plan", "run", "shard", "validate", "verify", "generate", "report")
PLACES = {"report": "json", "page": "html"}


@pytest.fixture(autouse=True)
def quick(monkeypatch, one_thread):
    """Speed is measured on fewer tokens: these tests read reports, they do not judge them."""
    monkeypatch.setattr(validate, "DECODE_TOKENS", 8)


@pytest.fixture
def output(finished, tmp_path):
    """A finished model that may be written to."""
    return shutil.copytree(finished.output, tmp_path / "model")


def test_version_and_help(cli):
    assert cli("--version").out == f"requant {__version__}\n"
    answer = cli("--help")
    assert answer.code == 0
    for verb in VERBS:
        assert f"  {verb} " in answer.out
        assert cli(verb, "--help").code == 0


@pytest.mark.parametrize("arguments", [("frobnicate",), ("run",), ("plan", "x", "--nonsense")])
def test_usage_errors(cli, arguments):
    answer = cli(*arguments)
    assert answer.code == 2 and "Usage:" in answer.err and "Traceback" not in answer.err


def test_as_a_module():
    """`python -m pipeline`, and that asking for help or the version imports no torch."""
    code = "import sys; sys.argv[1:] = ['--version']; import runpy\n"
    code += "try: runpy.run_module('pipeline', run_name='__main__')\n"
    code += "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"requant {__version__}", "0 False"]


def test_doctor(cli):
    table = cli("doctor")
    found = json.loads(cli("doctor", "--json").out)
    assert found["requant"] == __version__ and found["torch"]
    for name in ("GPU", "host memory", "disk here", "CPU", "experts on CPU", "torch int4 on CPU"):
        assert found[name] and name in table.out


def test_doctor_says_what_to_do(cli, monkeypatch):
    monkeypatch.setattr("pipeline.doctor._int4_works", lambda: False)
    monkeypatch.setattr("pipeline.doctor.find", lambda: "it was not built")
    monkeypatch.setattr("pipeline.doctor.can_draw", lambda: False)
    monkeypatch.setattr("pipeline.doctor.FULL_SIZE_HOST", 1 << 60)
    monkeypatch.setattr("pipeline.doctor.FULL_SIZE_DISK", 1 << 60)
    advice = json.loads(cli("doctor", "--json").out)["advice"]
    for words in (
        "apt install gcc",
        "no int4 product",
        "--until shard",
        "output.path",
        "-e '.[report]'",
    ):
        assert sum(words in line for line in advice) == 1
    monkeypatch.undo()
    monkeypatch.setattr("pipeline.doctor.advice", lambda _found: [])
    assert cli("doctor").out.startswith("requant works here; nothing is missing\n")


def test_completion():
    """As the shell asks for it."""
    asked = {"_REQUANT_COMPLETE": "complete_bash", "COMP_WORDS": "requant v", "COMP_CWORD": "1"}
    done = subprocess.run(
        [Path(sys.executable).with_name("requant")],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["validate", "verify"]


def test_plan_says_what_is_done(project, cli):
    """Nothing, a part, all but the measurement, all; and what a run would refuse."""

    def plan(*options):
        data = json.loads(cli("plan", project.write(), *options, "--json").out)
        first = cli("plan", project.write(), *options).out.splitlines()[0]
        return data["have"]["state"], sum(job["done"] for job in data["jobs"]), first

    state, done, line = plan()
    assert (state, done) == ("new", 0) and line.startswith("nothing is done yet: about ")
    assert cli("run", project.write(), "--until", "requantize").code == 0
    state, done, line = plan()
    assert (state, done) == ("unfinished", 4)
    assert line.startswith("unfinished work is there: 4 of 6 units are done; about ")
    assert line.endswith("(shard, validate)")
    state, done, line = plan("--set", "requantize.group_size=64")
    assert (state, done) == ("other", 0)
    assert line.startswith("a run would refuse: ") and "group_size was 32, is now 64" in line
    assert cli("run", project.write(), "--until", "shard").code == 0
    state, done, line = plan()
    assert (state, done) == ("finished", 5)
    assert line.startswith("the model is made: 5 of 6 units") and line.endswith("(validate)")
    assert cli("run", project.write()).code == 0
    state, done, line = plan()
    assert (state, done) == ("finished", 6) and line.startswith("everything is done")
    state, _, line = plan("--set", "requantize.group_size=64")
    assert state == "other" and "group_size was 32, is now 64" in line


def test_inspect(cli, micro, finished):
    answer = cli("inspect", micro)
    assert answer.code == 0
    verdict = "qwen3_next: 2 layers of 8 experts stored one by one as nf4 double"
    assert answer.out.startswith(verdict)
    found = json.loads(cli("inspect", micro, "--json").out)
    assert found["formats"]["nf4 double"]["count"] == 65 and found["experts"] == 8
    assert "gptq" in cli("inspect", finished.output).out.splitlines()[0]
    for model in ("/nowhere", "no-such-model", "nobody/nothing", micro / "config.json"):
        answer = cli("inspect", model)
        assert answer.code == 2 and len(answer.err.splitlines()) == 1 and str(model) in answer.err


def test_run(project, cli):
    answer = cli("run", project.write(), "--set", "validate.max_windows=2")
    assert answer.code == 0, answer.err
    for words in ("quantised perplexity", "KL divergence", "top-1 agreement", "decode, tokens/s"):
        assert words in answer.out
    places = [f"{name}: {project.output}/report.{name_of}" for name, name_of in PLACES.items()]
    assert answer.out.splitlines()[-2:] == places
    *lines, advice = answer.err.splitlines()
    if isinstance(find(), str):
        assert lines.pop() == f"no native kernel, torch's products compute experts: {find()}"
    assert lines.pop() == "no GPU was found: the whole model runs on the CPU"
    assert "pipeline.hybrid.load" in advice and "random" in advice
    # one line when a stage begins; more only where one takes longer than half a minute
    begun = [line.split("] ")[1] for line in lines]
    firsts = ["dequantize: check", "requantize: layer 1 of 2 (linear attention)", "shard"]
    assert [line for line in begun if line in firsts] == firsts
    assert begun[-1] == "validate"
    again = cli("run", project.write(), "--set", "validate.max_windows=2", "--json")
    assert again.code == 0
    assert json.loads(again.out) == project.report()
    assert again.err.splitlines()[0] == f"{project.output} is in place and up to date"


def test_run_part_of_the_way(project, cli):
    answer = cli("run", project.write(), "--until", "requantize")
    assert (answer.code, answer.out) == (0, f"result: {project.partial}\n")
    answer = cli("run", project.write(), "--only", "shard", "--json")
    assert (answer.code, json.loads(answer.out)) == (0, {"result": str(project.output)})
    answer = cli("run", project.write(), "--until", "quantise")
    assert answer.code == 2 and "stages are: dequantize, requantize, shard, validate" in answer.err


def test_thresholds_decide_the_exit_code(output, project, cli):
    shutil.copytree(output, project.output)
    answer = cli("run", project.write(), "--set", "validate.thresholds.perplexity_ratio=0.9")
    assert answer.code == 1
    assert "FAILED: perplexity_ratio" in answer.out and "is above 0.9" in answer.out
    assert cli("run", project.write()).code == 0
    answer = cli("run", project.write(), "--set", "validate.thresholds.top1_agreement=1")
    assert answer.code == 1 and "top1_agreement" in answer.out
    assert not project.report()["passed"]
    # what was asked for stays with the model
    assert cli("validate", project.output).code == 1


def test_report_keys(finished):
    report = finished.report()
    for name in ("dequantize", "requantize", "shard", "validate"):
        took = report["stages"][name]
        assert took["peak_host_bytes"] > 50 << 20
        assert took["estimate"]["seconds"] > 0 and took["estimate"]["host_bytes"] > 50 << 20
    for path, kind in REPORT.items():
        value = report
        for key in path:
            value = value[key]
        assert isinstance(value, kind), path
    low, high = report["perplexity_ratio_interval"]
    assert low <= report["perplexity_ratio"] <= high
    ratio = report["quantized"]["perplexity"] / report["source"]["perplexity"]
    assert report["perplexity_ratio"] == pytest.approx(ratio)
    assert 0 <= report["kl_divergence"] < 1 and 0 < report["top1_agreement"] <= 1
    assert report["experts"]["count"] == 8 and report["experts"]["fallback"] == 0
    assert report["passed"] and report["failures"] == []
    assert report["text"]["text"] == "evaluation.txt"


def test_validate(output, cli, tmp_path):
    file = tmp_path / "copy.json"
    before = json.loads((output / "report.json").read_text())
    answer = cli("validate", output, "--device-memory", "4GiB", "--json", file)
    assert answer.code == 0, answer.err
    report = json.loads(file.read_text())
    assert report == json.loads((output / "report.json").read_text())
    for key in ("source", "quantized", "kl_divergence"):
        assert report[key] == before[key]
    assert report["placement"]["device_memory_limit"] == 4 << 30
    assert report["placement"]["use"] == {"0": {"cpu": 1.0}, "1": {"cpu": 1.0}}
    assert report["question"]["placement"] == report["placement"]["request"] == "auto"
    assert cli("verify", output).code == 0  # a new report breaks no seal


def test_validate_against_the_source(output, micro, texts, cli, tmp_path):
    """The same windows give the figures of the record; a text of one's own gives others."""
    before = (output / "report.json").read_text()
    file = tmp_path / "copy.json"
    answer = cli("validate", output, "--source", micro, "--json", file)
    assert answer.code == 0, answer.err
    report, known = json.loads(file.read_text()), json.loads(before)
    assert report["source"]["perplexity"] == pytest.approx(known["source"]["perplexity"], rel=0.02)
    assert report["scored_tokens"] == known["scored_tokens"]
    assert (output / "report.json").read_text() == before  # that one is about its own text
    (output / "validation_reference.safetensors").unlink()
    answer = cli("validate", output)
    assert answer.code == 2 and "give the source it was made from with --source" in answer.err
    answer = cli(
        "validate", output, "--source", micro, "--text", texts["calibration"], "--json", file
    )
    assert answer.code == 0, answer.err
    assert json.loads(file.read_text())["text"]["text"] == "calibration.txt"


def test_validate_refuses(output, micro, cli, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    cases = {
        ("/nowhere",): "/nowhere is not a directory",
        (output, "--text", short): "--text goes with --source",
        (output, "--source", micro, "--text", short): "short.txt has",
        (output, "--source", "/nowhere"): "/nowhere",
        (output, "--device-memory", "much"): "'much' is not a size",
        (output, "--device-memory", "1KiB"): "weights outside the experts need",
        (output, "--placement", "cpu:0.5"): "must add up to 1",
        (output, "--json", tmp_path / "no" / "file.json"): "is not a directory",
    }
    for arguments, said in cases.items():
        answer = cli("validate", *arguments)
        assert answer.code == 2 and said in answer.err, (arguments, answer)
        assert len(answer.err.splitlines()) <= 2


def test_verify(output, cli):
    answer = cli("verify", output)
    assert (answer.code, answer.out) == (0, f"{output}: ok\n")
    assert json.loads(cli("verify", output, "--json").out) == {
        "ok": True,
        "problems": [],
        "remarks": [],
    }
    file = output / "model-experts-layer-001.safetensors"
    data = bytearray(file.read_bytes())
    data[header_end(data) + 1000] ^= 1
    file.write_bytes(data)
    answer = cli("verify", output)
    assert answer.code == 1 and f"{file.name}: its SHA-256 is not" in answer.out
    answer = cli("verify", output, "--json")
    found = json.loads(answer.out)
    assert answer.code == 1 and not found["ok"] and len(found["problems"]) >= 1
    answer = cli("verify", "/nowhere")
    assert (answer.code, answer.err) == (2, "requant: /nowhere is not a directory\n")


def test_shard(output, cli, tmp_path):
    """A model of one file, as others publish theirs; it runs, and is measured against a source."""
    single = tmp_path / "single"
    single.mkdir()
    tensors = {}
    for file in output.glob("model-*.safetensors"):
        tensors |= load_file(file)
    save_file(tensors, single / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(output / name, single / name)
    answer = cli("shard", single, "--output", tmp_path / "split")
    assert answer.code == 0 and answer.out == f"result: {tmp_path}/split\n", answer.err
    assert cli("verify", tmp_path / "split").code == 0
    answer = cli("shard", single, "--output", single)
    assert answer.code == 2 and "choose another" in answer.err


def test_generate(output, cli):
    arguments = ("generate", output, "--prompt", "the value of", "--max-new-tokens", 5)
    answer = cli(*arguments)
    assert answer.code == 0, answer.err
    assert float(re.fullmatch(r"(?s).*\n([0-9.]+) tokens/s\n", answer.err)[1]) > 0
    answer_of_a_whole_model = answer.out  # greedy, so the same again
    told = cli(*arguments, "--stats", "--static")
    assert told.out == answer.out
    for words in ("placement", "prefill", "5 tokens,", "100.00\N{NO-BREAK SPACE}% of the calls"):
        assert words in told.err, told.err
    assert told.err.count("no GPU was found") == (not torch.cuda.is_available())
    answer = cli(*arguments, "--placement", "elsewhere")
    assert answer.code == 2 and '"elsewhere" is no road' in answer.err
    answer = cli("generate", output / "nowhere", "--prompt", "x")
    assert answer.code == 2 and "nowhere is not a directory" in answer.err
    answer = cli("generate", output, "--prompt", "")
    assert answer.code == 2 and "prompt" in answer.err
    assert cli(*arguments, "--verify").out == answer_of_a_whole_model
    (output / "tokenizer.json").unlink()
    answer = cli(*arguments, "--verify")
    assert answer.code == 2 and "tokenizer.json: listed in SHA256SUMS" in answer.err
    answer = cli(*arguments)
    assert answer.code == 2 and "tokenizer" in answer.err and "Traceback" not in answer.err


def test_interrupted(project, cli, monkeypatch):
    """Ctrl-C: one line, which says of a run how to go on, and the usual exit code."""

    def stop(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.stages.requantize.Requantize._layer", stop)
    answer = cli("run", project.write())
    assert answer.code == 130
    assert answer.err.splitlines()[-1] == "requant: stopped; the same command goes on from here"
    monkeypatch.undo()
    monkeypatch.setattr("pipeline.stages.shard.split_existing", stop)
    answer = cli("shard", "any", "--output", "split")
    assert answer.code == 130 and answer.err.splitlines()[-1] == "requant: stopped"
    monkeypatch.undo()
    assert cli("run", project.write(), "--until", "shard").code == 0


def test_sigterm_ends_every_verb_as_ctrl_c_does(output, cli, monkeypatch):
    def unheard(*_arguments):
        raise AssertionError("the signal was left to whoever started the program")

    def terminate(*_arguments, **_options):
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, unheard)
    try:
        monkeypatch.setattr("pipeline.stages.revalidate.validate_model", terminate)
        answer = cli("validate", output)
        assert (answer.code, answer.err.splitlines()[-1]) == (130, "requant: stopped")
        monkeypatch.setattr("pipeline.run.survey", terminate)
        answer = cli("plan", "recipes/demo.yaml")
        assert (answer.code, answer.err) == (130, "requant: stopped\n")
        assert signal.getsignal(signal.SIGTERM) is unheard
    finally:
        signal.signal(signal.SIGTERM, before)


def test_defects_keep_their_traceback(project, cli, monkeypatch):
    """What is not the user's to mend is not dressed up as if it were."""
    monkeypatch.setattr("pipeline.run.survey", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("plan", project.write())
