"""EAGLE-3 drafts as other projects write them: what they are, and whether they fit a target. Torch-free.

The projects are SafeAILab's EAGLE, SpecForge (SGLang), AngelSlim, speculators (vLLM) and NVIDIA ModelOpt. Their files
differ in names, in where the configuration says what, and in how they count the target's layers
(docs/drafts-from-elsewhere.md).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from evospec.engine.models.config import ModelError, ModelSpec
from evospec.engine.models.config_keys import ConfigKeys
from evospec.engine.models.eagle3_config import CONFIG_FILE, WEIGHTS_FILE, Eagle3Config, Variant, check_tensors
from evospec.engine.models.rope_scaling import read_rope
from evospec.engine.models.safetensors_spec import Header, config_file, read_header, read_json

HEAD, EMBEDDING, TARGET_OFFSETS, DRAFTED = "lm_head.weight", "embed_tokens.weight", "d2t", "t2d"
"""Tensors besides those of the network. Token i of the draft's head is the target's i + d2t[i]; t2d [vocab] is true for
these tokens."""
_LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"
_SIGNS = ("speculators_model_type", "eagle_config", "draft_vocab_size", _LAYERS_KEY)
_ATTENTION, _MLP = "layers.0.self_attn.", "layers.0.mlp."
_UNUSED = ("rotary_emb.inv_freq", "verifier_lm_head.weight", "verifier_norm.weight")


def is_foreign_draft(directory: Path) -> bool:
    """Whether a directory is that of a draft of another project, and not of a whole model."""
    if (directory / WEIGHTS_FILE).is_file() or not (directory / CONFIG_FILE).is_file():
        return False
    config = read_json(directory / CONFIG_FILE)
    return any(key in config for key in _SIGNS) or any("eagle" in name.lower() for name in _architectures(config))


def check_foreign_draft(directory: Path, spec: ModelSpec, capture_layers: Sequence[int] | None) -> Eagle3Config | None:
    """See that a draft can be served with a target, as far as is known without loading it.

    Returns:
        What it is; None for a ``.bin`` file, whose tensors are known only when it is loaded.

    Raises:
        ModelError: it is not supported, damaged, or made for a model of another shape.
    """
    files = weight_files(directory)
    if files[0].suffix == ".bin":
        with config_file(directory / CONFIG_FILE) as stored:
            _read_config(stored, spec, capture_layers)
        return None
    header: Header = {}
    for path in files:
        header |= {plain_name(name): info for name, info in read_header(path).items()}
    return foreign_config(directory, header, spec, capture_layers)


def weight_files(directory: Path) -> list[Path]:
    """Those of a draft: safetensors, or pickles where there are none."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(directory.glob(pattern)):
            return files
    raise ModelError(f"{directory}: neither model*.safetensors nor pytorch_model*.bin is there")


def plain_name(stored: str) -> str:
    """One name for what the projects call a tensor."""
    return stored.removeprefix("model.").replace("midlayer.", "layers.0.")


def parts_of(config: Eagle3Config) -> dict[str, tuple[str, ...]]:
    """Of each of ``config.tensor_shapes``, the stored tensors that it is made of, one below the other."""
    parts: dict[str, tuple[str, ...]] = {
        "fc.weight": ("fc.weight",),
        "embedding_norm": ("layers.0.input_layernorm.weight",),
        "hidden_norm": ("layers.0.hidden_norm.weight",),
        "qkv_proj.weight": tuple(f"{_ATTENTION}{letter}_proj.weight" for letter in "qkv"),
        "qkv_proj.bias": tuple(f"{_ATTENTION}{letter}_proj.bias" for letter in "qkv"),
        "q_norm": (f"{_ATTENTION}q_norm.weight",),
        "k_norm": (f"{_ATTENTION}k_norm.weight",),
        "o_proj.weight": (f"{_ATTENTION}o_proj.weight",),
        "post_attention_norm": ("layers.0.post_attention_layernorm.weight",),
        "gate_up_proj.weight": (f"{_MLP}gate_proj.weight", f"{_MLP}up_proj.weight"),
        "down_proj.weight": (f"{_MLP}down_proj.weight",),
        "output_norm": ("norm.weight",),
        "feature_norm": ("input_norm.weight",),
    }
    if config.variant.feature_norms == "each":
        parts["feature_norm"] = tuple(f"fc_norm.{index}.weight" for index in range(len(config.capture_layers)))
    return {name: parts[name] for name in config.tensor_shapes()}


