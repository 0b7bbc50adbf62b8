"""Running, resuming, being killed, and what may not be mixed."""

import json
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch
from support.damage import flip_first_bit
from support.kill import run_killed
from support.recipes import Project, digests

from pipeline.checkpoint.verify import verify_directory
from pipeline.errors import CheckpointError, OutputError, RecipeError, ResourceError, UserError
from pipeline.plan import plan, prepare


@pytest.fixture(scope="module")
def changes(tmp_path_factory, texts, finished):
    """Every change of the disk that an uninterrupted run makes, in order."""
    project = Project(tmp_path_factory.mktemp("counted"), texts)
    made = run_killed(project.data, project.text, "shard", None)
    assert digests(project.output) == digests(finished.output)
    return made


def _index(changes, *parts):
    """The one change whose description has all the parts."""
    (found,) = (i for i, change in enumerate(changes) if all(p in change for p in parts))
    return found


OLD_STREAMS = ("unlink", "work/streams-000.")


def _moments(changes):
    """Changes before which a run is killed: the delicate ones, and some others by number."""
    publish = _index(changes, "rename", "out.partial/.work ")
    named = {
        "no manifest yet": ("replace", "work.json"),
        "experts written, no marker": ("replace", "requantize-layer-000.json"),
        "marker written, old streams there": OLD_STREAMS,
        "reference written, not named": ("replace", "validation_reference"),
        "shard: tables half done": ("replace", "shard_map.json"),
        "shard: sealed": publish,
        "publish: between the renames": publish + 1,
        "publish: not tidied up": publish + 2,
    }
    others = random.sample(sorted({*range(len(changes))} - {publish, publish + 1, publish + 2}), 3)
    return named | {f"before {changes[number]}": number for number in others}


def test_killed_and_resumed_gives_the_same_bytes(tmp_path, texts, finished, changes):
    expected = digests(finished.output)
    named = _index(changes, "rename", "out.partial ", "/out")
    for number, (moment, kill_at) in enumerate(_moments(changes).items()):
        project = Project(tmp_path / str(number), texts)
        project.folder.mkdir()
        assert run_killed(project.data, project.text, "shard", kill_at) is None, moment
        numbered = isinstance(kill_at, int)
        assert project.output.exists() == (numbered and kill_at > named), moment
        project.run(until="shard")
        assert digests(project.output) == expected, moment
        left = sorted(path.name for path in project.folder.iterdir())
        assert left == ["out"], (moment, left)


def test_killed_again_and_again(project, finished):
    """Each run gets a little further than the one before."""
    kill_at, runs = 4, 0
    while run_killed(project.data, project.text, "shard", kill_at) is None:
        kill_at += random.randint(2, 12)
        runs += 1
    assert runs > 3
    assert digests(project.output) == digests(finished.output)


def test_a_replaced_result_is_never_lost(tmp_path, texts, finished, changes):
    """--fresh over a finished result, killed where the one takes the other's place."""
    publish = _index(changes, "rename", "out.partial/.work ")
    expected = digests(finished.output)
    for number in range(4):
        project = Project(tmp_path / str(number), texts)
        shutil.copytree(finished.output, project.output)
        (project.output / "report.json").unlink()
        kill_at = publish + 1 + number
        assert run_killed(project.data, project.text, "shard", kill_at, fresh=True) is None
        whole = [
            path
            for path in project.folder.iterdir()
            if (path / "SHA256SUMS").is_file() and not verify_directory(path)
        ]
        assert whole, number
        project.run(until="shard")
        assert digests(project.output) == expected
        assert sorted(path.name for path in project.folder.iterdir()) == ["out"]


