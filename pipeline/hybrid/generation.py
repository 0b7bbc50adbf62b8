"""transformers' own `generate`, decoding through `Decoder`.

`install` hooks two methods of one model: the one that makes `generate`'s cache, which is then the
decoder's, and `forward`, which hands single tokens on that cache to the decoder.  Every other call
goes where it went before, so sampling, stopping, streaming and scoring stay transformers' own.
"""

# What passes through is transformers' business.
# ruff: noqa: ANN401

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from pipeline.hybrid.cache import held_bytes
from pipeline.hybrid.decode import Decoder
from pipeline.hybrid.residency import Residency
from pipeline.hybrid.steps import STEPS

MOST_SEQUENCES = 8
"""As many read their experts pair by pair; more go through the model as they did."""
_ROOM = 1024
_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}


def install(
    model: PreTrainedModel, residency: Residency | None = None, *, kernels: bool | None = None
) -> None:
    """Make `model.generate` decode in fixed buffers, on a GPU by captured graphs.

    kernels: see `Decoder`.  A model of an architecture without decode steps is left as it is.
    """
    if STEPS.get(model.config.model_type) is None:
        return
    decoding = _Decoding(model, residency, kernels)

    @functools.wraps(model.forward)  # its signature tells `generate` which arguments there are
    def forward(*args: Any, **kwargs: Any) -> Any:
        return decoding.step_or_forward(*args, **kwargs)

    hooked: Any = model
    hooked.forward = forward
    hooked._prepare_cache_for_generation = decoding.prepare_cache


class _Decoding:
    """The two hooked methods, and the decoder of the last call to `generate`."""

    def __init__(
        self, model: PreTrainedModel, residency: Residency | None, kernels: bool | None
    ) -> None:
        self._model = model
        self._residency = residency
        self._kernels = kernels
        self._decoder: Decoder | None = None
        known: Any = model
        self._prepare: Callable[..., Any] = known._prepare_cache_for_generation
        self._forward: Callable[..., Any] = known.forward

    def prepare_cache(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """See transformers; where it would take a cache that grows, take the decoder's."""
        self._prepare(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        plain = type(model_kwargs.get("past_key_values")) is DynamicCache
        single = generation_mode in _MODES and "inputs_embeds" not in model_kwargs
        fits = self._has_room(batch_size, max_cache_length)
        if plain and single and batch_size <= MOST_SEQUENCES and fits:
            model_kwargs["past_key_values"] = self._fitting(batch_size, max_cache_length).cache

    def _has_room(self, tokens: int, length: int) -> bool:
        """Whether buffers for so much text, all of it, leave half of what is free on a GPU."""
        if self._model.device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self._model.device)
        need = held_bytes(self._model.config, tokens, length, self._model.dtype)
        return need < free // 2

    def _fitting(self, tokens: int, length: int) -> Decoder:
        """The last decoder if it fits, else a new one in its place; empty either way."""
        known = self._decoder
        if known is None or len(known.tokens) != tokens or known.length < length:
            self._decoder = None  # its buffers are free before new ones are made
            del known
            room = -(-(length + 1) // _ROOM) * _ROOM
            known = Decoder(
                self._model, tokens, room, residency=self._residency, kernels=self._kernels
            )
        known.reset()
        self._decoder = known
        return known

    def step_or_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `forward`, but for what belongs to the decoder's cache."""
        decoder = self._decoder
        if decoder is None or kwargs.get("past_key_values") is not decoder.cache or decoder.busy:
            return self._forward(*args, **kwargs)
        ids = kwargs["input_ids"]
        if decoder.filled and ids.shape[1] == 1:
            decoder.tokens.copy_(ids[:, 0])
            logits = decoder.step()
        elif not decoder.filled:
            logits = decoder.prefill(ids, kwargs.get("attention_mask"))
        else:
            raise ValueError("generate came back to its cache with more than one token")
        return MoeCausalLMOutputWithPast(logits=logits.unsqueeze(1), past_key_values=decoder.cache)
