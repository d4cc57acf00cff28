"""Logits of tiny models against ``transformers``; prefill in pieces; batches of mixed lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file

from evospec.engine.models.config import ModelError
from evospec.engine.models.decoder import TorchDecoder
from evospec.engine.models.registry import validate_model_files
from evospec.engine.models.weights import ALL, open_weights
from tests.reference_logits import PagedSequences, check_logits, load, logits_of, transformers_model
from tests.tiny_models import VOCAB_SIZE, make_directory, make_gguf

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TorchDecoder:
    return load(make_directory(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_gguf_logits_agree_with_transformers(architecture: str, stored: str, tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "model", architecture)
    files = make_gguf(tmp_path / "model.gguf", directory.path, GGMLQuantizationType[stored])
    check_logits(files, transformers_model(files), random_tokens(100), atol=3e-5)


def test_llama3_rope_scaling_agrees_with_transformers(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "scaled", rope_scaling=LLAMA3_ROPE)
    token_ids = random_tokens(200)
    check_logits(directory, transformers_model(directory), token_ids, atol=3e-5)
    stored = make_gguf(tmp_path / "scaled.gguf", directory.path)
    torch.testing.assert_close(
        logits_of(load(stored), token_ids), logits_of(load(directory), token_ids), atol=3e-5, rtol=0
    )
    plain = make_directory(tmp_path / "plain")
    assert (logits_of(load(plain), token_ids) - logits_of(load(directory), token_ids)).abs().max() > 0.1


@pytest.mark.parametrize("chunks", [[1] * 70, [16, 16, 16, 16, 6], [69, 1], [1, 69], [33, 37]])
def test_prefill_in_chunks_gives_the_same_logits(tiny: TorchDecoder, chunks: list[int]) -> None:
    token_ids = random_tokens(70)
    sequences = PagedSequences(tiny, [token_ids])
    pieces = torch.cat([sequences.step([count])[0] for count in chunks])
    torch.testing.assert_close(pieces, logits_of(tiny, token_ids), atol=3e-5, rtol=0)


def test_batch_of_mixed_lengths_gives_each_sequence_its_own_logits(tiny: TorchDecoder) -> None:
    """Prefills, plain decodes, several tokens at once (as with drafts), and sequences that sit out a step."""
    token_ids = [random_tokens(length, seed) for seed, length in enumerate((40, 17, 5, 90, 33))]
    sequences = PagedSequences(tiny, token_ids)
    steps = [[30, 16, 1, 50, 0], [1, 1, 1, 35, 20], [1, 0, 1, 1, 1], [5, 0, 2, 4, 5], [3, 0, 0, 0, 7]]
    pieces = [sequences.step(counts) for counts in steps]
    for index, tokens in enumerate(token_ids):
        together = torch.cat([step[index] for step in pieces])
        torch.testing.assert_close(together, logits_of(tiny, tokens), atol=3e-5, rtol=0)


def test_rejected_drafts_leave_no_trace(tiny: TorchDecoder) -> None:
    """Keys and values written for tokens that are not kept are overwritten by the tokens that are."""
    wrong, right = random_tokens(40), random_tokens(40)[:30] + random_tokens(10, seed=1)
    sequences = PagedSequences(tiny, [wrong])
    sequences.step([40])
    sequences.sequences, sequences.num_computed = [right], [30]
    torch.testing.assert_close(sequences.step([10])[0], logits_of(tiny, right)[30:], atol=3e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_quantized_blocks_are_the_dequantized_weights(architecture: str, tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "model", architecture)
    original = open_weights(directory)
    stored = open_weights(make_gguf(tmp_path / "model.gguf", directory.path, GGMLQuantizationType.Q8_0))
    for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        name = f"model.layers.1.{module}.weight"
        quantized = stored.quantized(name)
        assert quantized is not None
        assert quantized.type == GGMLQuantizationType.Q8_0
        values = torch.from_numpy(dequantize(quantized.blocks(ALL), quantized.type))
        torch.testing.assert_close(values, stored.dequantized(name), atol=0, rtol=0)
        torch.testing.assert_close(values, original.dequantized(name), atol=0.01, rtol=0)
    assert stored.quantized("model.norm.weight") is None
    assert original.quantized("model.norm.weight") is None


def test_unknown_tensor_is_an_error(tmp_path: Path) -> None:
    directory = make_directory(tmp_path / "model")
    for files in (directory, make_gguf(tmp_path / "model.gguf", directory.path)):
        with pytest.raises(ModelError, match=r"no tensor 'model\.layers\.9"):
            open_weights(files).dequantized("model.layers.9.mlp.up_proj.weight")
        with pytest.raises(ModelError, match="no tensor 'lm_tail"):
            open_weights(files).quantized("lm_tail.weight")


def test_files_that_change_after_they_were_validated_are_refused(tmp_path: Path) -> None:
    """Before their weights are read, and while they are."""
    files, name = make_directory(tmp_path / "model"), "model.layers.1.mlp.up_proj.weight"
    validate_model_files(files)
    path = files.path / "model.safetensors"
    whole, sources = path.read_bytes(), [open_weights(files) for _ in range(2)]
    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path)
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor '{name}' cannot be read any more"):
        sources[0].dequantized(name)
    with pytest.raises(ModelError, match=f"tensor '{name}' is missing"):
        open_weights(files)
    path.unlink()
    with pytest.raises(ModelError, match=rf"model\.safetensors: tensor '{name}' cannot be read any more"):
        sources[1].dequantized(name)
    path.write_bytes(whole)
    assert open_weights(files).dequantized(name).isfinite().all()