def test_a_fresh_run_that_was_cut_off_is_resumed(project, finished):
    shutil.copytree(finished.output, project.output)
    assert run_killed(project.data, project.text, "shard", OLD_STREAMS, fresh=True) is None
    assert digests(project.output, ()) == digests(finished.output, ())  # the old one still serves
    project.run(until="shard")
    # The reference may have been there already: it is written beside the streams.
    assert project.said in [[f"resuming: {done} of 5 units are done"] for done in (3, 4)]
    assert digests(project.output) == digests(finished.output)
    assert not (project.output / "report.json").exists()  # it is the new one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_killed_on_a_gpu(project, finished, changes):
    """Two processes, one of them killed, make the bytes of one on a GPU too."""
    assert run_killed(project.data, project.text, "shard", len(changes) // 3) is None
    project.run(until="shard")
    assert digests(project.output) == digests(finished.output)
    made = json.loads((project.output / "conversion.json").read_text())
    assert made["fingerprint"]["device"] == torch.cuda.get_device_name()


def _command(*arguments):
    return [sys.executable, "-m", "pipeline", *map(str, arguments)]


def test_the_command_itself_killed_and_given_again(project, finished):
    """A process as a user starts it, killed at a random moment of its work."""
    command = _command("run", project.write(), "--until", "shard")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "layer 1 of 2" in line:
            break
    time.sleep(random.uniform(0, 1))
    process.kill()
    process.communicate()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "falling back" not in again.stderr and "Warning" not in again.stderr
    assert digests(project.output) == digests(finished.output)


def test_limits_change_no_byte(project, finished):
    project.change(limits={"device_memory": "3GiB", "host_memory": "2GiB"})
    project.run(until="shard")
    assert digests(project.output) == digests(finished.output)


def test_the_seal_covers_every_file_of_the_result(finished):
    sealed = (finished.output / "SHA256SUMS").read_text()
    listed = {line.split("  ")[1] for line in sealed.splitlines()}
    assert set(digests(finished.output)) - listed == {"SHA256SUMS"}


def test_another_thread_count_is_refused_not_mixed(project, finished):
    project.change(limits={"threads": 2})
    project.run(until="dequantize")
    before = digests(project.partial, ())
    project.change(limits={"threads": 1})
    with pytest.raises(OutputError, match=r"threads was 2, is now 1; undo .* or .* --fresh"):
        project.run(until="shard")
    assert digests(project.partial, ()) == before
    project.run(until="shard", fresh=True)
    assert digests(project.output) == digests(finished.output)
    project.change(limits={"threads": 2})
    with pytest.raises(OutputError, match="was made differently: threads was 1, is now 2"):
        project.run()
    assert digests(project.output) == digests(finished.output)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"requantize": {"group_size": 64}}, "recipe.requantize.group_size was 32, is now 64"),
        ({"requantize": {"method": "rtn"}}, "recipe.requantize.method was gptq, is now rtn"),
        ({"calibration": {"seed": 5}}, "seed was 0, is now 5"),
        ({"calibration": {"samples": 7}}, "texts.calibration was"),
        ({"validate": {"stride": 16}}, "texts.stride was 32, is now 16"),
    ],
)
def test_another_recipe_is_refused(project, finished, change, said):
    shutil.copytree(finished.output, project.output)
    project.change(**change)
    with pytest.raises(OutputError, match=said):
        project.run()
    assert not project.partial.exists()


def test_a_changed_source_is_noticed(project, micro):
    """Also where neither its sizes nor the recipe have changed."""
    source = project.folder / "source"
    shutil.copytree(micro, source)
    project.change(source={"model": str(source)})
    project.run(until="shard")
    file = source / "model-00002-of-00003.safetensors"
    data = flip_first_bit(file)
    with pytest.raises(OutputError, match=r"model-00002.* has changed since .*out was begun"):
        project.run()
    file.write_bytes(data)  # its time is another, its bytes are not
    project.run(until="shard")
    config = json.loads((source / "config.json").read_text())
    config["rms_norm_eps"] = 1e-5
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(OutputError, match=r"config.rms_norm_eps was 1e-06, is now 1e-05"):
        project.run()


def test_a_source_changed_between_two_runs(project, micro):
    source = project.folder / "source"
    shutil.copytree(micro, source)
    project.change(source={"model": str(source)})
    project.run(until="dequantize")
    file = source / "model-00001-of-00003.safetensors"
    flip_first_bit(file)
    with pytest.raises(OutputError, match=r"model-00001.* has changed .* --fresh"):
        project.run(until="shard")


