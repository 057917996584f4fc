"""Hugging Face's decoder language models: config.json and safetensors, in one file or several with an index.

A family says how its configuration reads and what its tensors are called. Saving looks for the family whose configuration gives the same
network: a Mistral without a window is written as the Llama it is.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from janax.models import transformer
from janax.models.loading import entries, files
from janax.models.loading.entries import Entry
from janax.models.transformer import RopeScaling, TransformerConfig

__all__ = ["load_transformer", "read_transformer", "save_transformer"]

_CONFIG_FILE = "config.json"
_WEIGHTS = "model"
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# Buffers of older files that are no weights: rotary frequencies, causal masks.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(attention\.)?(bias|masked_bias)$")
_SLIDING, _FULL = "sliding_attention", "full_attention"


class _Settings:
    """A configuration whose values are checked as they are asked for; errors name where it comes from."""

    def __init__(self, content: Mapping[str, Any], where: object):
        self._content, self._where = content, where

    def error(self, text: str) -> ValueError:
        return ValueError(f"{self._where}: {text}")

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or the default where it is absent or null."""
        value = self._content.get(name)
        return default if value is None else value

    def has(self, name: str) -> bool:
        """Whether it is there, null perhaps."""
        return name in self._content

    def without(self, *names: str) -> "_Settings":
        """The others."""
        return _Settings({name: value for name, value in self._content.items() if name not in names}, self._where)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(f"{name!r} is {value!r}, expected an integer" if value is not None else f"{name!r} is missing")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(f"{name!r} is {value!r}, expected a number" if value is not None else f"{name!r} is missing")
        return float(value)

    def optional(self, name: str) -> float | None:
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(f"{name!r} is {value!r}, expected true or false")
        return value

    def only(self, **values: Any) -> None:
        """Settings that may have one value, which is the default."""
        for name, value in values.items():
            if self.get(name, value) != value:
                raise self.error(f"{name!r} is {self.get(name)!r}, only {value!r} is supported")

    def choice(self, name: str, default: str, options: Mapping[str, str]) -> str:
        value = self.get(name, default)
        if not isinstance(value, str) or value not in options:
            raise self.error(f"{name!r} is {value!r}, expected one of {', '.join(map(repr, options))}")
        return options[value]

    def inner(self, *names: str) -> "_Settings":
        """An object within, the first of these names that is there; empty if none is."""
        for name in names:
            value = self.get(name, {})
            if not isinstance(value, Mapping):
                raise self.error(f"{name!r} is {value!r}, expected an object")
            if value:
                return _Settings(value, self._where)
        return _Settings({}, self._where)


# Configurations.


def _rope(settings: _Settings, own: _Settings, theta: float) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, which stand together in `own` in newer configurations and apart in older ones."""
    own.only(partial_rotary_factor=1.0)
    settings.only(partial_rotary_factor=1.0)
    theta = own.number("rope_theta", settings.number("rope_theta", theta))
    kinds = {"default": "default", "linear": "linear", "llama3": "llama3"}
    kind = own.choice("rope_type" if own.get("rope_type") else "type", "default", kinds)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=own.number("factor"))
    return theta, RopeScaling(
        kind="llama3",
        factor=own.number("factor"),
        low_frequency=own.number("low_freq_factor"),
        high_frequency=own.number("high_freq_factor"),
        original_length=own.integer("original_max_position_embeddings", settings.integer("max_position_embeddings")),
    )


def _windows(settings: _Settings, depth: int, window: int | None, slides: Callable[[int], bool]) -> dict[str, Any]:
    """Which layers slide, from "layer_types" or by the family's rule."""
    kinds = settings.get("layer_types")
    if kinds is None:
        kinds = [_SLIDING if slides(layer) else _FULL for layer in range(depth)]
    if not isinstance(kinds, list) or len(kinds) != depth or set(kinds) - {_SLIDING, _FULL}:
        raise settings.error(f"'layer_types' is {kinds!r}, expected {_SLIDING!r} or {_FULL!r} for each of {depth} layers")
    sliding = tuple(kind == _SLIDING for kind in kinds)
    if not any(sliding):
        return {}
    if window is None:
        raise settings.error("'sliding_window' is missing, and 'layer_types' needs it")
    return {"window": window} if all(sliding) else {"window": window, "sliding": sliding}


