"""What a recipe will do and need: on the micro model against what happens, and on the headers of
the full 80B model."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import big
from support.damage import header_end

from pipeline.cli import main
from pipeline.errors import ResourceError
from pipeline.pace import DISK_BYTES_PER_SECOND
from pipeline.plan import as_dict, plan, prepare
from pipeline.recipe import load_recipe
from pipeline.stages.order import BUILDING, STAGES
from pipeline.stages.placement import RUNTIME_BYTES, place, tile_bytes
from pipeline.stages.texts import planned_windows

RECIPE = Path(__file__).parents[1] / "recipes" / "qwen3-next-80b-gptq.yaml"
GIB = 1 << 30
GROUPS = 2 * 512 * (2048 // 128) + 2048 * (512 // 128)
PACKED_EXPERT = 3 * 2048 * 512 // 2 + GROUPS * 2 + GROUPS // 2 + 4 * (2048 + 2048 + 512)
"""Codes, scales, zeros and g_idx of an expert's three matrices at 4 bits and groups of 128."""


def _elements(*tables):
    total = 0
    for table in tables:
        for shape in table.values():
            count = 1
            for length in shape:
                count *= length
            total += count
    return total


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """The full 80B model's headers; made once, since they are 98 MB of text."""
    started = time.monotonic()
    folder = big.write_headers(tmp_path_factory.mktemp("80b") / "model")
    yield SimpleNamespace(path=folder, seconds=time.monotonic() - started)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def large(headers):
    """The real recipe on them, on a machine without a GPU."""
    context = prepare(*load_recipe(RECIPE, [f"source.model={headers.path}", *ELSEWHERE]))
    return dataclasses.replace(context, device=torch.device("cpu"))


ELSEWHERE = [f"output.path=/tmp/requant-test-{id(big)}/out"]
"""An output that is not there; nothing is ever written to it."""


def test_the_80b_recipe_is_planned_in_seconds(headers, cli, roomy):
    started = time.process_time()
    answer = cli(
        "plan", RECIPE, "--set", f"source.model={headers.path}", "--set", *ELSEWHERE, "--json"
    )
    assert answer.code == 0, answer.err
    assert headers.seconds + time.process_time() - started < 20
    made = json.loads(answer.out)
    layers = [job for job in made["jobs"] if job["layer"] is not None]
    assert len(made["jobs"]) == 52 and len(layers) == 48
    for job in layers:
        full = (job["layer"] + 1) % 4 == 0
        mixer = (big.ATTENTION, big.PLAIN_ATTENTION) if full else (big.DELTANET, big.PLAIN_DELTANET)
        dense = _elements(*mixer, big.EVERY_LAYER, big.NORMS)
        assert job["bytes_written"] == 512 * PACKED_EXPERT + 2 * dense, job["unit"]
        assert f"model-experts-layer-{job['layer']:03d}.safetensors" in job["outputs"]
    experts = 48 * 512 * PACKED_EXPERT
    assert 37 * GIB < experts < 38 * GIB  # 4.25 bits each, and g_idx
    assert experts < made["disk_bytes"] < 1.4 * experts
    assert made["seconds"] == pytest.approx(sum(job["seconds"] for job in made["jobs"]))
    assert made["read_rate"] == DISK_BYTES_PER_SECOND  # headers alone say nothing
    assert {job["steps"] for job in layers} == {
        64 * (2048 + 6 * 512) * 3
    }  # tiles of 8 experts, on a CPU


def test_the_80b_awq_recipe_is_planned_too(headers, large, roomy):
    """It writes no g_idx, reads the experts twice, and keeps to the same limits."""
    recipe = RECIPE.with_name("qwen3-next-80b-awq.yaml")
    context = prepare(*load_recipe(recipe, [f"source.model={headers.path}", *ELSEWHERE]))
    context = dataclasses.replace(context, device=torch.device("cpu"))
    made, other = plan(context), plan(large)
    assert len(made.jobs) == len(other.jobs)
    for ours, gptq in zip(made.jobs, other.jobs, strict=True):
        if ours.stage == "requantize" and ours.layer is not None:
            assert gptq.bytes_written - ours.bytes_written == 512 * 4 * (2048 + 2048 + 512)
            assert ours.bytes_read == 2 * gptq.bytes_read and ours.flops > gptq.flops
            assert ours.host_bytes <= gptq.host_bytes
    assert 0.98 < made.disk_bytes / other.disk_bytes < 1


def test_what_the_80b_source_is(headers, cli):
    answer = cli("inspect", headers.path)
    verdict = answer.out.splitlines()[0]
    assert "qwen3_next: 48 layers of 512 experts stored one by one as nf4" in verdict
    assert "headers only" in answer.out


