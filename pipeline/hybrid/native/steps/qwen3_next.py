"""Qwen3-Next's modules: up to FEW tokens, one of each sequence, go through the compiled kernels.

All in bfloat16 on the CPU, on states that a cache holds already; everything else, and what
gradients are wanted of, is transformers' own code.
"""

# transformers' modules and caches are known by the attributes they have, not by types.
# ruff: noqa: ANN401
# mypy: disable-error-code="misc, no-untyped-call"

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.qwen3_next import modeling_qwen3_next as plain

from pipeline.hybrid.native import step
from pipeline.hybrid.native.dense import FEW, NativeLinear, side_by_side
from pipeline.hybrid.native.experts import NativeExperts
from pipeline.hybrid.native.library import Library, find
from pipeline.hybrid.native.plan import Plan
from pipeline.hybrid.native.steps import MODULES


class Norm(plain.Qwen3NextRMSNorm):
    """The "1 + w" norm."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        library = _kernels(x, self.weight, of=self)
        if library is None or not x.is_contiguous() or x.shape[-1] % 16:
            return super().forward(x)
        return step.norm(x, self.weight, self.eps, library)


class Router(plain.Qwen3NextTopKRouter):
    """The router where it is called by itself."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, hidden] -> logits [T, experts], weights and int64 index [T, k]."""
        library = _kernels(hidden_states, self.weight, of=self)
        if library is None or not _choosable(self):
            return super().forward(hidden_states)
        logits = side_by_side(hidden_states.reshape(-1, self.hidden_dim), (self.weight,), library)
        index, weights, _ = step.route(
            logits, self.num_experts, self.top_k, library, normalise=self.norm_topk_prob
        )
        return logits, weights, index


class Sparse(plain.Qwen3NextSparseMoeBlock):
    """Router and shared expert beside the routed ones."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, n, hidden] -> the same."""
        gate, shared, opening = self.gate, self.shared_expert, self.shared_expert_gate
        library = _kernels(hidden_states, gate.weight, of=self)
        linears = shared.gate_proj, shared.up_proj, opening, shared.down_proj
        if (
            library is None
            or not _native(linears)
            or not (_choosable(gate) and type(shared.act_fn) in _SILU)
            or _watched(gate, shared, *linears)
        ):
            return super().forward(hidden_states)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights = (gate.weight, *(linear.weight for linear in linears[:3]))
        logits = side_by_side(x, weights, library)
        index, chosen, inner = step.route(
            logits, gate.num_experts, gate.top_k, library, normalise=gate.norm_topk_prob
        )
        routed = self.experts(x, index, chosen)
        beside = side_by_side(inner, (shared.down_proj.weight,), library)
        return step.finish(routed, beside, logits[:, -1:], library).view(hidden_states.shape)