def _rotary(settings: _Settings, *, head_width: int | None = None, theta: float = 10000.0, tied: bool = False) -> dict[str, Any]:
    """What the families with rotary positions have in common."""
    width, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    theta, scaling = _rope(settings, settings.inner("rope_parameters", "rope_scaling"), theta)
    return {
        "vocab_size": settings.integer("vocab_size"),
        "max_length": settings.integer("max_position_embeddings"),
        "width": width,
        "depth": settings.integer("num_hidden_layers"),
        "heads": heads,
        "kv_heads": settings.integer("num_key_value_heads", heads),
        "head_width": settings.integer("head_dim", head_width or width // max(1, heads)),
        "hidden": settings.integer("intermediate_size"),
        "norm_eps": settings.number("rms_norm_eps", 1e-6),
        "tied": settings.flag("tie_word_embeddings", tied),
        "rope_theta": theta,
        "rope_scaling": scaling,
    }


def _biased(settings: _Settings) -> dict[str, Any]:
    biased = settings.flag("attention_bias", False)
    return {"qkv_bias": biased, "out_bias": biased}


def _llama(settings: _Settings) -> TransformerConfig:
    activation = settings.choice("hidden_act", "silu", _ACTIVATIONS)
    bias = settings.flag("mlp_bias", False)
    return TransformerConfig(**_rotary(settings), **_biased(settings), mlp_bias=bias, activation=activation)


def _mistral(settings: _Settings) -> TransformerConfig:
    window = settings.get("sliding_window") and settings.integer("sliding_window")
    return TransformerConfig(**_rotary(settings), activation=settings.choice("hidden_act", "silu", _ACTIVATIONS), window=window or None)


def _qwen(settings: _Settings, *, third: bool) -> TransformerConfig:
    fields = _rotary(settings, head_width=128 if third else None)
    fields |= {**_biased(settings), "query_key_norm": True} if third else {"qkv_bias": True}
    used, after = settings.flag("use_sliding_window", False), settings.integer("max_window_layers", 28)
    window = settings.integer("sliding_window", 4096) if used else None
    fields |= _windows(settings, fields["depth"], window, lambda layer: used and layer >= after)
    return TransformerConfig(**fields, activation=settings.choice("hidden_act", "silu", _ACTIVATIONS))


def _gemma(settings: _Settings, *, third: bool) -> TransformerConfig:
    settings.only(use_bidirectional_attention=False)
    if third:  # thetas and scaling by the kind of layer; older configurations have names of their own for them
        nested = settings.inner("rope_parameters")
        full, local = nested.inner(_FULL), nested.inner(_SLIDING)
        fields = _rotary(settings.without("rope_parameters", "rope_scaling"), head_width=256, theta=1e6, tied=True)
        own = settings.inner("rope_scaling") if not nested.has(_FULL) else full
        fields["rope_theta"], fields["rope_scaling"] = _rope(settings, own, 1e6)
        local.only(rope_type="default")
        fields |= {"rope_local_theta": local.number("rope_theta", settings.number("rope_local_base_freq", 10000.0)), "query_key_norm": True}
    else:
        fields = _rotary(settings, head_width=256, tied=True)
    every, caps = settings.integer("sliding_window_pattern", 6) if third else 2, (None, None) if third else (50.0, 30.0)
    fields |= _windows(settings, fields["depth"], settings.integer("sliding_window", 4096), lambda layer: (layer + 1) % every != 0)
    for name, public, cap in zip(("attention_softcap", "final_softcap"), ("attn_logit_softcapping", "final_logit_softcapping"), caps):
        fields[name] = settings.optional(public) if settings.has(public) else cap
    if "window" not in fields:
        fields.pop("rope_local_theta", None)
    return TransformerConfig(
        **fields,
        **_biased(settings),
        norm_offset=1.0,
        post_norms=True,
        activation=settings.choice("hidden_activation", "gelu_pytorch_tanh", _ACTIVATIONS),
        embedding_scale=fields["width"] ** 0.5,
        query_scale=settings.number("query_pre_attn_scalar", 256) ** -0.5,
    )


_LEARNED: dict[str, Any] = {"norm": "layer", "gated": False, "out_bias": True, "mlp_bias": True, "positions": "learned"}


def _gpt2(settings: _Settings) -> TransformerConfig:
    settings.only(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    width, heads = settings.integer("n_embd"), settings.integer("n_head")
    return TransformerConfig(
        vocab_size=settings.integer("vocab_size"),
        max_length=settings.integer("n_positions"),
        width=width,
        depth=settings.integer("n_layer"),
        heads=heads,
        kv_heads=heads,
        head_width=width // max(1, heads),
        hidden=settings.integer("n_inner", 4 * width),
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        activation=settings.choice("activation_function", "gelu_new", _ACTIVATIONS),
        qkv_bias=True,
        tied=settings.flag("tie_word_embeddings", True),
        **_LEARNED,
    )


def _gpt_neo(settings: _Settings) -> TransformerConfig:
    width, heads, depth = settings.integer("hidden_size"), settings.integer("num_heads"), settings.integer("num_layers")
    try:
        kinds = settings.get("attention_layers") or [kind for pattern, times in settings.get("attention_types") for kind in pattern * times]
    except (TypeError, ValueError) as error:
        raise settings.error(f"'attention_types' is {settings.get('attention_types')!r}, expected [[[kinds], times], ...]") from error
    if len(kinds) != depth or set(kinds) - {"global", "local"}:
        raise settings.error(f"'attention_layers' is {kinds!r}, expected 'global' or 'local' for each of {depth} layers")
    sliding = tuple(kind == "local" for kind in kinds)
    return TransformerConfig(
        vocab_size=settings.integer("vocab_size"),
        max_length=settings.integer("max_position_embeddings"),
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=heads,
        head_width=width // max(1, heads),
        hidden=settings.integer("intermediate_size", 4 * width),
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        activation=settings.choice("activation_function", "gelu_new", _ACTIVATIONS),
        tied=settings.flag("tie_word_embeddings", True),
        query_scale=1.0,
        window=settings.integer("window_size", 256) if any(sliding) else None,
        sliding=() if all(sliding) or not any(sliding) else sliding,
        **_LEARNED,
    )


# And back: everything that any member of the family may have; what does not fit shows when it is read again.


def _write_rotary(config: TransformerConfig, **more: Any) -> dict[str, Any]:
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default" if scaling is None else scaling.kind, "rope_theta": config.rope_theta}
    if scaling is not None:
        rope["factor"] = scaling.factor
    if scaling is not None and scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_frequency, "high_freq_factor": scaling.high_frequency}
        rope["original_max_position_embeddings"] = scaling.original_length
    # Both spellings: readers know the newer one, older readers the older one.
    older = {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"},
    }
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.hidden,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_parameters": rope,
        **older,
        **more,
    }


