"""Decoding in fixed buffers is decoding: the same logits as with transformers' own cache."""

import pytest
import torch
from hybrid_models import MODELS, write_output
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import hybrid
from pipeline.errors import UserError
from pipeline.quantize.tensor import AffineScheme

decode = pytest.importorskip("pipeline.hybrid.decode", exc_type=ImportError)  # without Triton
generation = pytest.importorskip("pipeline.hybrid.generation", exc_type=ImportError)


@pytest.fixture(scope="module", params=["micro-nf4", "qwen3-next-tiny-nf4"])
def model(request, tmp_path_factory):
    out = write_output(
        MODELS / request.param, tmp_path_factory.mktemp("decode"), AffineScheme(4, 32, True)
    )
    return hybrid.load(out, device="cpu", dtype=torch.float32)


def random_prompts(model, *lengths):
    """Prompts padded on the left to the longest, and their mask."""
    width = max(lengths)
    ids = torch.randint(5, model.config.vocab_size, (len(lengths), width))
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return ids * mask, mask


def test_steps_are_the_models(model, one_thread):
    """Prompts of unequal lengths, one in chunks, then random tokens, against a growing cache."""
    ids, mask = random_prompts(model, 11, 4)
    decoder = decode.Decoder(model, 2, 32)
    with torch.inference_mode():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        want = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        logits = decoder.prefill(ids, mask)
        for _ in range(5):
            assert torch.allclose(logits, want.logits[:, -1], rtol=1e-3, atol=1e-4)
            assert torch.equal(decoder.tokens, logits.argmax(-1))
            tokens = torch.randint(5, model.config.vocab_size, (2,))
            decoder.tokens.copy_(tokens)
            logits = decoder.step()
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
            want = model(
                tokens[:, None],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=want.past_key_values,
                use_cache=True,
            )
    assert decoder.filled == decoder.cache.filled == ids.shape[1] + 5


def test_prefill_in_chunks(model, one_thread, monkeypatch):
    ids, mask = random_prompts(model, 13, 8)
    whole = decode.Decoder(model, 2, 32).prefill(ids, mask).clone()
    monkeypatch.setattr(decode, "PREFILL_CHUNK", 5)
    decoder = decode.Decoder(model, 2, 32)
    for _ in range(2):  # begins anew where another prompt was
        assert torch.allclose(decoder.prefill(ids, mask), whole, rtol=1e-3, atol=1e-4)


def test_buffers_stay_and_end(model, one_thread):
    decoder = decode.Decoder(model, 1, 8)
    with pytest.raises(UserError, match="8 tokens of prompt, room for 8"):
        decoder.prefill(torch.ones(1, 8, dtype=torch.int64))
    decoder.prefill(torch.ones(1, 5, dtype=torch.int64))
    places = [state.data_ptr() for state in decoder.cache.all_states()]
    for _ in range(3):
        decoder.step()
    assert places == [state.data_ptr() for state in decoder.cache.all_states()]
    with pytest.raises(UserError, match="reached 8 tokens"):
        decoder.step()


def test_generate_goes_through_it(model, one_thread):
    """Greedy, sampled and scored as before; what the decoder cannot do takes the old road."""
    ids, mask = random_prompts(model, 9, 5)
    wanted = {"attention_mask": mask, "max_new_tokens": 7, "min_new_tokens": 7}

    def everything():
        greedy = model.generate(ids, do_sample=False, **wanted)
        torch.manual_seed(3)
        sampled = model.generate(ids, do_sample=True, **wanted)
        beams = model.generate(ids, do_sample=False, num_beams=2, **wanted)
        with torch.inference_mode():
            return greedy, sampled, beams, model(ids).logits

    before = everything()
    steps = []
    generation.install(model)
    forward = model.forward

    def watched(*args, **kwargs):
        steps.append(type(kwargs.get("past_key_values")).__name__)
        return forward(*args, **kwargs)

    model.forward = watched
    for _ in range(2):
        for got, want in zip(everything(), before, strict=True):
            assert torch.equal(got, want)
    assert steps.count("FixedCache") == 2 * 2 * (7 + 1)  # prefill calls the model itself
    assert steps.count("DynamicCache") == 2 * 7


class Operations(TorchDispatchMode):
    """How many there were that take a device's time."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not any(name in str(function) for name in ("view", "empty", "slice"))
        return function(*args, **(kwargs or {}))


def test_no_piece_of_a_step_is_without_work(model, one_thread):
    """Each is a graph of its own on a GPU, which an empty one would be in vain."""
    decoder = decode.Decoder(model, 2, 32)
    with torch.no_grad():
        decoder.prefill(torch.randint(5, model.config.vocab_size, (2, 5)))
        decoder.step()
        pieces, counts, host = decoder._pieces(), [], None
        while not counts or host is not None:
            with Operations() as seen:
                host = next(pieces, None)
            counts.append(seen.count)
            if host is not None:
                host()
    assert len(counts) == 1 + sum(hasattr(x.mlp, "experts") for x in model.model.layers)
    assert min(counts) > 0