def foreign_config(
    directory: Path, header: Header, spec: ModelSpec, capture_layers: Sequence[int] | None
) -> Eagle3Config:
    """What a draft is.

    Args:
        directory: where its ``config.json`` is.
        header: shape and type of its tensors, by ``plain_name``.
        spec: of the target.
        capture_layers: of the target, by number, whose outputs are the features; None: as the draft says.

    Raises:
        ModelError: it is not supported, or made for a model of another shape.
    """
    _refuse_tensors(directory, header)
    with config_file(directory / CONFIG_FILE) as stored:
        config = _config(*_read_config(stored, spec, capture_layers), header, spec)
    _check_header(directory, config, header)
    shares = config.variant.head_size is None or not config.variant.own_embedding
    if shares and config.hidden_size != spec.hidden_size:
        raise ModelError(
            f"{directory}: it is {config.hidden_size} wide and shares head or embedding with the model, whose width is "
            f"{spec.hidden_size}"
        )
    return config


def _read_config(
    stored: Mapping[str, Any], spec: ModelSpec, capture_layers: Sequence[int] | None
) -> tuple[ConfigKeys, ConfigKeys, tuple[int, ...]]:
    """A draft's configuration, its layer's, and the target's layers that it takes."""
    whole = ConfigKeys(stored)
    layer = whole.section("transformer_layer_config") if _is_speculators(whole) else whole
    _refuse(whole, layer)
    _check_target(whole, layer, spec)
    layers = _stated_layers(whole, spec.num_layers) if capture_layers is None else tuple(capture_layers)
    if layers != tuple(sorted(set(layers))) or not all(0 <= number < spec.num_layers for number in layers):
        raise ModelError(
            f"takes the outputs of the layers {layers}, which must ascend from 0 to {spec.num_layers - 1}: "
            "speculation.capture_layers says which"
        )
    return whole, layer, layers


def _refuse(whole: ConfigKeys, layer: ConfigKeys) -> None:
    """Raises ``ModelError`` for what is not supported, by its name."""
    kinds = [*_architectures(whole.values), whole.text("speculators_model_type", "")]
    eagle, lower = whole.section("eagle_config"), " ".join(kinds).lower()
    if "peagle" in lower or eagle.values.get("parallel_draft_step", 1) != 1:
        raise ModelError("P-EAGLE and other parallel drafting is not supported")
    if "deepseek" in lower or layer.values.get("kv_lora_rank"):
        raise ModelError("a draft with multi-head latent attention (MLA) is not supported")
    if kinds[-1] not in ("", "eagle3") or "dflash" in lower or not eagle.flag("use_aux_hidden_state", default=True):
        raise ModelError(f"{', '.join(filter(None, kinds))}: not an EAGLE-3 draft")
    if (count := layer.number("num_hidden_layers", int, 1)) != 1:
        raise ModelError(f"a draft of {count} layers is not supported, only of one")
    if (activation := layer.text("hidden_act", "silu")) != "silu":
        raise ModelError(f"hidden_act {activation} is not supported, only silu")
    ConfigKeys({**whole.values, **layer.values}).refuse("quantization_config", "mlp_bias")


def _refuse_tensors(directory: Path, names: Collection[str]) -> None:
    reasons = {
        "mask_hidden": "P-EAGLE",
        "kv_a_proj": "multi-head latent attention (MLA)",
        "layers.1.": "several layers",
    }
    for sign, reason in reasons.items():
        if any(sign in name for name in names):
            raise ModelError(f"{directory}: a draft with {reason} is not supported")


def _stated_layers(whole: ConfigKeys, num_layers: int) -> tuple[int, ...]:
    """The layers whose outputs are taken, counted from 0.

    speculators, vLLM and NVIDIA write j for what there is after j layers, SpecForge and SGLang for the output of layer
    j. Only speculators' files say whose they are. In others the latter is meant where the first one is 1: SGLang takes
    them so, too.
    """
    stated = whole.ids(_LAYERS_KEY) or whole.section("eagle_config").ids(_LAYERS_KEY)
    if not stated:
        return 1, num_layers // 2 - 1, num_layers - 4
    counts_outputs = stated[0] == 1 and not _is_speculators(whole)
    return stated if counts_outputs else tuple(number - 1 for number in stated)