def _activation(config: TransformerConfig, *, new: bool = False) -> str:
    return {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new" if new else "gelu_pytorch_tanh"}[config.activation]


def _layer_types(config: TransformerConfig) -> list[str]:
    return [_SLIDING if config.slides(layer) else _FULL for layer in range(config.depth)]


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
    return _write_rotary(config, hidden_act=_activation(config), attention_bias=config.qkv_bias, mlp_bias=config.mlp_bias)


def _write_mistral(config: TransformerConfig) -> dict[str, Any]:
    return _write_rotary(config, hidden_act=_activation(config), sliding_window=config.window)


def _write_qwen(config: TransformerConfig) -> dict[str, Any]:
    window = {"use_sliding_window": config.window is not None, "sliding_window": config.window, "layer_types": _layer_types(config)}
    return _write_rotary(config, hidden_act=_activation(config), attention_bias=config.out_bias, **window)


def _write_gemma(config: TransformerConfig, *, third: bool) -> dict[str, Any]:
    content = _write_rotary(
        config,
        hidden_activation=_activation(config),
        attention_bias=config.out_bias,
        sliding_window=config.window or 4096,
        layer_types=_layer_types(config),
        query_pre_attn_scalar=_scalar(config),
        attn_logit_softcapping=config.attention_softcap,
        final_logit_softcapping=config.final_softcap,
    )
    if third:
        local = {"rope_type": "default", "rope_theta": config.rope_local_theta or 10000.0}
        content["rope_parameters"] = {_FULL: content["rope_parameters"], _SLIDING: local}
        content["rope_local_base_freq"] = local["rope_theta"]
    return content


def _scalar(config: TransformerConfig) -> float:
    """The number whose -1/2th power is the query scale, whole if one is."""
    scale = config.head_width**-0.5 if config.query_scale is None else config.query_scale
    scalar = scale**-2.0
    return next((n for n in (round(scalar),) if n > 0 and float(n) ** -0.5 == scale), scalar)


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.hidden,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": _activation(config, new=True),
        "tie_word_embeddings": config.tied,
    }


