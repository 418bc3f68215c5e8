"""The language model of a step: packed embeddings through its layers, with keys and values in a paged cache.

In: a transformers language model of this package (Llama, Mistral, Qwen2, Qwen3, MPT). Out: hidden states of packed tokens,
and logits. Weights are the model's own: projections that read the same input are laid into one tensor, and the model's
parameters become views of it, so nothing is held twice and the model's own `forward` and `generate` go on working. (Small
models on a CPU are the exception: their weights are copied into a layout that multiplies faster.)
What a layer computes is in kernels/; which model is which is the table at the end.

    T tokens of a step, D width, H query heads, K key/value heads, d head width, I inner width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llava.engine.config import UnsupportedModelError
from llava.engine.kernels.base import AttentionParams, AttentionPlan, Kernels, KVCache, Weight
from llava.engine.kernels.quantized import QuantizedWeight, quantize
from llava.model.config import language_model_type
from llava.model.protocols import LanguageModel

PACKED_BYTES = 2**30  # weights of small models on a CPU are copied into a faster layout; large ones are not held twice
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")  # one table of angles serves every length


@dataclass(frozen=True)
class Linear:
    """One or several projections of the same input. `parts` are their names in the model, and their numbers of outputs."""

    weight: Weight
    bias: Tensor | None = None
    parts: tuple[tuple[str, int], ...] = ()


class Projection(NamedTuple):
    """Where a weight of the model is: in a field of a layer, its outputs from `start` on."""

    layer: int
    field: str
    start: int
    num_outputs: int
    num_inputs: int


class TokenAdapters(Protocol):
    """Which adapter each token of a step goes through (adapters/step.py)."""

    def add_(self, out: Tensor, x: Tensor, layer: int, field: str) -> None:
        """Add what adapters change of a projection's outputs (T, O), whose inputs are x (T, I)."""


@dataclass(frozen=True)
class Norm:
    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Layer:
    attention_norm: Norm
    qkv: Linear
    out: Linear
    mlp_norm: Norm
    up: Linear  # gate and up in one, where the model has a gate
    down: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int | None = None


PROJECTIONS = ("qkv", "out", "up", "down")  # the fields of a layer that multiply


