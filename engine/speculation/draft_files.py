"""Which draft the configuration asks for, and whether its files fit the target. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from evospec.engine.config import EngineConfig, ModelConfig
from evospec.engine.models.config import ModelError, ModelFiles, ModelSpec
from evospec.engine.models.eagle3_config import WEIGHTS_FILE, read_draft
from evospec.engine.models.eagle3_import import check_foreign_draft, is_foreign_draft
from evospec.engine.models.registry import REGISTRY, fetch_from_hub, is_hub_id, resolve_model, validate_model_files
from evospec.engine.text.tokenizer import Tokenizer

DRAFTS = Path(__file__).parents[2] / "drafts"
"""What is shipped: for each model a directory of its name."""

Method = Literal["none", "eagle3", "draft_model", "ngram", "grow"]
"""``grow``: an EAGLE-3 draft that the worker trains from the model's traffic; until it is worth while, copies."""


def choose_method(config: EngineConfig, files: ModelFiles) -> tuple[Method, Path | None]:
    """What proposes tokens for a model, and the directory of its EAGLE-3 draft where that is one, fetched if need be.

    Raises:
        ModelError: the options contradict each other, or the draft cannot be fetched.
    """
    speculation = config.speculation
    method, draft = speculation.method, speculation.draft
    if speculation.num_speculative_tokens == 0:
        return "none", None
    if method == "draft_model" and draft is None:
        raise ModelError("speculation.method draft_model needs a model: speculation.draft")
    if method == "none" or method == "draft_model" or method == "ngram":
        return method, None
    if draft is not None:
        directory = _eagle_directory(draft, config.model.cache_dir, is_known=method == "eagle3")
        return ("draft_model", None) if directory is None else ("eagle3", directory)
    shipped = None if method == "grow" else shipped_draft(files)
    if method != "eagle3" and shipped is None:
        return "grow" if config.must_learn and config.alignment.is_on else "ngram", None
    return "eagle3", shipped or DRAFTS / files.name


def shipped_draft(files: ModelFiles) -> Path | None:
    """The draft that is shipped for a model, or for one of its shape, of which it may be a fine-tune."""
    if (DRAFTS / files.name / WEIGHTS_FILE).is_file():
        return DRAFTS / files.name
    spec = validate_model_files(files)
    drafts = sorted(path.parent for path in DRAFTS.glob(f"*/{WEIGHTS_FILE}"))
    return next((draft for draft in drafts if read_draft(draft).fits(spec)), None)


def can_learn(config: EngineConfig, files: ModelFiles) -> bool:
    """Whether what drafts for a model is a network that alignment trains; raises as ``choose_method`` does."""
    _, directory = choose_method(config, files)
    return directory is not None and not is_foreign_draft(directory)


def _eagle_directory(draft: str, cache_dir: Path, is_known: bool) -> Path | None:
    """Where an EAGLE-3 draft is; None where ``draft`` names a model. ``is_known``: it is no model."""
    directory = Path(draft).expanduser()
    on_hub = draft not in REGISTRY and directory.suffix != ".gguf" and not directory.exists() and is_hub_id(draft)
    if on_hub:
        directory = fetch_from_hub(draft, None, cache_dir, ["*.json", WEIGHTS_FILE])
    if not (is_known or (directory / WEIGHTS_FILE).is_file() or is_foreign_draft(directory)):
        return None
    if on_hub:
        directory = fetch_from_hub(draft, None, cache_dir, ["*.json", "*.safetensors"])
        if not any(directory.glob("*.safetensors")):
            directory = fetch_from_hub(draft, None, cache_dir, ["*.json", "pytorch_model*.bin"])
    return directory


def draft_model_config(config: EngineConfig, max_model_len: int) -> ModelConfig:
    """The draft model of ``speculation.method`` draft_model, for sequences of up to so many tokens."""
    changes = {"name": config.speculation.draft, "served_name": None, "revision": None, "max_model_len": max_model_len}
    return config.model.model_copy(update=changes)


def check_same_tokens(name: str, draft: Tokenizer, target: Tokenizer) -> None:
    """Raise ``ModelError`` unless both models have the same tokens."""
    same = draft.vocab_size == target.vocab_size and all(
        draft.token_bytes(token_id) == target.token_bytes(token_id) for token_id in range(target.vocab_size)
    )
    if not same:
        raise ModelError(f"draft model {name} has other tokens than the target")


def check_draft(config: EngineConfig, files: ModelFiles, spec: ModelSpec, max_model_len: int) -> None:
    """See that there is a draft that fits the target, as far as headers and tokens tell; fetches a draft model.

    Raises:
        ModelError: the draft cannot be had, or does not fit.
    """
    method, directory = choose_method(config, files)
    has_own_head = directory is not None and _check_eagle(config, directory, spec)
    if method not in ("none", "ngram"):
        check_vocabulary(config.speculation.vocabulary, has_own_head)
    if method == "draft_model":
        draft = draft_model_config(config, max_model_len)
        try:
            draft_files = resolve_model(draft)
            draft.longest_sequence(validate_model_files(draft_files))
        except ModelError as error:
            raise ModelError(f"speculation.draft is no EAGLE-3 draft, and no model either: {error}") from error
        check_same_tokens(draft.name, Tokenizer.from_files(draft_files), Tokenizer.from_files(files))


def check_vocabulary(vocabulary: str, has_own_head: bool) -> None:
    """Raise ``ModelError`` for tails beside a core of all tokens."""
    core, _, slots = vocabulary.partition("+")
    if core == "dynamic:full" and slots != "0" and not has_own_head:
        raise ModelError(
            f"speculation.vocabulary {vocabulary} is for drafts with a head of their own: this one has all tokens, "
            "and dynamic:full+0 is a prior on them"
        )


def _check_eagle(config: EngineConfig, directory: Path, spec: ModelSpec) -> bool:
    """Whether it may have a head of its own; only the tensors of a ``.bin`` file tell."""
    layers = config.speculation.capture_layers
    if is_foreign_draft(directory):
        if config.must_learn:
            raise ModelError("alignment trains drafts of this project only, not those of others")
        draft = check_foreign_draft(directory, spec, layers)
        return draft is None or draft.variant.head_size is not None
    if layers is not None:
        raise ModelError("speculation.capture_layers is for drafts of other projects: this one says what it takes")
    read_draft(directory).check_target(spec, directory)
    return False