class DeltaNet(plain.Qwen3NextGatedDeltaNet):
    """Gated DeltaNet."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """[B, n, hidden] -> the same; the cache's states move on."""
        library = _kernels(hidden_states, self.A_log, of=self)
        fits = library is not None and self.computable()
        states = self.states(hidden_states, cache_params) if fits else None
        packed = others.get("cu_seq_lens_q") is not None
        if library is None or states is None or attention_mask is not None or packed:
            return super().forward(hidden_states, cache_params, attention_mask, **others)
        x = hidden_states.reshape(len(hidden_states), -1)
        wide, narrow = self.in_proj_qkvz, self.in_proj_ba
        if type(wide) is NativeLinear and type(narrow) is NativeLinear:
            mixed = side_by_side(x, (wide.weight, narrow.weight), library)
            gates = mixed[:, len(wide.weight) :]
        else:
            mixed, gates = wide(x), narrow(x)
        out = step.delta(
            *(mixed, gates, states[0], self.conv1d.weight, states[1]),
            *((self.A_log, self.dt_bias), (self.norm.weight, self.norm.variance_epsilon), library),
        )
        return self.out_proj(out).unsqueeze(1)

    def states(self, x: Tensor, cache: Any) -> tuple[Tensor, Tensor] | None:
        """What the step changes in place, if it is as the kernel wants it."""
        if cache is None or x.shape[1] != 1:
            return None
        held = cache.layers[self.layer_idx]  # transformers 5.17 has no getters for what it holds
        if getattr(held, "record_past", False) or not held.has_previous_state[0]:
            return None
        window, memory = held.conv_states[0], held.recurrent_states[0]
        if window is None or memory is None or not len(window) == len(memory) == len(x):
            return None
        fits = window.dtype == torch.bfloat16 and memory.dtype == torch.float32
        fits = fits and window.shape[-1] == self.conv_kernel_size
        fits = fits and all(state.is_contiguous() and state.is_cpu for state in (window, memory))
        return (window, memory) if fits else None

    def computable(self) -> bool:
        """Whether its sizes and weights are such as the kernel takes."""
        sizes = self.head_k_dim, self.head_v_dim
        weights = self.A_log, self.dt_bias, self.conv1d.weight, self.norm.weight
        return (
            all(size % 16 == 0 and size <= step.SIZES for size in sizes)
            and self.value_dim // self.num_k_heads <= step.VALUES
            and self.activation == "silu"
            and self.conv1d.bias is None
            and all(weight.dtype == torch.bfloat16 for weight in weights)
        )