def test_80b_sizes(large):
    summary = large.checkpoint.describe()
    assert (summary.experts, len(summary.layers), summary.headers_only) == (512, 48, True)
    others = 12 * len(big.ATTENTION) + 36 * len(big.DELTANET) + 48 * len(big.EVERY_LAYER)
    assert summary.formats["nf4 double"].count == 73_728 + others
    assert (
        77e9
        < sum(w.elements for n, w in large.checkpoint.weights.items() if ".experts." in n)
        < 78e9
    )
    assert 79e9 < summary.elements < 80.5e9


def test_80b_fits_its_own_limits(large, roomy):
    """On a CPU and on a GPU; the validation has the memory of the machine it will run on."""
    made = plan(large)
    converting = max(job.host_bytes for job in made.jobs if job.stage in BUILDING)
    tokens = 2 * 128 * 2048 + 32 * 2048
    assert 8 * 2048 * tokens < converting < 24 * GIB - RUNTIME_BYTES
    (validation,) = (job for job in made.jobs if job.stage == "validate")
    assert 40e9 < validation.host_bytes < 55e9  # all experts, and what else is in memory
    cuda = dataclasses.replace(large, device=torch.device("cuda"))
    jobs = [job for stage in STAGES.values() for job in stage.jobs(cuda)]
    assert 8 * GIB < max(job.device_bytes for job in jobs if job.stage in BUILDING) < 24 * GIB
    assert max(job.host_bytes for job in jobs if job.stage in BUILDING) < 8 * GIB
    assert 4 * GIB < max(job.device_bytes for job in jobs if job.stage == "validate") < 10 * GIB


def test_80b_in_too_little_memory(large, roomy, monkeypatch):
    tight = large.recipe.model_copy(
        update={"limits": large.recipe.limits.model_copy(update={"host_memory": 8 * GIB})}
    )
    with pytest.raises(ResourceError, match=r"limits.host_memory is 8.0 GiB, the plan needs 1\d"):
        plan(dataclasses.replace(large, recipe=tight))
    # a directory with its weights is there to be run, so the machine itself is asked
    monkeypatch.setattr(large.checkpoint, "headers_only", False)
    with pytest.raises(ResourceError, match=r"of host memory, 512.0 MiB are there; lower"):
        plan(large)
    memory = SimpleNamespace(available=30 * GIB)
    monkeypatch.setattr("pipeline.plan.psutil.virtual_memory", lambda: memory)
    with pytest.raises(ResourceError, match=r"validate needs 4\d.* run it with --until shard here"):
        plan(large)
    plan(large, BUILDING)


def test_80b_on_too_small_a_gpu(large, roomy, monkeypatch):
    monkeypatch.setattr("pipeline.plan.matrix_rate", lambda *_: 1e12)  # asks the device
    limits = large.recipe.limits.model_copy(update={"device_memory": 6 * GIB})
    recipe = large.recipe.model_copy(update={"limits": limits})
    context = dataclasses.replace(large, device=torch.device("cuda"), recipe=recipe)
    with pytest.raises(
        ResourceError, match=r"limits.device_memory is 6.0 GiB; .* one tile .* 7\.\d GiB are"
    ):
        plan(context)
    made = plan(dataclasses.replace(context, recipe=large.recipe))
    assert made.device_bytes < 24 * GIB


@pytest.mark.parametrize("method", ["gptq", "awq+gptq", "rtn"])
def test_gpu_memory_hardly_depends_on_the_number_of_experts(large, method):
    """Fewer experts get more tokens each, and smaller tiles; limits have no say in those."""
    wanted = large.recipe.requantize.model_copy(update={"method": method})
    recipe = large.recipe.model_copy(update={"requantize": wanted})
    needs = {}
    for experts, each in ((512, 32), (256, 16), (128, 8), (64, 4), (32, 2)):
        geometry = dataclasses.replace(large.geometry, experts=experts)
        context = dataclasses.replace(
            large, device=torch.device("cuda"), geometry=geometry, recipe=recipe
        )
        assert context.tile_experts == each
        found = place(context)
        assert not found.beside
        needs[experts] = found.device_bytes
        small = recipe.limits.model_copy(update={"device_memory": 8 * GIB})
        tight = dataclasses.replace(context, recipe=recipe.model_copy(update={"limits": small}))
        assert tight.tile_experts == each
        assert place(tight).beside
        several = dataclasses.replace(context, others=(torch.device("cuda", 1),))
        assert not place(several).beside
        assert place(several).device_bytes > found.device_bytes
    assert max(needs.values()) < 24 * GIB
    # Tiles that are decoded ahead are smaller, too.
    assert max(needs.values()) < 1.2 * min(needs.values())


