"""One row: convert in a process of its own, read the result, evaluate, remember."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from pipeline import __version__
from pipeline.checkpoint.reader import Checkpoint
from pipeline.checkpoint.writer import write_json
from pipeline.errors import CheckpointError, OutputError, UserError
from pipeline.evaluate.metrics import Comparison
from pipeline.evaluate.reference import Reference
from quality.compressed_tensors import to_dense
from quality.mended import mend
from quality.methods import Method, slug
from quality.workplace import Workplace

SCRIPTS = Path(__file__).parents[1]
TAIL = 600
"""Characters of a failed peer's last line that are kept."""


@dataclass(frozen=True)
class Ended:
    """How a conversion's process ended."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    error: str | None


def row(method: Method, group: int, place: Workplace, threads: int, again: bool) -> dict[str, Any]:
    """The row as plain data, made now or found in `rows/`."""
    name = slug(method.name, group)
    path = place.folder / "rows" / f"{name}.json"
    made_by = _made_by(method, group, place, threads)
    read_by = digest(made_by, place.read_by, tree("pipeline/evaluate"))
    known = read_json(path)
    if known.get("read_by") == read_by and not again:
        return known
    output = place.folder / "models" / name
    known = {} if again else read_json(output.with_name(output.name + ".json"))
    if known.get("made_by") == made_by:
        made = known
    else:
        made = _conversion(method, group, place, output, threads) | {"made_by": made_by}
        write_json(output.with_name(output.name + ".json"), made)
    if made["error"] is None:
        _say(f"evaluating {method.name}, group {group}")
        try:
            made |= measured(output, place)
        except UserError as error:  # what a peer wrote may be unreadable, or give NaN
            made["error"] = f"its result: {error}"
    made["read_by"] = read_by
    path.parent.mkdir(exist_ok=True)
    write_json(path, made)
    return made


def _conversion(
    method: Method, group: int, place: Workplace, output: Path, threads: int
) -> dict[str, Any]:
    """Convert, and say how that went."""
    _clear(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    _say(f"converting by {method.name}, group {group}")
    ended = _convert(method, group, place, output, threads)
    return {
        "method": method.name,
        "family": method.family,
        "peer": method.peer is not None,
        "group": group,
        "version": peer_version(method),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "threads": threads,
        **asdict(ended),
    }


def known_rows(
    place: Workplace, names: Iterable[str], groups: Iterable[int]
) -> list[dict[str, Any]]:
    """Rows that were made, whatever has changed since."""
    paths = [place.folder / "rows" / f"{slug(n, g)}.json" for g in groups for n in names]
    return [read_json(path) for path in paths if path.is_file()]


def source_row(place: Workplace) -> dict[str, Any]:
    """The source's own line."""
    return {
        "bytes": _bytes(place.model),
        "texts": {
            name: {"perplexity": r.perplexity, "windows": {"nll": _window_nll(r)}}
            for name, r in place.references.items()
        },
    }


def _window_nll(reference: Reference) -> list[float]:
    """The source's negative log-likelihood, summed over each window's scored tokens."""
    parts = reference.target.double().split(reference.windows.scored.sum(1).tolist())
    return [-float(part.sum()) for part in parts]


def measured(output: Path, place: Workplace) -> dict[str, Any]:
    """Bytes, agreement with the peer's own reading, and the comparison on every text."""
    dense = readable(output)
    own = output.with_name(output.name + ".own.safetensors")
    texts = {name: _plain(found) for name, found in place.evaluate(dense).items()}
    return {
        "bytes": _bytes(output),
        "own_reading": reading_error(dense, own) if own.is_file() else None,
        "rewritten": rewritten(dense, place.model),
        "texts": texts,
    }


def readable(output: Path) -> Path:
    """The directory itself where our formats read it, else a dense one beside it."""
    config = json.loads((output / "config.json").read_text())
    if config.get("quantization_config", {}).get("quant_method") != "compressed-tensors":
        return output
    dense = output.with_name(output.name + ".dense")
    if not (dense / "config.json").is_file():  # which is written last
        to_dense(output, dense)
    return dense


def reading_error(model: Path, own: Path) -> float:
    """Largest difference between our reading and the peer's, relative to a matrix's largest."""
    checkpoint = Checkpoint.open(model)
    worst = 0.0
    for name, theirs in load_file(own).items():
        ours = checkpoint.load(f"{name}.weight").float()
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return worst


def rewritten(model: Path, source: Path) -> list[str]:
    """Names inside a layer of the tensors outside the routed experts that are not the source's."""
    theirs, ours = Checkpoint.open(model), Checkpoint.open(source)
    changed = set()
    for name in ours.weights:
        if ".experts." in name:
            continue
        if name not in theirs.weights or not torch.equal(
            theirs.load(name).float(), ours.load(name).float()
        ):
            changed.add(name.split(".", 3)[-1] if ".layers." in name else name)
    return sorted(changed)