def _write_gpt_neo(config: TransformerConfig) -> dict[str, Any]:
    kinds = ["local" if config.slides(layer) else "global" for layer in range(config.depth)]
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "hidden_size": config.width,
        "num_layers": config.depth,
        "num_heads": config.heads,
        "intermediate_size": config.hidden,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": _activation(config, new=True),
        "tie_word_embeddings": config.tied,
        "attention_types": [[[kind], 1] for kind in kinds],
        "attention_layers": kinds,
        "window_size": config.window or 256,
    }


# Tensors.


def _norm_entries(config: TransformerConfig, path: tuple[str, ...], name: str, width: int, layers: int | None = None) -> list[Entry]:
    kinds = {"scale": "weight"} if config.norm == "rms" else {"scale": "weight", "bias": "bias"}
    return [entries.plain((*path, kind), f"{name}.{public}", (width,), layers=layers) for kind, public in kinds.items()]


def _block_entries(config: TransformerConfig, block: str, names: Mapping[str, str], *, in_first_file: bool = False) -> list[Entry]:
    """The blocks; `names` maps this library's names to the family's, "q", "k" and "v" too."""
    d, kv, g, h, layers = config.width, config.kv_heads, config.queries, config.head_width, config.depth
    found = []
    for name, width in (
        ("attention_norm", d),
        ("mlp_norm", d),
        ("attention_post_norm", d),
        ("mlp_post_norm", d),
        ("query_norm", h),
        ("key_norm", h),
    ):
        if name in names:
            found += _norm_entries(config, ("blocks", name), block + names[name], width, layers)
    dense: list[tuple[str, dict[str, tuple[int, ...]], tuple[int, ...], bool, int]] = [
        ("qkv", {block + names["q"]: (kv, g, h), block + names["k"]: (kv, 1, h), block + names["v"]: (kv, 1, h)}, (d,), config.qkv_bias, 1),
        ("out", {block + names["out"]: (d,)}, (kv, g, h), config.out_bias, 0),
        *[(name, {block + names[name]: (config.hidden,)}, (d,), config.mlp_bias, 0) for name in ("gate", "up") if name in names],
        ("down", {block + names["down"]: (d,)}, (config.hidden,), config.mlp_bias, 0),
    ]
    for name, outputs, inputs, biased, axis in dense:
        found.append(entries.linear(("blocks", name), outputs, inputs, axis=axis, layers=layers, in_first_file=in_first_file))
        if biased:
            found.append(entries.bias(("blocks", name), outputs, axis=axis, layers=layers))
    return found


def _ends(config: TransformerConfig, embed: str, norm: str) -> list[Entry]:
    v, d = config.vocab_size, config.width
    return [
        entries.plain(("embed", "table"), f"{embed}.weight", (v, d)),
        *_norm_entries(config, ("norm",), norm, d),
        *([] if config.tied else [entries.plain(("unembed", "kernel"), "lm_head.weight", (v, d))]),
    ]