@dataclass(frozen=True)
class Shape:
    """What a language model is, beside its weights."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    gated: bool = True  # silu(gate) * up; else gelu(up)
    rms: bool = True  # RMS norms; else layer norms
    qkv_limit: float | None = None  # MPT may clip
    alibi: Tensor | None = None
    qk_norm_eps: float = 1e-6


class Decoder:
    """A language model over a paged cache. `caches` are keys and values (B, b, K, d) of each layer."""

    def __init__(
        self, model: LanguageModel, kernels: Kernels, *, weights: str | None = None, max_positions: int
    ) -> None:
        reason = unsupported_reason(model)
        if reason is not None:
            raise UnsupportedModelError(reason)
        read = READERS[language_model_type(model.config.to_dict())]
        self.kernels = kernels
        self.embedding: Tensor = model.get_input_embeddings().weight
        self.device, self.dtype = self.embedding.device, self.embedding.dtype
        copies = self.device.type == "cpu" and _projection_bytes(model) <= PACKED_BYTES
        names = {id(module): name for name, module in model.named_modules()}
        store = _WeightStore(kernels, weights, names, copies=copies)
        self.shape, self.layers, self.final_norm = read(model, store)
        self.head = store.fuse([model.get_output_embeddings()], tied_to=self.embedding)
        cos, sin = _angles(model, max_positions, self.dtype)
        shape = self.shape
        self.attention = [
            AttentionParams(
                shape.num_heads, shape.num_kv_heads, shape.scale, cos=cos, sin=sin, q_norm=layer.q_norm,
                k_norm=layer.k_norm, norm_eps=shape.qk_norm_eps, window=layer.window, alibi=shape.alibi,
            )
            for layer in self.layers
        ]  # fmt: skip
        self.caches: list[KVCache] = []

    @property
    def projections(self) -> dict[str, Projection]:
        """The place of every weight that multiplies within the layers, by its name in the model."""
        places = {}
        for number, layer in enumerate(self.layers):
            for field in PROJECTIONS:
                linear: Linear = getattr(layer, field)
                start = 0
                for name, num_outputs in linear.parts:
                    places[name] = Projection(number, field, start, num_outputs, linear.weight.shape[1])
                    start += num_outputs
        return places

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values in all layers."""
        shape = self.shape
        return 2 * len(self.layers) * shape.num_kv_heads * shape.head_dim * self.embedding.element_size()

    @property
    def weight_bytes(self) -> int:
        """What a decoding step of one sequence must read of the weights."""
        linears = [linear for layer in self.layers for linear in (layer.qkv, layer.out, layer.up, layer.down)]
        return sum(_nbytes(linear.weight) for linear in [*linears, self.head])

    def allocate(self, num_blocks: int, block_size: int) -> None:
        size = (num_blocks, block_size, self.shape.num_kv_heads, self.shape.head_dim)
        self.caches = [KVCache(self._zeros(size), self._zeros(size)) for _ in self.layers]

    def _zeros(self, size: tuple[int, ...]) -> Tensor:
        """Zeros, since kernels may read beyond what was written. numpy's take no memory before they are touched."""
        if self.device.type != "cpu":
            return torch.zeros(size, dtype=self.dtype, device=self.device)
        num_bytes = math.prod(size) * self.dtype.itemsize
        return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(self.dtype).view(size)

    def hidden_states(
        self,
        embeds: Tensor,
        plan: AttentionPlan,
        *,
        kept: dict[int, Tensor] | None = None,
        depth: int | None = None,
        adapters: TokenAdapters | None = None,
    ) -> Tensor:
        """Embeddings (T, D), which become the residual stream, to normed hidden states (T, D).

        Args:
            embeds: Embeddings of text and images.
            plan: Where the positions are.
            kept: Gets a copy of the residual stream (T, D) before each layer that it has as a key.
            depth: Compute this many layers only, and return the residual stream as it is then.
            adapters: What tokens go through beside the weights; None: nothing.
        """
        kernels, shape = self.kernels, self.shape

        def linear(x: Tensor, field: str) -> Tensor:
            weights: Linear = getattr(layer, field)
            out = kernels.linear(x, weights.weight, weights.bias)
            if adapters is not None:
                adapters.add_(out, x, number, field)
            return out

        residual, update = embeds, None
        for number, (layer, attention, cache) in enumerate(zip(self.layers, self.attention, self.caches, strict=True)):
            x = self._norm(layer.attention_norm, residual, update)
            if kept is not None and number in kept:
                kept[number] = residual.clone()
            if number == depth:
                return residual
            qkv = linear(x, "qkv")
            if shape.qkv_limit is not None:
                qkv = qkv.clamp(-shape.qkv_limit, shape.qkv_limit)
            q = kernels.rope_store_(qkv, cache, attention, plan)
            x = kernels.attend(q, cache, attention, plan)
            x = self._norm(layer.mlp_norm, residual, linear(x, "out"))
            if shape.gated and layer.up.bias is None and adapters is None:
                x = kernels.gated_linear(x, layer.up.weight)
            else:
                x = linear(x, "up")
                x = kernels.silu_mul(x) if shape.gated else kernels.gelu(x)
            update = linear(x, "down")
        return self._norm(self.final_norm, residual, update)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.kernels.linear(hidden, self.head.weight, self.head.bias)

    def _norm(self, norm: Norm, residual: Tensor, update: Tensor | None) -> Tensor:
        """The norm of the residual stream, after adding `update` to it in place."""
        kernels = self.kernels
        if self.shape.rms:
            if update is None:
                return kernels.rms_norm(residual, norm.weight, norm.eps)
            return kernels.add_rms_norm_(update, residual, norm.weight, norm.eps)
        if update is None:
            return kernels.layer_norm(residual, norm.weight, norm.bias, norm.eps)
        return kernels.add_layer_norm_(update, residual, norm.weight, norm.bias, norm.eps)


