"""Builds the texts and token arrays of the test model from Debian packages.

    mkdir debs && cd debs && apt-get download $(python ../scripts/test_model/build_corpus.py --list)
    python scripts/test_model/build_corpus.py --debs debs --work .corpus

Pages are put in the order of a hash of their path. The first ones, whole pages only, become the
evaluation text, the validation text (which stops training; not shipped) and the calibration
text; all others are trained on. A longer line that also stands in another part is taken out of
the held-out text, so that nothing held out was seen. Writes, to --work, train.bin and valid.bin
(uint16 tokens), tokenizer.json and corpus.json; and the shipped texts to --calibration.
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from html_text import page_text
from sources import SOURCES
from tokenizer import END_OF_TEXT, train_bpe
from tokenizers import Tokenizer

VOCABULARY = 3072
OOD_PACKAGE, OOD_VERSION = "dict-jargon", "4.4.7-3.1"
OOD_FILE = "usr/share/dictd/jargon.dict.dz"
# characters of each held-out part, in the order in which they are filled
BUDGETS = {"eval": 400_000, "valid": 200_000, "calibration": 1_600_000}
OOD_CHARACTERS = 250_000
PAGE_MINIMUM, PAGE_MAXIMUM = 1_500, 40_000  # of held-out pages: neither stubs nor whole books
LINE_COMMON = 25  # a line on more pages of one package than this is furniture
LINE_UNIQUE = 60  # characters from which a line says something of its own
PAGE_BREAK = "\n\n\n"
# The Embedded Rust Book's prose is CC-BY-SA, which is not permissive. It is taken out after the
# split, so that the other pages stay in the part in which they were before that was noticed.
SHARE_ALIKE = re.compile(r"rust-doc/.*/embedded-book/.*")
FURNITURE = re.compile(r"^(This page last modified on .*|See also lists of Objects, .*)$", re.M)
CRUDE = re.compile(r"fuck|shit|cunt|nigg|piss|sex|rape|bitch|whore|nazi", re.I)


@dataclass(frozen=True)
class Page:
    """One page: its name, package/path, which orders the corpus, and its text."""

    name: str
    text: str

    @property
    def key(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()


def unpack(debs: Path, work: Path) -> Path:
    """Unpack every package once, each below its own name, and return the folder."""
    unpacked = work / "unpacked"
    unpacked.mkdir(exist_ok=True)  # dpkg makes the last folder of a path only
    for package in [source.package for source in SOURCES] + [OOD_PACKAGE]:
        if not (unpacked / package).exists():
            archive = next(debs.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg", "-x", str(archive), str(unpacked / package)], check=True)
    return unpacked


def _extract(job: tuple[Path, tuple[str, str, str]]) -> str:
    path, root = job
    return FURNITURE.sub("", page_text(path.read_text("utf-8", "replace"), root)).strip()


def read_pages(unpacked: Path) -> list[Page]:
    """Extract all pages without furniture and duplicates, in the order of their keys."""
    pages: list[Page] = []
    for source in SOURCES:
        paths = source.pages(unpacked)
        with Pool(2) as pool:
            texts = pool.map(_extract, [(path, source.root) for path in paths], chunksize=16)
        counts = Counter(line for text in texts for line in set(text.split("\n")))
        common = {line for line, n in counts.items() if n > LINE_COMMON and len(line) > 40}
        for path, text in zip(paths, texts, strict=True):
            kept = "\n".join(line for line in text.split("\n") if line not in common)
            kept = re.sub(r"\n{3,}", "\n\n", kept).strip()
            if len(kept) > 200:
                name = path.relative_to(unpacked).as_posix()
                pages.append(Page(name, kept))
    unique = {hashlib.sha256(page.text.encode()).digest(): page for page in reversed(pages)}
    return sorted(unique.values(), key=lambda page: page.key)


def split_pages(pages: list[Page]) -> dict[str, list[Page]]:
    """Fill the held-out parts in page order up to their budgets; the rest is for training."""
    parts: dict[str, list[Page]] = {name: [] for name in (*BUDGETS, "train")}
    room = dict(BUDGETS)
    for page in pages:
        part = next((name for name in BUDGETS if room[name] > 0), "train")
        if part != "train" and not PAGE_MINIMUM <= len(page.text) <= PAGE_MAXIMUM:
            part = "train"
        parts[part].append(page)
        if part != "train":
            room[part] -= len(page.text)
    seen: set[str] = set()
    for name in ("train", "calibration", "valid", "eval"):
        lines = {line for page in parts[name] for line in page.text.split("\n")}
        if name != "train":
            parts[name] = [_without(page, seen) for page in parts[name]]
        seen |= {line for line in lines if len(line) >= LINE_UNIQUE}
    return {
        name: [page for page in pages if not SHARE_ALIKE.fullmatch(page.name)]
        for name, pages in parts.items()
    }


def _without(page: Page, seen: set[str]) -> Page:
    text = "\n".join(line for line in page.text.split("\n") if line not in seen)
    return Page(page.name, re.sub(r"\n{3,}", "\n\n", text).strip())


def jargon_text(unpacked: Path) -> str:
    """Entries of the Jargon File, lines rejoined, in the order of a hash, up to the budget."""
    raw = gzip.decompress((unpacked / OOD_PACKAGE / OOD_FILE).read_bytes()).decode("utf-8")
    entries = re.split(r"\n(?=\S[^\n]*\n [^\n]*\n|\S[^\n]*\n\n {4})", raw)
    entries = [entry for entry in entries if len(entry) > 300 and not CRUDE.search(entry)]
    entries = [entry for entry in entries if not entry.lstrip().startswith("00-")]
    entries.sort(key=lambda entry: hashlib.sha256(entry.encode()).digest())
    chosen: list[str] = []
    for entry in entries:
        paragraphs = re.split(r"\n\s*\n", entry.replace("{", "").replace("}", ""))
        joined = [" ".join(line.strip() for line in block.split("\n")) for block in paragraphs]
        chosen.append("\n\n".join(block.strip() for block in joined if block.strip()))
        if sum(map(len, chosen)) >= OOD_CHARACTERS:
            break
    return PAGE_BREAK.join(chosen) + "\n"


def encode(tokenizer: Tokenizer, pages: list[Page]) -> np.ndarray:
    """Tokens of all pages; END_OF_TEXT after every second one, so that both ends are learnt."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch_fast([page.text + PAGE_BREAK for page in pages])
    pieces = []
    for page, encoding in zip(pages, encoded, strict=True):
        closing = [end] if int(page.key[-1], 16) % 2 else []
        pieces.append(np.array(encoding.ids + closing, dtype=np.uint16))
    return np.concatenate(pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the packages and leave")
    parser.add_argument("--debs", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".corpus"))
    parser.add_argument("--calibration", type=Path, default=Path("calibration"))
    args = parser.parse_args()
    if args.list:
        print(*[f"{source.package}={source.version}" for source in SOURCES], end=" ")
        print(f"{OOD_PACKAGE}={OOD_VERSION}")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    unpacked = unpack(args.debs, args.work)
    parts = split_pages(read_pages(unpacked))
    tokenizer = train_bpe((page.text for page in parts["train"]), VOCABULARY)
    tokenizer.save(str(args.work / "tokenizer.json"))
    arrays = {name: encode(tokenizer, parts[name]) for name in ("train", "valid")}
    for name, array in arrays.items():
        array.tofile(args.work / f"{name}.bin")
    shipped = {
        "docs-calib.txt": PAGE_BREAK.join(page.text for page in parts["calibration"]) + "\n",
        "docs-eval.txt": PAGE_BREAK.join(page.text for page in parts["eval"]) + "\n",
        "ood-eval.txt": jargon_text(unpacked),
    }
    report: dict[str, dict[str, object]] = {}
    for name, text in shipped.items():
        args.calibration.mkdir(parents=True, exist_ok=True)
        (args.calibration / name).write_text(text, encoding="utf-8")
        tokens = np.array(tokenizer.encode(text).ids, dtype=np.uint16)
        tokens.tofile(args.work / f"{name}.bin")
        digest = hashlib.sha256(text.encode()).hexdigest()
        report[name] = {"bytes": len(text.encode()), "tokens": len(tokens), "sha256": digest}
    for name, array in arrays.items():
        report[name] = {"pages": len(parts[name]), "tokens": len(array)}
    report["pages"] = {name: len(pages) for name, pages in parts.items()}
    for name, pages in parts.items():
        report[f"packages of {name}"] = dict(Counter(page.name.split("/")[0] for page in pages))
    (args.work / "corpus.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.work / "eval-pages.json").write_text(
        json.dumps({k: [p.name for p in v] for k, v in parts.items() if k != "train"}, indent=1)
    )
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