class Attention(plain.Qwen3NextAttention):
    """Gated attention."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, n, hidden] -> the same, and no weights; the cache grows."""
        library = _kernels(hidden_states, self.q_norm.weight, of=self)
        given = hidden_states, position_embeddings, attention_mask, past_key_values
        if library is None or not (self.computable() and self.takes(*given)):
            return super().forward(*given, **others)
        tokens, size = len(hidden_states), self.head_dim
        x = hidden_states.reshape(tokens, -1)
        projections = self.q_proj, self.k_proj, self.v_proj
        mixed = side_by_side(x, [linear.weight for linear in projections], library)
        heads = self.q_proj.out_features // (2 * size), self.k_proj.out_features // size
        norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        query, keys = step.rotate(mixed, heads, norms, position_embeddings, library)
        keys, values, mask = self.cached(keys.unsqueeze(2), mixed, attention_mask, past_key_values)
        out = step.attend(mixed, query, keys, values, mask, self.scaling, library)
        return self.o_proj(out.view(tokens, 1, -1)), None

    def cached(
        self, keys: Tensor, mixed: Tensor, mask: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """All keys and values, these and those of `mixed` among them, and which are seen."""
        rows = keys.shape[1] * keys.shape[3]
        values = mixed[:, -rows:].view(keys.shape)
        keys, values = cache.update(keys, values, self.layer_idx)
        if keys.stride() != values.stride() or keys.stride(-1) != 1:
            keys, values = keys.contiguous(), values.contiguous()
        if mask is not None and mask.shape[-1] != keys.shape[2]:
            raise ValueError(f"a mask of {mask.shape[-1]} for {keys.shape[2]} keys")
        return keys, values, None if mask is None else mask[:, 0, 0].contiguous()

    def takes(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any
    ) -> bool:
        """Whether the kernels take such a step."""
        return (
            cache is not None
            and x.shape[1] == 1
            and all(t.dtype == torch.bfloat16 and t.is_contiguous() for t in rotary)
            and len(rotary[0]) in (1, len(x))
            and self.config._attn_implementation == "sdpa"
            and (mask is None or (mask.dtype == torch.bool and mask.shape[:3] == (len(x), 1, 1)))
        )

    def computable(self) -> bool:
        """Whether its sizes and weights are such as the kernel takes."""
        return (
            _native((self.q_proj, self.k_proj, self.v_proj))
            and self.head_dim % 16 == 0
            and self.head_dim <= step.SIZES
            and self.num_key_value_groups <= step.GROUPS
        )


class Layer(plain.Qwen3NextDecoderLayer):
    """A decoder layer: each half in one call where that can be, else by its modules."""

    _mixing: Plan | None = None
    _thinking: Plan | None = None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> Tensor:
        """[B, n, hidden] -> the same."""
        x, mixed = hidden_states, None
        library = _kernels(x, x, of=self)
        if library is not None and x.is_contiguous() and x.shape[-1] % 16 == 0:
            if self.block_type == "full_attention":
                mixed = self._attend(
                    x, position_embeddings, attention_mask, past_key_values, library
                )
            elif attention_mask is None and others.get("cu_seq_lens_q") is None:
                mixed = self._recall(x, past_key_values, library)
        if library is None or mixed is None:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, position_ids, past_key_values,
                **others,
            )  # fmt: skip
        return self._think(mixed, library)

    def _recall(self, x: Tensor, cache: Any, library: Library) -> Tensor | None:
        """DeltaNet's half; None where it cannot be done in one call."""
        own: Any = self._modules["linear_attn"]
        plan = self._mixing
        if plan is None or not plan.holds():
            plan = self._mixing = _delta_plan(self, own)
        states = None if plan is None else own.states(x, cache)
        if plan is None or states is None:
            return None
        window, memory = states
        out = torch.empty_like(x)
        failed = library.delta_half(
            *(plan.half, x.data_ptr(), window.data_ptr(), memory.data_ptr(), out.data_ptr()),
            *(len(x), *plan.eps, library.how()),
        )
        return _unless(failed, out)

    def _attend(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Any,
        library: Library,
    ) -> Tensor | None:
        """Attention's half."""
        own: Any = self._modules["self_attn"]
        plan = self._mixing
        if plan is None or not plan.holds():
            plan = self._mixing = _attention_plan(self, own)
        if plan is None or not own.takes(x, rotary, mask, cache):
            return None
        tokens, (_, heads, key_heads, size) = len(x), plan.sizes
        query = x.new_empty((tokens, heads, size))
        keys = x.new_empty((tokens, key_heads, 1, size))
        mixed = x.new_empty((tokens, 2 * (heads + key_heads) * size))
        (cos, sin), how = rotary, library.how()
        failed = library.attention_opening(
            *(plan.half, x.data_ptr(), cos.data_ptr(), sin.data_ptr()),
            *(cos.shape[-1] if len(cos) > 1 else 0, cos.shape[-1], tokens),
            *(*plan.eps, mixed.data_ptr(), query.data_ptr(), keys.data_ptr(), how),
        )
        _unless(failed, mixed)
        keys, values, seen = own.cached(keys, mixed, mask, cache)
        out = torch.empty_like(x)
        failed = library.attention_half(
            *(plan.half, x.data_ptr(), mixed.data_ptr(), query.data_ptr(), keys.data_ptr()),
            *(values.data_ptr(), *keys.stride()[:3], None if seen is None else seen.data_ptr()),
            *(keys.shape[2], own.scaling, out.data_ptr(), tokens, how),
        )
        return _unless(failed, out)

    def _think(self, x: Tensor, library: Library) -> Tensor:
        """The half of experts, or of a dense MLP."""
        plan = self._thinking
        if plan is None or not plan.holds():
            plan = self._thinking = _sparse_plan(self, self.mlp)
        experts: Any = None if plan is None else self.mlp.experts
        if plan is None or type(experts) is not NativeExperts or _watched(experts):
            out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
            return out
        out = torch.empty_like(x)
        failed = library.sparse_half(
            *(plan.half, *experts.places, x.data_ptr(), out.data_ptr(), len(x)),
            *(*plan.eps, library.how()),
        )
        return _unless(failed, out)