def unsupported_reason(model: LanguageModel) -> str | None:
    """Why the engine cannot run this model, as a sentence; None where it can."""
    kind = language_model_type(model.config.to_dict())
    if kind not in READERS:
        return f"the engine has no arithmetic for language models of type {kind!r}; it knows {', '.join(READERS)}"
    if getattr(model, "replaces_prepare", False):
        return "prepare_inputs_labels_for_multimodal of this model was replaced, and the engine inserts images itself"
    if len({parameter.device for parameter in model.parameters()}) != 1:
        return "the engine needs the model on one device; this one is spread over several, or partly not loaded"
    odd = next((type(module).__name__ for module in _projections(model) if type(module) is not nn.Linear), None)
    if odd is not None:
        return (
            f"the engine takes plain linear layers, and this model has {odd}, from another library's quantization or an "
            'adapter; load it without that and give EngineConfig(weights="int8") instead'
        )
    rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in STATIC_ROPE:
        return f"the engine has no table for position embeddings of type {rope!r}; it knows {', '.join(STATIC_ROPE)}"
    activation = getattr(model.config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        return f"the engine has no arithmetic for the activation {activation!r}"
    return None


def inner_model(model: LanguageModel) -> Any:
    """What holds embeddings and layers; a plain language model of transformers has it as well."""
    return getattr(model, model.base_model_prefix)


def _projection_bytes(model: LanguageModel) -> int:
    return sum(module.weight.nbytes for module in _projections(model))


def _projections(model: LanguageModel) -> Iterable[nn.Module]:
    """The modules that multiply by a weight in the language model's layers, and the output layer."""
    for name, module in inner_model(model).named_modules():
        if not name.startswith(("vision_tower", "mm_projector")) and hasattr(module, "in_features"):
            yield module
    yield model.get_output_embeddings()


class _WeightStore:
    """Lays weights side by side. `kind` rounds them; the model's own weights are then given up. `copies` may be made."""

    def __init__(self, kernels: Kernels, kind: str | None, names: Mapping[int, str], *, copies: bool) -> None:
        self.kernels, self.kind, self.names, self.copies = kernels, kind, names, copies

    @torch.no_grad()
    def fuse(self, modules: Sequence[Any], *, tied_to: Tensor | None = None) -> Linear:
        """One weight (sum of outputs, in) for modules with the same input."""
        parameters = [module.weight for module in modules]
        places = tuple((f"{self.names[id(module)]}.weight", len(module.weight)) for module in modules)
        if self.kind is not None and (tied_to is None or parameters[0] is not tied_to):
            rounded = _joined([quantize(parameter.data, self.kind) for parameter in parameters])  # type: ignore[arg-type]
            for module, parameter in zip(modules, parameters, strict=True):
                module.weight = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            return Linear(self.kernels.pack(rounded), _joined_bias(modules), places)
        parts = [parameter.data for parameter in parameters]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        weight: Weight = self.kernels.pack(joined) if self.copies else joined
        is_copy = weight is not joined
        if len(parts) > 1 and not is_copy:
            for parameter, part in zip(parameters, joined.split([len(part) for part in parts]), strict=True):
                parameter.data = part
        return Linear(weight, _joined_bias(modules), places)


def _nbytes(weight: Weight) -> int:
    packed_tensor = isinstance(weight, Tensor) and weight.is_mkldnn  # which does not know its bytes
    return weight.numel() * weight.element_size() if packed_tensor else weight.nbytes  # type: ignore[union-attr]


def _joined(parts: list[QuantizedWeight]) -> QuantizedWeight:
    return QuantizedWeight(
        parts[0].kind, torch.cat([part.data for part in parts]), torch.cat([part.scales for part in parts])
    )


def _joined_bias(modules: Sequence[Any]) -> Tensor | None:
    if all(module.bias is None for module in modules):
        return None
    biases = [
        module.bias.data if module.bias is not None else module.weight.new_zeros(module.out_features)
        for module in modules
    ]
    return biases[0] if len(biases) == 1 else torch.cat(biases)


def _angles(model: LanguageModel, num_positions: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin (P, d) of every position, from the model's own module, rounded as it rounds them."""
    rotary = getattr(inner_model(model), "rotary_emb", None)
    if rotary is None:
        return None, None
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        like = torch.empty(0, dtype=dtype, device=device)
        cos, sin = rotary(like, torch.arange(num_positions, device=device)[None])
    return cos[0].contiguous(), sin[0].contiguous()


# Which part of a transformers model is which part of a layer.


def _read_llama(model: LanguageModel, store: _WeightStore) -> tuple[Shape, list[Layer], Norm]:
    """Llama, Mistral, Qwen2 and Qwen3: the same layers with or without biases, windows and norms of heads."""
    config, inner = model.config, inner_model(model)
    layers = []
    for block in inner.layers:
        attention, mlp = block.self_attn, block.mlp
        layers.append(
            Layer(
                attention_norm=_rms(block.input_layernorm),
                qkv=store.fuse([attention.q_proj, attention.k_proj, attention.v_proj]),
                out=store.fuse([attention.o_proj]),
                mlp_norm=_rms(block.post_attention_layernorm),
                up=store.fuse([mlp.gate_proj, mlp.up_proj]),
                down=store.fuse([mlp.down_proj]),
                q_norm=attention.q_norm.weight.data if hasattr(attention, "q_norm") else None,
                k_norm=attention.k_norm.weight.data if hasattr(attention, "k_norm") else None,
                window=_window(config, attention),
            )
        )
    first = inner.layers[0].self_attn
    shape = Shape(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=first.head_dim,
        scale=first.scaling,
        qk_norm_eps=config.rms_norm_eps,
    )
    return shape, layers, _rms(inner.norm)


def _window(config: Any, attention: Any) -> int | None:
    """Qwen's attention knows its own; Mistral's looks into the config; Llama has none."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return config.sliding_window if language_model_type(config.to_dict()) == "mistral" else None


def _rms(norm: Any) -> Norm:
    return Norm(norm.weight.data, None, norm.variance_epsilon)


def _read_mpt(model: LanguageModel, store: _WeightStore) -> tuple[Shape, list[Layer], Norm]:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    config, inner = model.config, inner_model(model)
    layers = [
        Layer(
            attention_norm=_layer_norm(block.norm_1),
            qkv=store.fuse([block.attn.Wqkv]),
            out=store.fuse([block.attn.out_proj]),
            mlp_norm=_layer_norm(block.norm_2),
            up=store.fuse([block.ffn.up_proj]),
            down=store.fuse([block.ffn.down_proj]),
        )
        for block in inner.blocks
    ]
    first = inner.blocks[0].attn
    # Of two positions' biases, -slope and 0, only the first tells the slope.
    slopes = -build_mpt_alibi_tensor(config.n_heads, 2, device=inner.wte.weight.device)[:, 0, 0]
    shape = Shape(
        num_heads=config.n_heads,
        num_kv_heads=config.n_heads,
        head_dim=first.head_dim,
        scale=first.softmax_scale,
        gated=False,
        rms=False,
        qkv_limit=first.clip_qkv,
        alibi=slopes.float().contiguous(),
    )
    return shape, layers, _layer_norm(inner.norm_f)


def _layer_norm(norm: Any) -> Norm:
    return Norm(norm.weight.data, None if norm.bias is None else norm.bias.data, norm.eps)


READERS: dict[str, Callable[[LanguageModel, _WeightStore], tuple[Shape, list[Layer], Norm]]] = {
    "llama": _read_llama,
    "mistral": _read_llama,
    "qwen2": _read_llama,
    "qwen3": _read_llama,
    "mpt": _read_mpt,
}
