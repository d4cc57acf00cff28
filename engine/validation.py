"""Whether an engine can serve what its configuration asks for, as far as files and options tell. Torch-free."""

from __future__ import annotations

from evospec.engine.config import EngineConfig
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.registry import resolve_model, validate_model_files
from evospec.engine.speculation.draft_files import check_draft


def validated_files(config: EngineConfig) -> ModelFiles:
    """The model's files, fetched if need be; nothing is loaded.

    Raises:
        ModelError: the model cannot be had or served, or shared by as many ranks, the draft does not fit it, or KV
            memory is too small for one sequence, whatever the machine has.
    """
    files = resolve_model(config.model)
    spec = validate_model_files(files)
    share = spec.share(config.runtime.tensor_parallel_size)
    longest = config.model.longest_sequence(spec)
    cache, num_bytes = config.cache, 4 if config.model.dtype == "float32" else 2
    if cache.num_blocks is None and cache.max_bytes is not None:
        # The smallest block that there may be: without a draft's part, and in two bytes a number where not in four.
        per_token = 2 * share.num_layers * share.num_kv_heads * share.head_dim * num_bytes
        cache.num_blocks_in(cache.max_bytes, per_token * cache.block_size, longest)
    check_draft(config, files, spec, longest)
    return files
