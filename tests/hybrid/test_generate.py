import io
import shutil

import pytest
import torch
from hybrid_models import MODELS, dequantised, write_output
from transformers import AutoTokenizer

from pipeline.errors import CheckpointError, UserError
from pipeline.hybrid.generate import stream_text
from pipeline.hybrid.native.library import find
from pipeline.quantize.tensor import AffineScheme

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINED = MODELS / "qwen3-next-tiny-nf4"
PROMPT = "The function returns a list of"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = write_output(TRAINED, tmp_path_factory.mktemp("trained"), AffineScheme(8, 32, True))
    for file in TRAINED.glob("*token*.json"):
        shutil.copy(file, out)
    return out


def test_text_is_the_dense_models(directory):
    """The same opening: bfloat16 may part ways later."""
    out = io.StringIO()
    said: list[str] = []
    made = stream_text(directory, PROMPT, 12, "4GiB", out, announce=said.append)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    plain = dequantised(directory, torch.float32).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    want = tokenizer.decode(plain[0, ids.shape[1] : ids.shape[1] + 3], skip_special_tokens=True)
    assert out.getvalue().startswith(want) and len(out.getvalue()) > len(want)
    assert made.decode_rate > 0 and made.prefill_rate > 0
    assert (made.prompt_tokens, made.new_tokens) == (ids.shape[1], 12)
    assert made.decode_use == {}  # was not asked for
    assert said == made.placement["remarks"]
    assert len(said) == (0 if torch.cuda.is_available() else 1 + isinstance(find(), str))


def test_refusals(directory, tmp_path):
    with pytest.raises(UserError, match="no tokens"):
        stream_text(directory, "", 3, None, io.StringIO())
    shutil.copy(directory / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        stream_text(tmp_path, PROMPT, 3, None, io.StringIO())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded") as caught:
        stream_text(tmp_path, PROMPT, 3, None, io.StringIO())
    assert "\n" not in str(caught.value)