def test_as_many_tiles_at_once_on_a_cpu_as_have_room(large, roomy):
    torch.set_num_threads(6)
    crews = {}
    for gib in (64, 26, 20):
        limits = large.recipe.limits.model_copy(update={"host_memory": gib * GIB})
        recipe = large.recipe.model_copy(update={"limits": limits})
        context = dataclasses.replace(large, recipe=recipe)
        plan(context, BUILDING)  # does not refuse
        crews[gib] = place(context).crew
        assert place(context).threads == 1
    assert crews[64] == 6 > crews[26] > crews[20] == 1


def test_tiles_of_wide_experts(large):
    """Mixtral's inputs of down are seven times as wide: one expert fills a tile, on a CPU too."""
    wide = dataclasses.replace(large.geometry, experts=8, top_k=2, hidden=4096, inner=14336)
    for device in ("cuda", "cpu"):
        context = dataclasses.replace(large, device=torch.device(device), geometry=wide)
        assert context.tile_experts == 1
    # Their second moments alone, and five more of that size, are 5 GB.
    assert tile_bytes(context) > 6 * 4 * 14336**2


def test_sizes_are_what_comes_to_be(project):
    made = plan(prepare(project.recipe, project.text))
    project.run(until="requantize")
    work = project.work()
    for job in made.jobs:
        if job.stage != "requantize" or job.layer is None:
            continue
        marker = work.finished(job.unit)
        assert [record.name for record in marker.outputs] == list(job.outputs)
        data = 0
        for record in marker.outputs:
            content = (work.root / record.name).read_bytes()
            data += len(content) - header_end(content)
        assert data == job.bytes_written
    streams = work.root / ".work" / "streams-001.safetensors"
    tokens = 2 * 8 * 64 + 4 * 64  # calibration twice: through the source as well
    assert 0 < streams.stat().st_size - 2 * tokens * 128 < 1000
    layer = next(job for job in made.jobs if job.layer == 0)
    assert layer.bytes_scratch == 2 * 2 * tokens * 128


def test_the_plan_is_what_is_run(project):
    made = plan(prepare(project.recipe, project.text))
    units = [job.unit for job in made.jobs]
    assert units == [
        "dequantize-check",
        "requantize-layer-000",
        "requantize-layer-001",
        "requantize-reference",
        "shard",
        "validate",
    ]
    project.run(until="requantize")
    assert {marker.unit for marker in project.work().markers()} == set(units[:4])
    assert json.loads(json.dumps(as_dict(made)))["jobs"][1]["unit"] == units[1]
    assert made.seconds == pytest.approx(sum(made.job_seconds(job) for job in made.jobs))


GROWTH = """
import re, sys
from pathlib import Path
import bitsandbytes, psutil, transformers
from pipeline.recipe import load_recipe
from pipeline.run import run
recipe = load_recipe(Path(sys.argv[1]))
before = psutil.Process().memory_info().rss
run(*recipe, quiet=True, until="requantize")
high = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(int(high[1]) * 1024 - before)
"""
"""In a process of its own: what the allocator keeps of earlier tests is not this run's.  Not by
getrusage, whose peak a child has from its parent."""


def test_memory_stays_below_the_estimate(project, texts):
    """Enough tokens that activations, not libraries, are what grows."""
    text = project.folder / "long.txt"
    text.write_text(texts["calibration"].read_text() * 25)
    project.change(calibration={"sources": [str(text)], "samples": 500, "sequence_length": 128})
    context = prepare(project.recipe, project.text)
    estimate = max(job.host_bytes for job in plan(context).jobs)
    assert estimate > 100e6
    recipe = project.folder / "recipe.yaml"
    recipe.write_text(project.text)
    ran = subprocess.run(
        [sys.executable, "-c", GROWTH, str(recipe)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    used = int(ran.stdout.split()[-1])
    # what libraries load on first use comes on top
    print(f"used {used}, estimate {estimate}")
    assert used < estimate + 400e6, (used, estimate)


def test_windows_without_a_bound(project, texts):
    project.change(validate={"max_windows": None})
    bytes_ = texts["evaluation"].stat().st_size
    windows = planned_windows(project.recipe)
    assert len(context_windows(project)) <= windows <= bytes_ // 32


def context_windows(project):
    return prepare(project.recipe, project.text).texts.windows


def test_table(project, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["requant", "plan", str(project.write())])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None)
    out = capsys.readouterr().out
    for word in ("plan for", "dequantize", "requantize", "shard", "validate", "needs", "MiB disk"):
        assert word in out
    assert not project.output.exists() and not project.partial.exists()


@pytest.mark.parametrize("less", [{"refinement_passes": 0}, {"error_correction": False}])
def test_all_that_the_solver_does_counts(project, less):
    def operations():
        jobs = STAGES["requantize"].jobs(prepare(project.recipe, project.text))
        return sum(job.flops for job in jobs)

    before = operations()
    project.change(requantize=less)
    assert 0 < operations() < before
