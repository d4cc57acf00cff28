"""How long a sequence may be, and whether the KV cache can hold one. Torch-free."""

from __future__ import annotations

from engine.config import ModelConfig
from engine.models.config import ModelError, ModelSpec

_DEFAULT_MAX_MODEL_LEN = 8192


def max_model_len(config: ModelConfig, spec: ModelSpec) -> int:
    """Most tokens of a sequence, as configured or by default; raises ``ModelError`` if the model cannot have them."""
    limit, asked = spec.max_position_embeddings, config.max_model_len
    if asked is not None and asked > limit:
        raise ModelError(f"model.max_model_len is {asked}, but the model's limit is {limit}")
    return asked or min(limit, _DEFAULT_MAX_MODEL_LEN)


def num_blocks_in(budget: int, bytes_per_block: int, block_size: int, longest: int) -> int:
    """KV blocks in ``budget`` bytes; raises ``ModelError`` if they do not hold one sequence of ``longest`` tokens."""
    num_blocks = budget // bytes_per_block
    if num_blocks < -(-longest // block_size):
        raise ModelError(
            f"{budget / 2**20:.0f} MiB for the KV cache hold {num_blocks * block_size} tokens, but one sequence "
            f"may have {longest}: raise cache.max_bytes or lower model.max_model_len"
        )
    return num_blocks