def _config(
    whole: ConfigKeys, layer: ConfigKeys, layers: tuple[int, ...], header: Header, spec: ModelSpec
) -> Eagle3Config:
    hidden, heads = layer.size("hidden_size"), layer.size("num_attention_heads")
    is_qwen3 = layer.text("model_type", "") == "qwen3"
    head_dim = layer.number("head_dim", int, 128 if is_qwen3 else hidden // heads)
    return Eagle3Config(
        target=_target_name(whole),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=layer.number("num_key_value_heads", int, heads),
        head_dim=head_dim,
        intermediate_size=layer.number("intermediate_size", int),
        capture_layers=layers,
        rms_norm_eps=layer.number("rms_norm_eps", float, 1e-6),
        vocab_size=layer.number("vocab_size", int, spec.vocab_size),
        num_target_layers=spec.num_layers,
        attention_bias=f"{_ATTENTION}q_proj.bias" in header,
        variant=_variant(whole, layer, header, head_dim),
    )


def _variant(whole: ConfigKeys, layer: ConfigKeys, header: Header, head_dim: int) -> Variant:
    def says(key: str) -> bool:
        return whole.flag(key, default=whole.section("eagle_config").flag(key))

    scaling = layer.section("rope_parameters", "rope_scaling")
    scaling.refuse("full_attention", "sliding_attention")
    slides = layer.values.get("layer_types") == ["sliding_attention"]
    head_rows = header.get(HEAD, ((), None))[0]
    return Variant(
        target_hidden_size=whole.optional("target_hidden_size", int),
        rope=read_rope(layer, scaling, head_dim),
        sliding_window=layer.number("sliding_window", int) if slides else None,
        qk_norm=f"{_ATTENTION}q_norm.weight" in header,
        feature_norms="each" if says("fc_norm") else "all" if says("norm_before_fc") else "none",
        norm_before_residual=says("norm_before_residual"),
        norm_output=says("norm_output"),
        head_size=head_rows[0] if head_rows else None,
        own_embedding=EMBEDDING in header,
        first_token_has_entry=False,
    )


def _check_header(directory: Path, config: Eagle3Config, header: Header) -> None:
    """Raises ``ModelError`` unless a draft has the tensors of its configuration, and no others that mean something."""
    variant, wanted = config.variant, dict(config.tensor_shapes())
    rest = {name: info for name, info in header.items() if not name.endswith(_UNUSED)}
    found = _take_network(directory, config, rest)
    for name, rows in ((HEAD, variant.head_size), (EMBEDDING, config.vocab_size if variant.own_embedding else None)):
        if rows is not None:
            wanted[name], found[name] = (rows, config.hidden_size), rest.pop(name)
    for name, rows in ((TARGET_OFFSETS, variant.head_size), (DRAFTED, config.vocab_size)):
        shape = rest.pop(name, ((rows,), None))[0]
        if shape != (rows,):
            raise ModelError(f"{directory}: {name} has the shape {shape}, must be {(rows,)}")
    if rest:
        raise ModelError(f"{directory}: nothing is known of a tensor {min(rest)}")
    if TARGET_OFFSETS not in header and variant.head_size not in (None, config.vocab_size):
        raise ModelError(f"{directory}: its head has {variant.head_size} tokens, but no {TARGET_OFFSETS} says which")
    check_tensors(directory, wanted, found)


def _take_network(directory: Path, config: Eagle3Config, header: Header) -> Header:
    """Takes the network's tensors out of a header; what ``parts_of`` makes of them, with type None for mixed ones."""
    network = Header()
    for name, parts in parts_of(config).items():
        missing = [part for part in parts if part not in header]
        if missing:
            raise ModelError(f"{directory}: no tensor {missing[0]}")
        shapes, kinds = zip(*(header.pop(part) for part in parts), strict=True)
        if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
            raise ModelError(f"{directory}: {', '.join(parts)} have the shapes {shapes}")
        network[name] = (sum(shape[0] for shape in shapes), *shapes[0][1:]), kinds[0] if len({*kinds}) == 1 else None
    return network


def _check_target(whole: ConfigKeys, layer: ConfigKeys, spec: ModelSpec) -> None:
    """Raises ``ModelError`` for a draft of a model with other sizes."""
    width = whole.number("target_hidden_size", int, layer.number("hidden_size", int))
    sizes = width, layer.number("vocab_size", int, spec.vocab_size)
    if sizes != (spec.hidden_size, spec.vocab_size):
        raise ModelError(
            f"is for {_target_name(whole)}, {sizes[0]} wide with {sizes[1]} tokens; this one is {spec.hidden_size} "
            f"wide with {spec.vocab_size} tokens"
        )


def _target_name(whole: ConfigKeys) -> str:
    return whole.section("speculators_config").section("verifier").text("name_or_path", "another model")


def _is_speculators(config: ConfigKeys) -> bool:
    return "speculators_model_type" in config.values


def _architectures(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []
