"""Logits of a model through the paged cache, against those of ``transformers``, an independent implementation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from evospec.engine.attention.base import AttentionSpec
from evospec.engine.attention.torch_paged import TorchPagedAttention
from evospec.engine.batch import ForwardBatch
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.decoder import TorchDecoder, load_model
from evospec.engine.models.registry import validate_model_files
from evospec.engine.models.weights import open_weights

BLOCK_SIZE = 16
MIN_MARGIN = 1e-4
"""A smaller gap between the two largest logits could be rounding, and equality luck."""
CPU = torch.device("cpu")


def int32(values: list[int] | list[list[int]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class PagedSequences:
    """Computes sequences step by step through the paged cache, blocks handed out in scattered order."""

    def __init__(self, model: TorchDecoder, sequences: list[list[int]]) -> None:
        spec = model.spec
        self.model, self.sequences = model, sequences
        self.num_computed = [0] * len(sequences)
        counts = [-(-len(tokens) // BLOCK_SIZE) for tokens in sequences]
        order = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)) + 1).tolist()
        self.blocks = [[order.pop() for _ in range(count)] for count in counts]
        self.attention = TorchPagedAttention(
            AttentionSpec(
                spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim, sum(counts) + 1, BLOCK_SIZE,
                model.embed_tokens.dtype, CPU, spec.attention_scale, spec.windows,
            )
        )  # fmt: skip

    def step(self, num_tokens: list[int]) -> list[torch.Tensor]:
        """Compute the next ``num_tokens[b]`` tokens of every sequence b; returns logits [n, vocab] of each."""
        token_ids, positions, slots, starts = [], [], [], [0]
        for tokens, blocks, start, count in zip(
            self.sequences, self.blocks, self.num_computed, num_tokens, strict=True
        ):
            for position in range(start, start + count):
                token_ids.append(tokens[position])
                positions.append(position)
                slots.append(blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            starts.append(len(token_ids))
        self.num_computed = [done + count for done, count in zip(self.num_computed, num_tokens, strict=True)]
        width = max(map(len, self.blocks))
        tables = [blocks + [0] * (width - len(blocks)) for blocks in self.blocks]
        batch = ForwardBatch(
            token_ids=int32(token_ids),
            positions=int32(positions),
            query_start_loc=int32(starts),
            seq_lens=int32(self.num_computed),
            block_tables=int32(tables),
            slot_mapping=int32(slots),
            logits_indices=torch.arange(len(token_ids)),
        )
        logits = self.model.compute_logits(self.model.forward(batch, self.attention).hidden[batch.logits_indices])
        return list(torch.split(logits, num_tokens))


def load(files: ModelFiles, dtype: torch.dtype = torch.float32) -> TorchDecoder:
    return load_model(open_weights(files), validate_model_files(files), dtype, CPU)


def logits_of(model: TorchDecoder, token_ids: list[int]) -> torch.Tensor:
    return PagedSequences(model, [token_ids]).step([len(token_ids)])[0]


def transformers_model(files: ModelFiles) -> Any:
    """The float32 model as ``transformers`` loads it; GGUF files are read by its own code."""
    if files.format == "gguf":
        return AutoModelForCausalLM.from_pretrained(files.path.parent, gguf_file=files.path.name, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)


def check_logits(files: ModelFiles, reference: Any, token_ids: list[int], atol: float) -> None:
    """Compare with ``reference``, of ``transformers``: within ``atol`` in float32; in bfloat16 not further from it than
    its own bfloat16 is, give or take a quarter."""
    in_bfloat16 = copy.deepcopy(reference).to(torch.bfloat16)
    assert in_bfloat16.dtype == torch.bfloat16
    with torch.inference_mode():
        exact = reference(torch.tensor([token_ids])).logits[0]
        rounded = in_bfloat16(torch.tensor([token_ids])).logits[0].float()
    torch.testing.assert_close(logits_of(load(files), token_ids), exact, atol=atol, rtol=0)
    narrow = logits_of(load(files, torch.bfloat16), token_ids)
    theirs = (rounded - exact).abs().mean()
    assert theirs > 0
    assert (narrow - exact).abs().mean() < 1.25 * theirs
    assert (narrow - rounded).abs().mean() < 1.5 * theirs


def check_greedy(reference: Any, prompts: list[list[int]], outputs: list[list[int]], num_tokens: int) -> None:
    """``reference`` would choose each of so many tokens after those before it."""
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output) == num_tokens
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + output[:-1]])).logits[0, -num_tokens:]
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > MIN_MARGIN, "choose prompts without near ties"
        assert output == logits.argmax(-1).tolist()
