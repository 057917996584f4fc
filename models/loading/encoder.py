"""Hugging Face's BERT, RoBERTa and ESM (ESM-2, ESM-1b)."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from janax.models import encoder
from janax.models.loading import entries, files
from janax.models.loading.entries import Entry

__all__ = ["load_encoder", "save_encoder"]

_CONFIG_FILE = "config.json"
_WEIGHTS = "model"
_ROWS = 4096  # of an embedding, compared at a time


class _Family(NamedTuple):
    """What differs between the layouts.

    Attributes:
      classes: The names of its classes with a masked-language-model head and without.
      body: Prefix of the tensors below the head.
      head: Prefix of the head's tensors.
      transform: Prefix of what stands before the unembedding.
      head_norm: The norm there.
      embedding_norm: The norm of the embeddings.
      block_norms: The norms of a block.
      unused: Tensors of published files that are no part of the network, as a pattern for the whole name.
      defaults: Settings that config.json may leave out.
    """

    classes: tuple[str, str]
    body: str
    head: str
    transform: str
    head_norm: str
    embedding_norm: str
    block_norms: tuple[str, str]
    unused: str
    defaults: dict[str, Any]


_DEFAULTS = {
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "hidden_act": "gelu",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_POST = ("attention.output.LayerNorm", "output.LayerNorm")
_FAMILIES = {
    "bert": _Family(
        classes=("BertForMaskedLM", "BertModel"),
        body="bert.",
        head="cls.predictions.",
        transform="cls.predictions.transform.",
        head_norm="LayerNorm",
        embedding_norm="LayerNorm",
        block_norms=_POST,
        unused=r"bert\.embeddings\.(position|token_type)_ids|cls\.seq_relationship\.(weight|bias)",
        defaults=_DEFAULTS | {"type_vocab_size": 2},
    ),
    "roberta": _Family(
        classes=("RobertaForMaskedLM", "RobertaModel"),
        body="roberta.",
        head="lm_head.",
        transform="lm_head.",
        head_norm="layer_norm",
        embedding_norm="LayerNorm",
        block_norms=_POST,
        unused=r"roberta\.embeddings\.(position|token_type)_ids",
        defaults=_DEFAULTS | {"type_vocab_size": 2, "pad_token_id": 1},
    ),
    "esm": _Family(
        classes=("EsmForMaskedLM", "EsmModel"),
        body="esm.",
        head="lm_head.",
        transform="lm_head.",
        head_norm="layer_norm",
        embedding_norm="layer_norm",
        block_norms=("attention.LayerNorm", "LayerNorm"),
        unused=r"esm\.(embeddings\.position_ids|contact_head\.regression\.(weight|bias)"
        r"|(encoder\.layer\.(\d+|\*)\.attention\.self\.)?rotary_embeddings\.inv_freq)",
        defaults=_DEFAULTS
        | {"rope_theta": 10000.0, "emb_layer_norm_before": False, "token_dropout": False, "is_folding_model": False, "mask_token_id": None},
    ),
}
_FIXED = {"is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True, "is_folding_model": False}
_SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_ROTARY_UNUSED = "embeddings.position_embeddings.weight"  # in ESM-2's files all the same


class _Renamed:
    """A source whose tensors have the names of today: files may say gamma and beta, and those without a head leave out the first prefix."""

    def __init__(self, source: files.Source, body: str):
        bare = not any(name.startswith(body) for name in source.names)
        self._source, self.path = source, source.path
        self._stored = {}
        for name in source.names:
            today = re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda match: {"gamma": "weight", "beta": "bias"}[match[0]], name)
            inside = bare and today.startswith(("embeddings.", "encoder.", "pooler.", "contact_head.", "rotary_embeddings."))
            self._stored[body + today if inside else today] = name

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._stored[name])

    def get(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self._source.get(self._stored[name], index)


def _dense(
    path: tuple[str, ...], names: list[str], inputs: tuple[int, ...], outputs: tuple[int, ...], layers: int | None = None
) -> list[Entry]:
    """Kernel [*inputs *outputs] and bias [*outputs] of linear layers; several names are stacked on the first output axis."""
    each = dict.fromkeys(names, (1, *outputs[1:]) if len(names) > 1 else outputs)
    return [entries.linear(path, each, inputs, out_first=False, layers=layers), entries.bias(path, each, layers=layers)]


def _entries(family: _Family, config: encoder.EncoderConfig) -> list[Entry]:
    d, l, head = config.width, config.depth, (config.heads, config.head_width)
    embeddings, layer = family.body + "embeddings.", family.body + "encoder.layer.{}."

    def norm(path: tuple[str, ...], name: str, layers: int | None = None) -> list[Entry]:
        kinds = {"scale": "weight", "bias": "bias"}
        return [entries.plain((*path, kind), f"{name}.{stored}", (d,), layers=layers) for kind, stored in kinds.items()]

    def embedded() -> Iterator[Entry]:
        yield entries.plain(("embed", "tokens"), embeddings + "word_embeddings.weight", (config.vocab_size, d))
        if config.positions == "learned":
            rows = config.max_length + config.position_offset
            yield entries.plain(("embed", "positions"), embeddings + "position_embeddings.weight", (rows, d))
        if config.token_types:
            yield entries.plain(("embed", "types"), embeddings + "token_type_embeddings.weight", (config.token_types, d))
        if config.embedding_norm:
            yield from norm(("embed", "norm"), embeddings + family.embedding_norm)

    def above() -> Iterator[Entry]:
        if config.final_norm:
            yield from norm(("norm",), family.body + "encoder.emb_layer_norm_after")
        if config.head:
            yield from _dense(("head", "dense"), [family.transform + "dense"], (d,), (d,))
            yield from norm(("head", "norm"), family.transform + family.head_norm)
            yield entries.plain(("head", "bias"), family.head + "bias", (config.vocab_size,))
        if config.pooler:
            yield from _dense(("pooler",), [family.body + "pooler.dense"], (d,), (d,))

    return [
        *embedded(),
        *_dense(("blocks", "qkv"), [f"{layer}attention.self.{name}" for name in ("query", "key", "value")], (d,), (3, *head), l),
        *_dense(("blocks", "out"), [layer + "attention.output.dense"], head, (d,), l),
        *norm(("blocks", "attention_norm"), layer + family.block_norms[0], l),
        *_dense(("blocks", "up"), [layer + "intermediate.dense"], (d,), (config.hidden,), l),
        *_dense(("blocks", "down"), [layer + "output.dense"], (config.hidden,), (d,), l),
        *norm(("blocks", "mlp_norm"), layer + family.block_norms[1], l),
        *above(),
    ]


def _config(path: Path, content: dict[str, Any], *, head: bool, pooler: bool) -> encoder.EncoderConfig:
    """The config that the settings stand for; `path` is for messages."""
    kind = content.get("model_type")
    if kind not in _FAMILIES:
        raise ValueError(f"{path}: 'model_type' is {kind!r}, expected one of {', '.join(map(repr, _FAMILIES))}")
    fields = _FAMILIES[kind].defaults | content
    for name, value in _FIXED.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{path}: {name!r} is {fields[name]!r}, only {value!r} is supported")
    rotary = kind == "esm" and fields["position_embedding_type"] == "rotary"
    if not rotary and fields["position_embedding_type"] != "absolute":
        raise ValueError(f"{path}: 'position_embedding_type' is {fields['position_embedding_type']!r}, which is not supported for {kind!r}")
    if kind != "esm" and fields["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(f"{path}: 'hidden_act' is {fields['hidden_act']!r}, expected one of {', '.join(map(repr, _ACTIVATIONS))}")
    padded, masked = kind == "roberta" or (kind == "esm" and not rotary), kind == "esm" and bool(fields["token_dropout"])
    needed = {"max_position_embeddings": True, "type_vocab_size": kind != "esm", "pad_token_id": padded, "mask_token_id": masked}
    for name in (*_SIZES.values(), *(name for name, wanted in needed.items() if wanted)):
        if not isinstance(fields.get(name), int) or isinstance(fields[name], bool):
            raise ValueError(f"{path}: {name!r} is {fields.get(name)!r}, expected an integer")
    offset = fields["pad_token_id"] + 1 if padded else 0
    activation = "gelu" if kind == "esm" else _ACTIVATIONS[fields["hidden_act"]]
    try:
        return encoder.EncoderConfig(
            **{name: fields[stored] for name, stored in _SIZES.items()},
            max_length=fields["max_position_embeddings"] - offset,
            norm="pre" if kind == "esm" else "post",
            norm_eps=float(fields["layer_norm_eps"]),
            embedding_norm=kind != "esm" or bool(fields["emb_layer_norm_before"]),
            final_norm=kind == "esm",
            activation=activation,
            positions="rope" if rotary else "learned",
            position_offset=offset,
            rope_theta=float(fields["rope_theta"]) if rotary else 10000.0,
            token_types=0 if kind == "esm" else fields["type_vocab_size"],
            mask_token=fields["mask_token_id"] if masked else None,
            head=head,
            head_activation=activation if kind == "bert" else "gelu",
            pooler=pooler,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check_tied(source: files.Source, tied: str, original: str) -> None:
    """A stored copy of a parameter is equal to it to the bit."""
    shape = source.shape(original)
    if source.shape(tied) == shape:
        rest = (slice(None),) * (len(shape) - 1)
        spans = [slice(start, start + _ROWS) for start in range(0, shape[0], _ROWS)]
        if all(source.get(tied, (span, *rest)).tobytes() == source.get(original, (span, *rest)).tobytes() for span in spans):
            return
    raise ValueError(f"{source.path}: tensor {tied!r} differs from {original!r}, only tied embeddings are supported")


def load_encoder(
    directory: str | os.PathLike[str], *, shardings: entries.Shardings | None = None, dtype: DTypeLike | None = None
) -> tuple[encoder.EncoderConfig, dict[str, Any]]:
    """A BERT, RoBERTa or ESM encoder from Hugging Face's directory layout.

    The config has a head and a pooler if the file has them. The head for next sentences, ESM's contact head and stored position numbers
    are left out. Compute dtype, remat and scan are not part of the layout: set them by `dataclasses.replace(config, dtype="bfloat16")`.

    Args:
      directory: Holds config.json and model.safetensors, or its parts and index.
      shardings: From the tree of shapes to the tree of `NamedSharding`s, e.g. `lambda tree: sharding.shardings(tree,
        encoder.SHARDING_RULES, mesh)`. Without it the parameters are on the default device.
      dtype: Of the parameters; None is that of the file.

    Returns:
      The config and the parameters, as `encoder.init` lays them out.

    Raises:
      ValueError: naming the file and the tensor or setting that is missing, of another shape, unexpected or not supported.
    """
    directory = Path(directory)
    content = files.read_json(directory / _CONFIG_FILE)
    config = _config(directory / _CONFIG_FILE, content, head=False, pooler=False)
    family = _FAMILIES[content["model_type"]]
    with files.open_safetensors(directory, _WEIGHTS) as opened:
        source = _Renamed(opened, family.body)
        named = any(str(name).endswith(("ForMaskedLM", "ForPreTraining")) for name in content.get("architectures") or ())
        head, pooler = (any(name.startswith(prefix) for name in source.names) for prefix in (family.head, family.body + "pooler."))
        config = dataclasses.replace(config, head=head or named, pooler=pooler)
        copies = {"decoder.weight": family.body + "embeddings.word_embeddings.weight", "decoder.bias": family.head + "bias"}
        tied = {family.head + name: original for name, original in copies.items()} if config.head else {}
        rotary = family.body + _ROTARY_UNUSED if config.positions == "rope" else None
        entries.check(
            source, _entries(family, config), lambda name: name in tied or name == rotary or re.fullmatch(family.unused, name) is not None
        )
        for name in tied.keys() & source.names:
            _check_tied(source, name, tied[name])
        tree = jax.eval_shape(lambda key: encoder.init(config, key), jax.random.key(0))
        return config, entries.load(source, _entries(family, config), tree, shardings, dtype)


def save_encoder(directory: str | os.PathLike[str], config: encoder.EncoderConfig, params: Mapping[str, Any]) -> None:
    """Writes an encoder in Hugging Face's directory layout, in the parameters' dtype; `load_encoder` reads it back bit for bit.

    It is ESM's layout if norms come first, RoBERTa's if they do not and positions have an offset, and otherwise BERT's.

    Args:
      directory: Made if it is not there; an older checkpoint in it is replaced.
      config: The network. Its dtype, remat and scan_layers are not stored.
      params: Parameters on any devices this process can address.

    Raises:
      ValueError: if the layout cannot express the config, or `params` does not belong to it.
    """
    kind = "esm" if config.norm == "pre" else "roberta" if config.position_offset else "bert"
    family, rotary = _FAMILIES[kind], config.positions == "rope"
    content: dict[str, Any] = {
        "architectures": [family.classes[0 if config.head else 1]],
        "model_type": kind,
        **{stored: getattr(config, name) for name, stored in _SIZES.items()},
        "max_position_embeddings": config.max_length + config.position_offset,
        "layer_norm_eps": config.norm_eps,
        "position_embedding_type": "rotary" if kind == "esm" and rotary else "absolute",
        "hidden_act": next(stored for stored, name in _ACTIVATIONS.items() if name == config.activation),
        "pad_token_id": 1 if kind == "esm" and rotary else max(config.position_offset - 1, 0),
        "tie_word_embeddings": True,
    }
    if kind == "esm":
        content |= {"emb_layer_norm_before": config.embedding_norm, "rope_theta": config.rope_theta}
        content |= {"token_dropout": config.mask_token is not None, "mask_token_id": config.mask_token}
    else:
        content["type_vocab_size"] = config.token_types
    directory = Path(directory)
    again = _config(directory / _CONFIG_FILE, content, head=config.head, pooler=config.pooler)
    for field in dataclasses.fields(config):
        mine, theirs = getattr(config, field.name), getattr(again, field.name)
        if mine != theirs and field.name not in ("dtype", "remat", "scan_layers"):
            raise ValueError(f"save_encoder: the layout {kind!r} has {field.name!r} {theirs!r}, got {mine!r}")
    encoder.check_params("save_encoder", config, params)
    directory.mkdir(parents=True, exist_ok=True)
    entries.save(directory / f"{_WEIGHTS}.safetensors", _entries(family, config), params)
    files.write_json(directory / _CONFIG_FILE, content)
