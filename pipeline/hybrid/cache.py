"""A cache whose buffers never move, so that a captured decode step finds them again.

Same contents as transformers' own caches and used by its modules: keys and values `[T, key heads,
length, size]`, and DeltaNet's states, which transformers updates in place already.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, LinearAttentionLayer, StaticLayer

PREFILL_CHUNK = 4096
"""Tokens of a prompt that go through the model at once."""


class FixedAttention(StaticLayer):
    """Keys and values of one layer.

    Prefill writes behind what is there and attends to the filled part alone, so that no mask is
    needed for the first chunk.  With `position` set, one token's go to where it says, and
    attention gets all of the buffer.
    """

    is_compileable = False

    def __init__(self, length: int) -> None:
        super().__init__(max_cache_len=length)
        self.filled = 0
        self.position: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return those to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.position is not None:
            self.keys.index_copy_(2, self.position, key_states)
            self.values.index_copy_(2, self.position, value_states)
            return self.keys, self.values
        new = slice(self.filled, self.filled + key_states.shape[2])
        self.keys[:, :, new] = key_states
        self.values[:, :, new] = value_states
        self.filled = new.stop
        return self.keys[:, :, : new.stop], self.values[:, :, : new.stop]

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what a chunk of so many tokens attends to."""
        return self.filled + query_length, 0

    def reset(self) -> None:
        """Empty it, where it is; what is stored stays, but nothing attends to it."""
        self.filled = 0
        self.position = None


class FixedCache(Cache):
    """One layer's cache for every layer of the model."""

    def __init__(self, config: PreTrainedConfig, length: int) -> None:
        """length: tokens for which there is room."""
        super().__init__(
            layers=[
                FixedAttention(length) if kind == "full_attention" else LinearAttentionLayer()
                for kind in config.layer_types
            ]
        )
        self.length = length

    @property
    def filled(self) -> int:
        """Tokens stored by prefill, and by decoding where `moved_to` was called."""
        return max((layer.filled for layer in self._attention()), default=0)

    def moved_to(self, filled: int) -> None:
        """Tell that so many tokens are stored now."""
        for layer in self._attention():
            layer.filled = filled

    def decoding_at(self, position: Tensor | None) -> None:
        """Where single tokens go, int [1] on the device; None: prefill."""
        for layer in self._attention():
            layer.position = position

    def states(self, layer: int) -> tuple[Tensor, Tensor]:
        """A DeltaNet layer's last inputs of the convolution [T, channels, taps] and its float32
        memory [T, heads, key size, value size]; AssertionError before any prefill."""
        held = self.layers[layer]
        assert isinstance(held, LinearAttentionLayer)
        window, memory = held.conv_states[0], held.recurrent_states[0]
        assert window is not None and memory is not None
        return window, memory

    def all_states(self) -> list[Tensor]:
        """The states of all DeltaNet layers."""
        linear = [i for i, x in enumerate(self.layers) if isinstance(x, LinearAttentionLayer)]
        return [tensor for layer in linear for tensor in self.states(layer)]

    def _attention(self) -> list[FixedAttention]:
        return [layer for layer in self.layers if isinstance(layer, FixedAttention)]


def held_bytes(config: PreTrainedConfig, tokens: int, length: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of a cache for `tokens` sequences of `length`."""
    layers = config.num_hidden_layers - _linear_layers(config)
    row = config.num_key_value_heads * head_size(config) * dtype.itemsize
    return 2 * layers * tokens * length * row


def head_size(config: PreTrainedConfig) -> int:
    """Channels of an attention head; a config.json need not say them."""
    said = getattr(config, "head_dim", None)
    return int(said or config.hidden_size // config.num_attention_heads)


def state_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the states of all DeltaNet layers for `tokens` sequences."""
    layers = _linear_layers(config)
    if not layers:
        return 0
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    window = (2 * keys + values) * config.linear_conv_kernel_dim * dtype.itemsize
    memory = values * config.linear_key_head_dim * torch.float32.itemsize
    return layers * tokens * (window + memory)


def _linear_layers(config: PreTrainedConfig) -> int:
    kinds = getattr(config, "layer_types", None) or ()
    return sum(kind == "linear_attention" for kind in kinds)
