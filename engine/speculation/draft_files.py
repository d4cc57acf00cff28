"""Which draft the configuration asks for, and whether its files fit the target. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from engine.config import EngineConfig, ModelConfig, SpeculationConfig
from engine.models.config import ModelError, ModelFiles, ModelSpec
from engine.models.eagle3_config import WEIGHTS_FILE, read_draft
from engine.models.registry import resolve_model, validate_model_files
from engine.text.tokenizer import Tokenizer

DRAFTS = Path(__file__).parents[2] / "drafts"
"""What is shipped: for each model a directory of its name."""

Method = Literal["none", "eagle3", "draft_model", "ngram"]


def choose_method(config: SpeculationConfig, model: str) -> tuple[Method, Path | None]:
    """What proposes tokens for ``model``, and the directory of its EAGLE-3 draft where that is one.

    Raises:
        ModelError: the options contradict each other.
    """
    method, shipped = config.method, DRAFTS / model
    if config.num_speculative_tokens == 0:
        return "none", None
    if method == "eagle3":
        return method, shipped if config.draft is None else Path(config.draft).expanduser()
    if method == "draft_model" and config.draft is None:
        raise ModelError("speculation.method draft_model needs a model: speculation.draft")
    if method != "auto":
        return method, None
    if config.draft is not None:
        raise ModelError("speculation.draft is set: say what it is by speculation.method, eagle3 or draft_model")
    return ("eagle3", shipped) if (shipped / WEIGHTS_FILE).is_file() else ("ngram", None)


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
    method, directory = choose_method(config.speculation, files.name)
    if directory is not None:
        read_draft(directory).check_target(spec, directory)
    if method == "draft_model":
        draft = draft_model_config(config, max_model_len)
        draft_files = resolve_model(draft)
        draft.longest_sequence(validate_model_files(draft_files))
        check_same_tokens(draft.name, Tokenizer.from_files(draft_files), Tokenizer.from_files(files))