def _convert(method: Method, group: int, place: Workplace, output: Path, threads: int) -> Ended:
    if method.mends is not None:
        started = time.monotonic()
        mend(readable(place.folder / "models" / slug(method.mends, group)), place.model, output)
        seconds = time.monotonic() - started
        return Ended(seconds, seconds, 0, None)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(SCRIPTS)}
    environment |= {"HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    if method.peer is None:
        recipe = dict(place.recipe)
        recipe["output"] = {"path": str(output)}
        recipe["requantize"] = recipe["requantize"] | method.settings | {"group_size": group}
        recipe["limits"] = recipe["limits"] | {"threads": threads}
        path = output.with_name(output.name + ".yaml")
        path.write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "pipeline", "run", str(path), "--until", "shard"]
    else:
        python = environment_of(method) / "bin" / "python"
        paths = [str(path.absolute()) for path in (place.model, place.tokens, output)]
        command = [str(python.absolute()), "-m", f"quality.peers.{method.peer}", *paths]
        command += [str(method.settings["method"]), str(group)]
    return run_measured(
        command, environment, output.with_name(output.name + ".log"), method.seconds
    )


def run_measured(
    command: list[str],
    environment: Mapping[str, str],
    log: Path,
    limit: float,
    folder: Path | None = None,
) -> Ended:
    """Run a process to its end or to the limit in seconds; what it says goes to `log`."""
    started = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=folder,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stop = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        stop.start()
        _, status, usage = os.wait4(process.pid, 0)
        stop.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    error = None
    if process.returncode:
        said = [line.strip() for line in log.read_text(errors="replace").splitlines()]
        last = next((line for line in reversed(said) if line), "said nothing")[-TAIL:]
        error = f"stopped after {limit:.0f} s" if seconds >= limit else last
    return Ended(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, error)


def _plain(comparison: Comparison) -> dict[str, Any]:
    sums = comparison.windows
    return {
        "source_perplexity": comparison.source_perplexity,
        "perplexity": comparison.quantized_perplexity,
        "kl": comparison.kl_divergence,
        "top1": comparison.top1_agreement,
        "windows": {
            "count": sums.count.tolist(),
            "nll": sums.quantized_nll.tolist(),
            "kl": sums.kl.tolist(),
        },
    }


def _made_by(method: Method, group: int, place: Workplace, threads: int) -> str:
    """Everything that can change a conversion: the start, who does it, in which version, how."""
    if method.mends is not None:
        base = read_json(place.folder / "models" / f"{slug(method.mends, group)}.json")
        if base.get("error", "missing") is not None:
            raise OutputError(f"{method.name}: make the row {method.mends!r} first")
        maker = base["made_by"] + (SCRIPTS / "quality" / "mended.py").read_text()
    elif method.peer is None:
        maker = tree("pipeline")
    else:
        maker = (environment_of(method) / "versions.txt").read_text()
        maker += (SCRIPTS / "quality" / "peers" / f"{method.peer}.py").read_text()
    settings = str(sorted(method.settings.items()))
    return digest(place.made_from, method.name, settings, str(group), maker, str(threads))


def digest(*parts: str) -> str:
    """sha256 of some texts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def environment_of(method: Method) -> Path:
    """Where the peer's environment is, relative to the directory that the benchmark runs in."""
    return Path(f".env-{method.environment}")


def make_environment(method: Method) -> None:
    """Make the peer's environment unless it is there whole; minutes, and 1 to 2 GB."""
    folder = environment_of(method)
    if method.environment is None or (folder / "versions.txt").is_file():
        return
    _say(f"making {folder} for {method.name}")
    script = SCRIPTS / "quality" / "make_env.sh"
    done = subprocess.run([script, method.environment, folder], check=False)
    if done.returncode:
        raise OutputError(f"{folder} could not be made for {method.name}; {script} says why above")


def peer_version(method: Method) -> str:
    """The peer's version, as its environment has it; ours: the package's and its git tree."""
    if method.package is None:
        return code_version()
    wanted = method.package.replace("-", "_").lower()
    for line in (environment_of(method) / "versions.txt").read_text().splitlines():
        name, _, number = line.partition("==")
        if name.replace("-", "_").lower() == wanted:
            return f"{name} {number}"
    raise CheckpointError(f"{environment_of(method)} holds no {method.package}: remove that folder")


def code_version() -> str:
    """Ours: the version that the code itself names, and the commit that `pipeline/` is of."""
    changed = " and changes since" if _git("diff", "HEAD", "--", "pipeline") else ""
    commit = _git("log", "-1", "--format=%h", "--", "pipeline")
    return f"requant {__version__}, pipeline/ of {commit}{changed}"


def tree(folder: str) -> str:
    """Digest of a folder as it is now: git's tree, and what is changed since."""
    changed = _git("diff", "HEAD", "--", folder)
    return _git("rev-parse", f"HEAD:{folder}") + (
        hashlib.sha256(changed.encode()).hexdigest() if changed else ""
    )


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def machine() -> str:
    """Processor and number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((li.partition(": ")[2] for li in lines if li.startswith("model name")), "")
    return f"{model or platform.machine()}, {os.cpu_count()} CPUs"


def _bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _clear(output: Path) -> None:
    for path in output.parent.glob(f"{output.name}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
