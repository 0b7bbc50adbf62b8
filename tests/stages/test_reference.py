"""`source.reference`: the original, to measure against beside the source."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.damage import edit_json
from support.variants import bf16_source
from transformers import AutoModelForCausalLM

from pipeline.evaluate.reference import Reference
from pipeline.stages.units import ORIGINAL_FILE, REFERENCE_FILE


@pytest.fixture(scope="module")
def original(micro, tmp_path_factory):
    """A bf16 model that the source could have been made from: the source and some noise."""
    folder = bf16_source(micro, tmp_path_factory.mktemp("original") / "bf16")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                tensors[name] = (tensor.float() * (1 + 0.1 * torch.randn(tensor.shape))).bfloat16()
        save_file(tensors, path, {"format": "pt"})
    return folder


def test_both_baselines_are_reported(project, micro, original, cli):
    project.change(source={"reference": str(original)})
    answer = cli("run", project.write())
    assert answer.code == 0, answer.err
    report = project.report()
    found = report["reference"]
    assert report["baseline"] == f"{micro} as stored (nf4 double)"
    assert found["name"] == f"{original} as stored (dense BF16)"
    assert "quantised / reference perplexity" in answer.out
    quantized, source = (report[k]["perplexity"] for k in ("quantized", "source"))
    assert found["perplexity_ratio"] == pytest.approx(quantized / found["perplexity"])
    assert found["source_perplexity_ratio"] == pytest.approx(source / found["perplexity"])
    # Another 10 % of noise lies between the result and the original.
    assert found["kl_divergence"] > report["kl_divergence"] > 0
    record = Reference.load(project.output / ORIGINAL_FILE)
    assert record.perplexity == pytest.approx(found["perplexity"])
    own = Reference.load(project.output / REFERENCE_FILE)
    assert torch.equal(own.windows.token_ids, record.windows.token_ids)

    # As transformers' own loading of the directory has it.
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    total, count = 0.0, 0
    for ids, scored in zip(record.windows.token_ids, record.windows.scored, strict=True):
        with torch.inference_mode():
            logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        for position in torch.nonzero(scored[: len(ids)]).flatten().tolist():
            total -= float(logprobs[position - 1, ids[position]])
            count += 1
    expected = torch.tensor(total / count).exp()
    # bf16 sends some tokens of an untrained model to other experts than float32: 2.4 % was seen
    assert found["perplexity"] == pytest.approx(float(expected), rel=0.06)

    # The page says it too, and measuring against the original anew finds the same.
    page = (project.output / "report.html").read_text()
    assert "Result against the original" in page and f"{found['kl_divergence']:.5f}" in page
    file = project.folder / "again.json"
    answer = cli("validate", project.output, "--reference", original, "--json", file)
    assert answer.code == 0, answer.err
    assert json.loads(file.read_text())["reference"] == found
    assert project.report() == report  # not kept: what the model records is its own

    assert cli("verify", project.output).code == 0
    sealed = (project.output / "SHA256SUMS").read_text()
    assert ORIGINAL_FILE in sealed
    # Validated again, anywhere, without the original; and another one would be another result.
    shutil.move(original, original.with_name("away"))
    again = json.loads((project.output / "report.json").read_text())["reference"]
    assert cli("validate", project.output).code == 0
    assert project.report()["reference"] == again
    shutil.move(original.with_name("away"), original)
    project.change(source={"reference": None})
    answer = cli("run", project.write())
    assert answer.code == 2 and "was made differently: reference was" in answer.err


def test_without_a_reference_there_is_none(finished):
    assert finished.report()["reference"] is None
    assert not (finished.output / ORIGINAL_FILE).exists()


def _other(**changes):
    return lambda folder: edit_json(folder / "config.json", lambda table: table.update(changes))


def _words(folder):
    def swap(table):
        words = table["model"]["vocab"]
        first, second = list(words)[-2:]
        words[first], words[second] = words[second], words[first]

    edit_json(folder / "tokenizer.json", swap)


def _lose(folder):
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    edit_json(folder / "config.json", lambda table: table.update(num_hidden_layers=2))
    path.write_bytes(path.read_bytes()[:100])


CASES = {
    "gone": (shutil.rmtree, "does not exist"),
    "model": (_other(model_type="qwen3_moe"), "its model_type is 'qwen3_moe'"),
    "experts": (_other(num_experts=4), "its experts is 4, the source's is 8"),
    "vocabulary": (_other(vocab_size=513), "its vocabulary is 513, the source's is 512"),
    "words": (_words, "its tokenizer has another vocabulary"),
    "cut": (_lose, "safetensors"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_the_original(project, original, tmp_path, cli, case):
    spoil, said = CASES[case]
    copy = shutil.copytree(original, tmp_path / "copy")
    spoil(copy)
    answer = cli("run", project.change(source={"reference": str(copy)}).write())
    assert answer.code == 2 and said in answer.err, answer.err
    assert answer.err.count("\n") == 1 and not project.partial.exists()


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_the_original_of_a_finished_model(finished, original, tmp_path, cli, case):
    spoil, said = CASES[case]
    copy = shutil.copytree(original, tmp_path / "copy")
    spoil(copy)
    answer = cli("validate", finished.output, "--reference", copy)
    assert answer.code == 2 and answer.err.count("\n") <= 2, answer.err
    assert (said if case != "gone" else "not a directory") in answer.err, answer.err