def _delta_plan(layer: Any, own: Any) -> Plan | None:
    """In the order of `DeltaHalf`; None where a half cannot be one call."""
    linears = own.in_proj_qkvz, own.in_proj_ba, own.out_proj
    if type(own) is not DeltaNet or not (_native(linears) and own.computable()):
        return None
    of_own = "in_proj_qkvz.weight in_proj_ba.weight conv1d.weight A_log dt_bias norm.weight"
    weights = [f"linear_attn.{name}" for name in f"{of_own} out_proj.weight".split()]
    ratio = own.num_v_heads // own.num_k_heads
    sizes = own.num_k_heads, ratio, own.head_k_dim, own.head_v_dim, own.conv_kernel_size
    eps = layer.input_layernorm.eps, own.norm.variance_epsilon
    return _if_fit(
        Plan(layer, ["input_layernorm.weight", *weights], (own.hidden_size, *sizes), eps)
    )


def _attention_plan(layer: Any, own: Any) -> Plan | None:
    """In the order of `AttentionHalf`."""
    if type(own) is not Attention or not (own.computable() and _native((own.o_proj,))):
        return None
    names = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")
    weights = [f"self_attn.{name}.weight" for name in names]
    size = own.head_dim
    heads = own.q_proj.out_features // (2 * size), own.k_proj.out_features // size
    sizes, eps = (own.q_proj.in_features, *heads, size), (layer.input_layernorm.eps, own.q_norm.eps)
    return _if_fit(Plan(layer, ["input_layernorm.weight", *weights], sizes, eps))


def _sparse_plan(layer: Any, block: Any) -> Plan | None:
    """In the order of `SparseHalf`."""
    if type(block) is not Sparse:
        return None
    gate, shared = block.gate, block.shared_expert
    linears = shared.gate_proj, shared.up_proj, block.shared_expert_gate, shared.down_proj
    if not (_native(linears) and _choosable(gate) and type(shared.act_fn) in _SILU):
        return None
    names = "shared_expert.gate_proj shared_expert.up_proj shared_expert_gate"
    weights = [f"mlp.{name}.weight" for name in f"gate {names} shared_expert.down_proj".split()]
    inner, eps = shared.gate_proj.out_features, (layer.post_attention_layernorm.eps,)
    sizes = gate.hidden_dim, gate.num_experts, inner, gate.top_k, gate.norm_topk_prob
    return _if_fit(Plan(layer, ["post_attention_layernorm.weight", *weights], sizes, eps))


def _if_fit(plan: Plan) -> Plan | None:
    return plan if plan.fits and plan.holds() else None


_SILU = (nn.SiLU, type(ACT2FN["silu"]))


def _unless(failed: int, out: Tensor) -> Tensor:
    if failed:
        raise MemoryError("no memory for a decode step")
    return out


def _native(linears: Iterable[nn.Module]) -> bool:
    return all(
        type(linear) is NativeLinear
        and linear.weight.dtype == torch.bfloat16
        and linear.weight.is_contiguous()
        for linear in linears
    )


def _watched(*parts: nn.Module) -> bool:
    """Whether somebody wants to see what goes through them."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def _choosable(router: Any) -> bool:
    return bool(router.num_experts <= step.EXPERTS and router.top_k <= step.CHOSEN)


def _kernels(x: Tensor, weight: Tensor, *, of: nn.Module) -> Library | None:
    """The kernels, if they can be used on x [..., n] and on such parameters of a module."""
    library = find()
    few = 0 < x.numel() <= FEW * x.shape[-1]
    alike = x.dtype == weight.dtype == torch.bfloat16 and x.is_cpu and weight.is_cpu
    if isinstance(library, str) or not few or not alike:
        return None
    if torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for p in of.parameters())
    ):
        return None
    return library


MODULES.register(
    "qwen3_next",
    {
        plain.Qwen3NextDecoderLayer: Layer,
        plain.Qwen3NextRMSNorm: Norm,
        plain.Qwen3NextTopKRouter: Router,
        plain.Qwen3NextSparseMoeBlock: Sparse,
        plain.Qwen3NextGatedDeltaNet: DeltaNet,
        plain.Qwen3NextAttention: Attention,
    },
)