def test_nothing_is_left_to_do(project, finished):
    shutil.copytree(finished.output, project.output)
    before = digests(project.output, ())
    started = time.process_time()  # whatever else the machine does
    project.run()
    assert time.process_time() - started < 5
    assert project.said == [f"{project.output} is in place and up to date"]
    assert digests(project.output, ()) == before


def test_only_thresholds_changed(project, finished):
    """The measurement stays, the verdict is another."""
    shutil.copytree(finished.output, project.output)
    project.change(validate={"thresholds": {"perplexity_ratio": 0.5}})
    project.run()
    report = project.report()
    assert not report["passed"]
    assert report["failures"] == [f"perplexity_ratio {report['perplexity_ratio']:.4g} is above 0.5"]
    assert report["validated"] == finished.report()["validated"]


def test_stage_by_stage(project, finished):
    with pytest.raises(OutputError, match=r"dequantize is not finished .*run it first"):
        project.run(only="requantize")
    project.run(only="dequantize")
    assert project.said == [] and not project.output.exists()
    with pytest.raises(OutputError, match="requantize is not finished"):
        project.run(only="shard")
    project.run(until="requantize")
    assert project.said == ["resuming: 1 of 4 units are done"]
    assert not project.output.exists()
    with pytest.raises(OutputError, match=r"out is not finished; run the earlier stages first"):
        project.run(only="validate")
    project.run(only="shard")
    assert digests(project.output) == digests(finished.output)
    assert not project.partial.exists() and not (project.output / "report.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"until": "quantise"}, "unknown stage 'quantise'; stages are: dequantize, requantize"),
        ({"until": "shard", "only": "shard"}, "--until and --only exclude each other"),
        ({"fresh": True, "only": "shard"}, "--fresh begins with the first stage"),
    ],
)
def test_impossible_stages(project, options, said):
    with pytest.raises(RecipeError, match=said):
        project.run(**options)
    assert list(project.folder.iterdir()) == []


def test_fresh_forgets_earlier_work_but_not_for_a_bad_text(project):
    project.run(until="requantize")
    project.change(calibration={"sources": ["/nowhere.txt"]})
    with pytest.raises(UserError, match=r"/nowhere.txt does not exist"):
        project.run(fresh=True)
    assert project.work().finished("requantize-reference") is not None


def test_a_lost_file_is_made_again(project, finished):
    project.run(until="requantize")
    (project.partial / "model-experts-layer-000.safetensors").unlink()
    project.run(until="shard")
    assert project.said == ["resuming: 1 of 5 units are done"]
    assert digests(project.output) == digests(finished.output)


def test_two_runs_at_once(project):
    with project.work(), pytest.raises(OutputError, match=r"another run is working on .*out$"):
        project.run()
    lock = project.folder / ".out.lock"
    lock.touch()  # left behind by a run that was killed
    project.run(until="dequantize")
    assert not lock.exists()


def test_disk_is_checked_and_what_is_there_counts(project, monkeypatch):
    need = plan(prepare(project.recipe, project.text)).disk_bytes
    usage = shutil._ntuple_diskusage
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(need, 1, need - 1))
    with pytest.raises(ResourceError, match=r"free, the plan writes .*; make room"):
        project.run()
    assert not project.partial.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(need, 0, need))
    project.run(until="requantize")
    done = sum(path.stat().st_size for path in project.partial.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(need, done, need - done))
    project.run(until="shard")
    assert project.output.is_dir()


def test_headers_only_cannot_be_converted(project, micro):
    source = shutil.copytree(micro, project.folder / "headers")
    for file in source.glob("*.safetensors"):
        data = file.read_bytes()
        file.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    project.change(source={"model": str(source)})
    plan(prepare(project.recipe, project.text))
    with pytest.raises(CheckpointError, match="holds headers only; it can be planned, not conver"):
        project.run()
    assert not project.partial.exists() and not project.output.exists()