def _llama_entries(config: TransformerConfig) -> list[Entry]:
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        names["attention_post_norm"] = names["mlp_norm"]
        names |= {"mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
    if config.query_key_norm:
        names |= {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
    names |= {name: f"self_attn.{name[0]}_proj" for name in ("q", "k", "v", "out")} | {n: f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    return [*_ends(config, "model.embed_tokens", "model.norm"), *_block_entries(config, "model.layers.{}.", names)]


def _learned_entries(config: TransformerConfig, names: Mapping[str, str], *, in_first_file: bool) -> list[Entry]:
    positions = entries.plain(("embed", "positions"), "transformer.wpe.weight", (config.max_length, config.width))
    names = {"attention_norm": "ln_1", "mlp_norm": "ln_2", "up": "mlp.c_fc", "down": "mlp.c_proj", **names}
    blocks = _block_entries(config, "transformer.h.{}.", names, in_first_file=in_first_file)
    return [*_ends(config, "transformer.wte", "transformer.ln_f"), positions, *blocks]


def _gpt2_entries(config: TransformerConfig) -> list[Entry]:
    names = {name: f"attn.c_attn#{name}" for name in ("q", "k", "v")} | {"out": "attn.c_proj"}  # stretches of one tensor
    return _learned_entries(config, names, in_first_file=True)


def _gpt_neo_entries(config: TransformerConfig) -> list[Entry]:
    names = {name: f"attn.attention.{name}_proj" for name in ("q", "k", "v", "out")}
    return _learned_entries(config, names, in_first_file=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """A model type: its class, its configuration to and fro, and its tensors."""

    architecture: str
    read: Callable[[_Settings], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any]]
    entries: Callable[[TransformerConfig], list[Entry]] = _llama_entries


_FAMILIES = {
    "llama": _Family(architecture="LlamaForCausalLM", read=_llama, write=_write_llama),
    "mistral": _Family(architecture="MistralForCausalLM", read=_mistral, write=_write_mistral),
    "qwen2": _Family(architecture="Qwen2ForCausalLM", read=functools.partial(_qwen, third=False), write=_write_qwen),
    "qwen3": _Family(architecture="Qwen3ForCausalLM", read=functools.partial(_qwen, third=True), write=_write_qwen),
    "gemma2": _Family(
        architecture="Gemma2ForCausalLM", read=functools.partial(_gemma, third=False), write=functools.partial(_write_gemma, third=False)
    ),
    "gemma3_text": _Family(
        architecture="Gemma3ForCausalLM", read=functools.partial(_gemma, third=True), write=functools.partial(_write_gemma, third=True)
    ),
    "gpt2": _Family(architecture="GPT2LMHeadModel", read=_gpt2, write=_write_gpt2, entries=_gpt2_entries),
    "gpt_neo": _Family(architecture="GPTNeoForCausalLM", read=_gpt_neo, write=_write_gpt_neo, entries=_gpt_neo_entries),
}


class _Renamed:
    """A source whose names all lack a prefix."""

    def __init__(self, source: files.Source, prefix: str):
        self._source, self._prefix, self.path = source, prefix, source.path
        self.names = frozenset(prefix + name for name in source.names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name.removeprefix(self._prefix))

    def get(self, name: str, index: tuple[slice, ...]) -> Any:
        return self._source.get(name.removeprefix(self._prefix), index)


def read_transformer(
    content: Mapping[str, Any],
    source: files.Source,
    *,
    where: object = None,
    shardings: entries.Shardings | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[TransformerConfig, dict[str, Any]]:
    """A decoder from any source of tensors under Hugging Face's names.

    Args:
      content: What config.json says, or would say.
      source: The tensors.
      where: What to call `content` in messages; the source's path by default.
      shardings: As in `load_transformer`.
      dtype: As in `load_transformer`.

    Returns:
      The config and the parameters.

    Raises:
      ValueError: as `load_transformer`.
    """
    family, config = _configured(content, source.path if where is None else where)
    if family.entries is not _llama_entries and "wte.weight" in source.names:  # saved without the language model's head
        source = _Renamed(source, "transformer.")
    listed = family.entries(config)
    entries.check(source, listed, lambda name: bool(_BUFFERS.search(name)) or (config.tied and name.endswith("lm_head.weight")))
    tree = jax.eval_shape(lambda key: transformer.init(config, key), jax.random.key(0))
    return config, entries.load(source, listed, tree, shardings, dtype)


def _configured(content: Mapping[str, Any], where: object) -> tuple[_Family, TransformerConfig]:
    kind, names = content.get("model_type"), content.get("architectures") or []
    family = _FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or (names and family.architecture not in names):
        supported = ", ".join(family.architecture for family in _FAMILIES.values())
        raise ValueError(f"{where}: the architecture {(names or [kind])[0]!r} is not supported, expected one of {supported}")
    try:
        return family, family.read(_Settings(content, where))
    except ValueError as error:
        raise error if str(error).startswith(f"{where}:") else ValueError(f"{where}: {error}") from error


def load_transformer(
    directory: str | os.PathLike[str], *, shardings: entries.Shardings | None = None, dtype: DTypeLike | None = None
) -> tuple[TransformerConfig, dict[str, Any]]:
    """A decoder from a directory in Hugging Face's layout.

    Compute dtype, remat, scan and the form of attention are not part of the layout: set them by `dataclasses.replace(config, ...)`.

    Args:
      directory: Holds config.json and model.safetensors, or its parts and model.safetensors.index.json (float32, float16 or bfloat16).
      shardings: From the tree of shapes to the tree of `NamedSharding`s, e.g. `lambda tree: sharding.shardings(tree,
        transformer.SHARDING_RULES, mesh)`. Every device's shard is read without the rest, so that the host holds one shard at a time and of
        the files a slice of one tensor. Without it the parameters are on the default device.
      dtype: Dtype of the parameters; None keeps that of the file.

    Returns:
      The config and the parameters, as `transformer.init` lays them out.

    Raises:
      ValueError: naming the file and the tensor or setting that is missing, of another shape, unexpected or not supported.
    """
    directory = Path(directory)
    content = files.read_json(directory / _CONFIG_FILE)
    _configured(content, directory / _CONFIG_FILE)  # before the weights are looked for
    with files.open_safetensors(directory, _WEIGHTS) as source:
        return read_transformer(content, source, where=directory / _CONFIG_FILE, shardings=shardings, dtype=dtype)


def save_transformer(directory: str | os.PathLike[str], config: TransformerConfig, params: Mapping[str, Any]) -> None:
    """Writes a decoder in Hugging Face's layout, in the dtype of the parameters; `load_transformer` reads it back bit for bit.

    Args:
      directory: Made if it is not there; an older checkpoint in it is replaced.
      config: The network. Its dtype, remat, scan_layers and attention are not stored.
      params: Parameters, stacked or not, on any devices this process can address.

    Raises:
      ValueError: if no supported architecture is like the config, or `params` does not belong to it.
    """
    transformer.check_params("save_transformer", config, params)
    fixed = {field: TransformerConfig.__dataclass_fields__[field].default for field in ("dtype", "remat", "scan_layers", "attention")}
    for kind, family in _FAMILIES.items():
        content = {"architectures": [family.architecture], "model_type": kind, **family.write(config)}
        try:
            same = _configured(content, kind)[1] == dataclasses.replace(config, **fixed)
        except ValueError:
            same = False
        if same:
            break
    else:
        raise ValueError(f"save_transformer: no supported architecture is like this config ({', '.join(_FAMILIES)})")
    params = transformer.stack_layers(params)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    entries.save(directory / f"{_WEIGHTS}.safetensors", family.entries(config), params)
    files.write_json(directory / _CONFIG_FILE, {**content, "dtype": str(jax.tree.leaves(params)[0].dtype)})
