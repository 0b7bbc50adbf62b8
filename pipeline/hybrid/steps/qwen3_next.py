"""One decode step through Qwen3-Next's layers, on the model's own weights and a `FixedCache`.

Every half of a layer (token mixer, MoE block) is one class that changes the residual stream in
place.  `Plain` halves call the transformers modules; `Delta`, `Attention` and `Sparse` do the same
with fused kernels, where weights are dense and sizes fit, and are what a GPU uses.
"""

# transformers' modules are known by the attributes they have, not by types.
# ruff: noqa: ANN401

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.hybrid import fused_attention, fused_delta, fused_linear
from pipeline.hybrid.split import HostRoad, Pieces, SplitExperts
from pipeline.hybrid.steps import STEPS, Frame, Half


def halves(layer: Any, number: int, frame: Frame, *, kernels: bool) -> list[Half]:
    """Both halves of a decoder layer; `kernels`: fused where possible."""
    linear = hasattr(layer, "linear_attn")
    mixer: Half = PlainMixer(layer, number)
    if kernels and linear and _dense(layer.linear_attn):
        mixer = Delta(layer, number, frame)
    elif kernels and not linear and _dense(layer.self_attn):
        mixer = Attention(layer, number, frame)
    if not hasattr(layer.mlp, "experts"):
        return [mixer, PlainMlp(layer)]
    if kernels and _dense(layer.mlp.shared_expert) and _plain(layer.mlp.shared_expert_gate):
        return [mixer, Sparse(layer, frame)]
    return [mixer, PlainSparse(layer)]


STEPS.register("qwen3_next", halves)


class PlainMixer:
    """The layer's attention or DeltaNet as transformers computes it."""

    def __init__(self, layer: Any, number: int) -> None:
        self._layer = layer
        self._number = number

    def __call__(self, frame: Frame) -> Generator[Callable[[], None], None, None]:
        layer, hidden = self._layer, frame.hidden
        x = layer.input_layernorm(hidden).unsqueeze(1)
        if hasattr(layer, "linear_attn"):
            out = layer.linear_attn(hidden_states=x, cache_params=frame.cache, attention_mask=None)
        else:
            spots = torch.arange(frame.cache.length, device=hidden.device)
            seen = (spots <= frame.position) & (spots >= frame.begins.unsqueeze(1))
            out, _ = layer.self_attn(
                hidden_states=x,
                position_embeddings=frame.rotary,
                attention_mask=seen[:, None, None],
                past_key_values=frame.cache,
            )
        hidden += out.squeeze(1)
        return
        yield


