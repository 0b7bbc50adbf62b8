"""llama.cpp's side, in the environment of `make_llama_env.sh`, through llama-cpp-python.

    .env-llama-cpp/bin/python scripts/hybrid_peers/llama_side.py write DIR
    .env-llama-cpp/bin/python scripts/hybrid_peers/llama_side.py speed DIR --threads 2
    .env-llama-cpp/bin/python scripts/hybrid_peers/llama_side.py logits DIR IDS OUT

`write` makes DIR/model.gguf of what `gguf_arrays.py` left in DIR; `speed` prints one line of JSON;
`logits` reads token ids from a .npy file, int32 [passages, tokens], and writes float32 logits of
every position to another.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]
import llama_cpp  # type: ignore[import-not-found]
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

MODEL, ARRAYS, HEADER = "model.gguf", "arrays.safetensors", "gguf.json"
PROMPT, SHORT, STEPS, WARM = 512, 128, 32, 3
ERROR = 4
"""GGML_LOG_LEVEL_ERROR"""


def write(folder: Path) -> None:
    """One file, without a vocabulary: token ids are all that is used."""
    header = json.loads((folder / HEADER).read_text())
    writer = gguf.GGUFWriter(folder / MODEL, "qwen3next")
    for key, value in header["metadata"].items():
        kinds = {float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
        kinds[type(value)](f"qwen3next.{key}", value)
    writer.add_tokenizer_model("none")
    for name, array in load_file(folder / ARRAYS).items():
        kind = header["kinds"][name]
        raw = None if kind == "F32" else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """The file, loaded for one sequence on the CPU."""

    def __init__(self, folder: Path, threads: int, length: int) -> None:
        self._log = llama_cpp.llama_log_callback(_errors_only)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        path = str(folder / MODEL).encode()
        self._model = llama_cpp.llama_model_load_from_file(path, options)
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {folder / MODEL}")
        given = llama_cpp.llama_context_default_params()
        given.n_ctx, given.n_batch, given.n_ubatch = length, PROMPT, PROMPT
        given.n_threads = given.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, given)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.words: int = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def begin(self) -> None:
        """Forget what was read."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def read(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Logits [vocabulary] behind the last of `ids`, which go on where the last call ended."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids.tolist())
        status = llama_cpp.llama_decode(
            self._context, llama_cpp.llama_batch_get_one(tokens, len(ids))
        )
        if status:
            raise SystemExit(f"llama_decode returns {status}")
        row: Any = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)),
                                     (self.words,)).copy()  # fmt: skip


def _errors_only(level: int, text: bytes, _data: object) -> None:
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def speed(folder: Path, threads: int) -> dict[str, Any]:
    """What `timing.speeds` measures, in the same way."""
    model = Model(folder, threads, 1024)
    ids = np.random.default_rng(0).integers(5, model.words, PROMPT).astype(np.int32)
    for _ in range(2):
        model.begin()
        prefill, _ = timed(model, ids)
    model.begin()
    last = model.read(ids[:SHORT]).argmax()
    taken = []
    for _ in range(WARM + STEPS):
        times, last = timed(model, np.array([last], dtype=np.int32))
        taken.append(times)
    clock, busy = (statistics.median(column) for column in zip(*taken[WARM:], strict=True))
    return {
        "side": "llama.cpp",
        "decode": 1 / clock,
        "prefill": PROMPT / prefill[0],
        "decode_busy": 1 / busy,
        "prefill_busy": PROMPT / prefill[1],
        "note": llama_cpp.llama_print_system_info().decode(),
    }


def timed(model: Model, ids: npt.NDArray[np.int32]) -> tuple[tuple[float, float], np.int64]:
    """Seconds by the clock and of processor time, and the token that follows."""
    clock, busy = time.perf_counter(), time.process_time()
    following = model.read(ids).argmax()
    return (time.perf_counter() - clock, time.process_time() - busy), following


def logits(folder: Path, ids: Path, out: Path) -> None:
    """Position by position, as in decoding."""
    passages = np.load(ids)
    model = Model(folder, 1, passages.shape[1] + 1)
    rows = []
    for passage in passages:
        model.begin()
        rows.append([model.read(passage[n : n + 1]) for n in range(len(passage))])
    np.save(out, np.array(rows, dtype=np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["write", "speed", "logits"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.what == "write":
        write(args.folder)
    elif args.what == "speed":
        print(json.dumps(speed(args.folder, args.threads)))
    else:
        logits(args.folder, *args.files)


if __name__ == "__main__":
    main()