class PlainMlp:
    """The dense MLP of a layer without experts."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, frame: Frame) -> Generator[Callable[[], None], None, None]:
        frame.hidden.add_(self._layer.mlp(self._layer.post_attention_layernorm(frame.hidden)))
        return
        yield


class PlainSparse:
    """The MoE block as transformers computes it, its experts in pieces."""

    def __init__(self, layer: Any) -> None:
        self._norm = layer.post_attention_layernorm
        self._block = layer.mlp
        self._routed = _routed(layer.mlp.experts)

    def __call__(self, frame: Frame) -> Generator[Callable[[], None], None, None]:
        block, hidden = self._block, frame.hidden
        x = self._norm(hidden)
        _, weights, index = block.gate(x)
        routed = yield from self._routed(x, index, weights)
        shared = torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
        hidden += routed.to(hidden.dtype) + shared


class Delta:
    """Gated DeltaNet in four kernels."""

    def __init__(self, layer: Any, number: int, frame: Frame) -> None:
        own = layer.linear_attn
        self._norm = layer.input_layernorm.weight, layer.input_layernorm.eps
        self._own = own
        self._number = number
        self._sizes = fused_delta.Heads(
            own.num_k_heads, own.num_v_heads, own.head_k_dim, own.head_v_dim
        )
        tokens = frame.hidden.shape[0]
        rows = own.in_proj_qkvz.out_features
        self._split = rows
        new = frame.hidden.new_empty
        self._mixed = new((tokens, rows + own.in_proj_ba.out_features))
        self._convolved = new((tokens, own.conv_dim))
        self._out = new((tokens, own.value_dim))

    def __call__(self, frame: Frame) -> Generator[Callable[[], None], None, None]:
        own, mixed = self._own, self._mixed
        window, memory = frame.cache.states(self._number)
        weights = (own.in_proj_qkvz.weight, own.in_proj_ba.weight)
        fused_linear.linear(frame.hidden, weights, mixed, norm=self._norm)
        fused_delta.convolve(mixed, window, own.conv1d.weight, self._convolved, self._sizes)
        fused_delta.delta(
            mixed, mixed[:, self._split :], self._convolved, memory,
            own.A_log, own.dt_bias, (own.norm.weight, own.norm.variance_epsilon), self._out,
            self._sizes,
        )  # fmt: skip
        fused_linear.linear(self._out, (own.out_proj.weight,), frame.hidden, residual=frame.hidden)
        return
        yield


class Attention:
    """Gated attention in five kernels."""

    def __init__(self, layer: Any, number: int, frame: Frame) -> None:
        own = layer.self_attn
        self._norm = layer.input_layernorm.weight, layer.input_layernorm.eps
        self._own = own
        self._number = number
        tokens = frame.hidden.shape[0]
        heads = own.q_proj.out_features // own.head_dim // 2
        weights = (own.q_proj.weight, own.k_proj.weight, own.v_proj.weight)
        self._weights = weights
        new = frame.hidden.new_empty
        self._mixed = new((tokens, sum(w.shape[0] for w in weights)))
        self._query = new((tokens, heads, own.head_dim))
        self._out = new((tokens, heads, own.head_dim))
        self._scratch = new(
            fused_attention.scratch_size(tokens, heads, own.head_dim), dtype=torch.float32
        )

    def __call__(self, frame: Frame) -> Generator[Callable[[], None], None, None]:
        own = self._own
        held: Any = frame.cache.layers[self._number]
        fused_linear.linear(frame.hidden, self._weights, self._mixed, norm=self._norm)
        norms = own.q_norm.weight, own.k_norm.weight, own.q_norm.eps
        fused_attention.rotate(
            self._mixed, norms, frame.rotary, frame.position, self._query, held.keys, held.values
        )
        fused_attention.attend(
            self._mixed, self._query, held.keys, held.values, frame.position, frame.begins,
            self._scratch, self._out, own.scaling,
        )  # fmt: skip
        out = self._out.flatten(1)
        fused_linear.linear(out, (own.o_proj.weight,), frame.hidden, residual=frame.hidden)
        return
        yield


class Sparse:
    """Router, routed experts and shared expert."""

    def __init__(self, layer: Any, frame: Frame) -> None:
        block = layer.mlp
        self._block = block
        self._routed = _routed(block.experts)
        self._norm = layer.post_attention_layernorm.weight, layer.post_attention_layernorm.eps
        shared = block.shared_expert
        self._weights = (
            block.gate.weight, shared.gate_proj.weight, shared.up_proj.weight,
            block.shared_expert_gate.weight,
        )  # fmt: skip
        tokens, top_k = frame.hidden.shape[0], block.gate.top_k
        new = frame.hidden.new_empty
        self._x = torch.empty_like(frame.hidden)
        self._logits = new((tokens, sum(w.shape[0] for w in self._weights)))
        self._index = new((tokens, top_k), dtype=torch.int64)
        self._chosen = new((tokens, top_k))
        self._inner = new((tokens, shared.gate_proj.out_features))
        self._gate = new((tokens,))

    def __call__(self, frame: Frame) -> Generator[Callable[[], None], None, None]:
        block = self._block
        fused_linear.linear(
            frame.hidden, self._weights, self._logits, norm=self._norm, normed=self._x
        )
        fused_linear.route(
            self._logits, self._index, self._chosen, self._inner, self._gate,
            normalise=block.gate.norm_topk_prob,
        )  # fmt: skip
        routed = yield from self._routed(self._x, self._index, self._chosen)
        fused_linear.finish(
            frame.hidden, routed, self._inner, block.shared_expert.down_proj.weight, self._gate
        )


def _routed(experts: Any) -> Callable[[Tensor, Tensor, Tensor], Pieces]:
    """(x, index, weights) -> float32 [T, hidden], in pieces."""
    if isinstance(experts, SplitExperts):
        return experts.pieces
    handover = getattr(experts, "handover", None)  # torch's products have none
    return HostRoad(experts, torch.arange(experts.num_experts), handover).pieces


def _dense(module: Any) -> bool:
    """Whether its projections are plain, and its heads and activation such as the kernels know."""
    linears = [m for name, m in module.named_children() if name.endswith(("_proj", "_qkvz", "_ba"))]
    sizes = [getattr(module, name, 16) for name in ("head_dim", "head_k_dim", "head_v_dim")]
    fits = all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    known = not hasattr(module, "config") or module.config.hidden_act == "silu"
    return fits and known and all(_plain(m) for m in linears)


def _plain(module: Any) -> bool:
    return isinstance(module, nn.Linear) and module.bias is None
