"""The compiled CPU kernels against plain float32 torch: packed products, paged attention, whole models."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import gguf.quants
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from evospec.engine.attention.base import AttentionSpec
from evospec.engine.attention.native_cpu import NativeAttention
from evospec.engine.attention.torch_paged import TorchPagedAttention
from evospec.engine.config import MAX_COPIED_TOKENS, MAX_SPECULATIVE_TOKENS, EngineConfig, RuntimeConfig
from evospec.engine.loader import load
from evospec.engine.models.config import ModelFiles
from evospec.engine.models.registry import validate_model_files
from evospec.engine.text.tokenizer import Tokenizer
from evospec.kernels import huge_pages, native, targets
from evospec.kernels.native import BF16_FORMAT, MatrixPart, PackedMatrix, Team, linear, linear_to_rows, packed_format
from tests.combinations import pairwise
from tests.native_models import check_model, hidden_by_position, random_tokens
from tests.ragged_batches import RaggedSequences, attention_spec, compare_backends, largest_row_error
from tests.tiny_models import make_directory, make_gguf

pytestmark = pytest.mark.skipif(native.unsupported_reason() is not None, reason=str(native.unsupported_reason()))

CPU = torch.device("cpu")
BLOCK_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"]
MAX_ROWS = 40
HALF_FIELDS = {"Q4_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)}
"""Offsets of half-precision scales in a block, of the types that ``gguf.quants`` can read but not make."""
PRODUCT_TOLERANCE = 2**-10
"""Of a product with quantised weights: root mean square of the error, against that of the output.

Measured: 3e-4 for Q4_K, Q6_K and IQ4_XS (half-precision scales), 4e-5
for the others (15-bit activations)."""
ONE_DIGIT_TOLERANCE = 2**-6
"""Measured: 5.6e-3 (8-bit activations), of a few numbers up to 1e-2."""
BF16_TOLERANCE = 1e-5
"""With bf16 weights nothing is rounded but float32 sums."""
ATTENTION_TOLERANCE = 1.5e-2
"""Of ``largest_row_error``: outputs and softmax weights are rounded to bf16 (relative 2^-9). Measured: 9e-3."""
SHAPE: dict[str, Any] = {"hidden_size": 128, "head_dim": 32}
"""Of the tiny models: the kernels want multiples of 32."""


@pytest.fixture(scope="module")
def teams() -> list[Team]:
    """Of one, two and three threads: what is expected of each is the same, and is computed once."""
    return [Team(threads) for threads in (1, 2, 3)]


@pytest.fixture(scope="module")
def two_threads(teams: list[Team]) -> Team:
    return teams[1]


def random_blocks(name: str, n: int, k: int) -> npt.NDArray[np.uint8]:
    """GGUF blocks [n, bytes]: a normal matrix quantised, or random codes with scales of normal size."""
    generator = np.random.default_rng(0)
    kind = GGMLQuantizationType[name]
    if name not in HALF_FIELDS:
        return gguf.quants.quantize(generator.standard_normal((n, k), np.float32), kind)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (n * k // values, size), np.uint8)
    for offset in HALF_FIELDS[name]:
        scales = generator.uniform(0.001, 0.01, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(n, -1)


def dequantized(name: str, blocks: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks, GGMLQuantizationType[name]))


def block_part(name: str, blocks: npt.NDArray[np.uint8], row_map: npt.NDArray[np.integer]) -> MatrixPart:
    return MatrixPart(row_map, int(GGMLQuantizationType[name]), blocks=blocks)


def random_input(rows: int, k: int) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16()


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    assert output.shape == expected.shape
    return float((output - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pairwise(name=BLOCK_TYPES, n=[7, 16, 50, 96, 129], biased=[False, True])
def test_product_with_quantized_weights(teams: list[Team], name: str, n: int, biased: bool) -> None:
    k = 512
    blocks = random_blocks(name, n, k)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)) * 10 if biased else None
    weight = PackedMatrix(n, k, [block_part(name, blocks, np.arange(n))], bias)
    assert weight.format == packed_format(int(GGMLQuantizationType[name])) != BF16_FORMAT
    exact = dequantized(name, blocks)
    for rows in range(1, MAX_ROWS + 1):
        x = random_input(rows, k)
        expected = torch.nn.functional.linear(x.float(), exact, bias)
        for team in teams:
            assert relative_error(linear(team, weight, x), expected) < PRODUCT_TOLERANCE, rows


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("n", [7, 16, 50, 96, 129])
def test_product_with_bf16_weights(teams: list[Team], n: int, biased: bool) -> None:
    k = 544
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n, k, generator=generator)
    bias = torch.randn(n, generator=generator) * 10 if biased else None
    weight = PackedMatrix(n, k, [MatrixPart(np.arange(n), values=values)], bias)
    for rows in range(1, MAX_ROWS + 1):
        x = random_input(rows, k)
        expected = torch.nn.functional.linear(x.float(), values.bfloat16().float(), bias)
        for team in teams:
            assert relative_error(linear(team, weight, x), expected) < BF16_TOLERANCE, rows


@pytest.mark.parametrize("rows", [1, 3, 4, 40])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_product_does_not_depend_on_the_number_of_threads(name: str, rows: int) -> None:
    n, k = 129, 512
    weight = PackedMatrix(n, k, [block_part(name, random_blocks(name, n, k), np.arange(n))])
    x = random_input(rows, k)
    one, two, three = (linear(Team(threads), weight, x) for threads in (1, 2, 3))
    assert torch.equal(one, two)
    assert torch.equal(one, three)


@pytest.mark.parametrize("n", [7, 50, 129])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_product_of_one_digit(teams: list[Team], name: str, n: int) -> None:
    k = 512
    blocks = random_blocks(name, n, k)
    weight = PackedMatrix(n, k, [block_part(name, blocks, np.arange(n))], digits=1)
    exact = dequantized(name, blocks)
    for rows in range(1, MAX_ROWS + 1):
        x = random_input(rows, k)
        expected = torch.nn.functional.linear(x.float(), exact)
        for team in teams:
            assert relative_error(linear(team, weight, x), expected) < ONE_DIGIT_TOLERANCE, rows


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize(("name", "header"), [("Q4_0", 2), ("Q4_1", 4), ("Q5_0", 2), ("Q8_0", 2)])
def test_sums_of_the_largest_codes_do_not_overflow(
    two_threads: Team, name: str, header: int, digits: int, sign: int
) -> None:
    """With AVX2 products of bytes are added in 16 bits. ``header``: a block's bytes before its codes."""
    n, k = 32, 96
    size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    blocks = random_blocks(name, n, k).reshape(-1, size)
    blocks[:, header:] = 127 if name == "Q8_0" else 255
    blocks = blocks.reshape(n, -1)
    weight = PackedMatrix(n, k, [block_part(name, blocks, np.arange(n))], digits=digits)
    x = torch.full((5, k), float(sign)).bfloat16()
    assert relative_error(linear(two_threads, weight, x), x.float() @ dequantized(name, blocks).T) < 1e-3


@pytest.mark.parametrize("digits", [1, 2])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_row_does_not_depend_on_its_neighbours(two_threads: Team, name: str, digits: int) -> None:
    """So verifying drafts gives the same bits as decoding one by one."""
    n, k, most = 129, 512, 130
    weight = PackedMatrix(n, k, [block_part(name, random_blocks(name, n, k), np.arange(n))], digits=digits)
    x = random_input(most, k)
    alone = torch.cat([linear(two_threads, weight, row) for row in torch.split(x, 1)])
    for rows in {*range(2, min(most, MAX_ROWS) + 1), most}:
        assert torch.equal(linear(two_threads, weight, x[:rows]), alone[:rows]), rows


def test_a_row_times_bf16_weights_does_not_depend_on_its_neighbours(two_threads: Team) -> None:
    """With AMX many rows are multiplied with eight blocks at a time, and their sums go to memory in between."""
    n, k, most = 96, 17 * 32, 600
    weight = PackedMatrix(n, k, [MatrixPart(np.arange(n), values=random_input(n, k).float())])
    x = random_input(most, k)
    alone = torch.cat([linear(two_threads, weight, row) for row in torch.split(x, 1)])
    for rows in (2, 32, 33, 48, 65, 512, most):
        assert torch.equal(linear(two_threads, weight, x[:rows]), alone[:rows]), rows


@pytest.mark.parametrize("name", ["Q8_0", None])
def test_a_product_of_no_rows_is_empty(two_threads: Team, name: str | None) -> None:
    """As where a step only computes a part of a prompt. (Where AMX is, it ended the process.)"""
    n, k = 96, 64
    of_blocks = [] if name is None else [block_part(name, random_blocks(name, n, k), np.arange(n))]
    parts = of_blocks or [MatrixPart(np.arange(n), values=torch.randn(n, k))]
    assert linear(two_threads, PackedMatrix(n, k, parts), random_input(0, k)).shape == (0, n)


def test_a_library_that_cannot_be_loaded_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an error: plain torch serves then."""
    library = tmp_path / "broken.so"
    library.write_bytes(b"\x7fELF of another world")
    monkeypatch.setattr(native, "best_target", lambda: SimpleNamespace(library=library, is_of_these_sources=True))
    assert "cannot be loaded" in (native.unsupported_reason() or "")


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_products_go_to_the_rows_named(two_threads: Team, rows: int) -> None:
    n, k = 96, 64
    weight = PackedMatrix(n, k, [block_part("Q8_0", random_blocks("Q8_0", n, k), np.arange(n))])
    x, targets = random_input(rows, k), torch.randperm(50)[:rows].int()
    out = torch.full((50, n), 7.0, dtype=torch.bfloat16)
    expected = out.index_copy(0, targets.long(), linear(two_threads, weight, x).bfloat16())
    linear_to_rows(two_threads, weight, x, targets, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-20, 1e30])
def test_few_rows_of_extreme_values(two_threads: Team, magnitude: float) -> None:
    n, k = 32, 96
    blocks = random_blocks("Q4_1", n, k)
    weight = PackedMatrix(n, k, [block_part("Q4_1", blocks, np.arange(n))])
    x = (random_input(2, k) * magnitude).bfloat16()
    expected = x.float() @ dequantized("Q4_1", blocks).T
    torch.testing.assert_close(linear(two_threads, weight, x), expected, rtol=1e-2, atol=1e-2 * magnitude + 1e-28)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_go_where_the_row_map_says(two_threads: Team, name: str) -> None:
    """Two parts, their rows scattered over one matrix, as gate and up are."""
    n, k = 80, 256
    order = np.random.default_rng(0).permutation(n)
    parts = [random_blocks(name, 48, k), random_blocks(name, 32, k)]
    maps = [order[:48], order[48:]]
    weight = PackedMatrix(n, k, [block_part(name, part, rows) for part, rows in zip(parts, maps, strict=True)])
    stacked = torch.cat([dequantized(name, part) for part in parts])
    expected_weight = torch.empty(n, k)
    expected_weight[torch.from_numpy(order)] = stacked
    for rows in (1, 5, 20):
        x = random_input(rows, k)
        assert relative_error(linear(two_threads, weight, x), x.float() @ expected_weight.T) < PRODUCT_TOLERANCE


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_k_of_an_odd_number_of_blocks(two_threads: Team, name: str) -> None:
    n, k = 33, 96
    blocks = random_blocks(name, n, k)
    weight = PackedMatrix(n, k, [block_part(name, blocks, np.arange(n))])
    for rows in (1, 2, 3, 4, 17, 33):
        x = random_input(rows, k)
        assert relative_error(linear(two_threads, weight, x), x.float() @ dequantized(name, blocks).T) < (
            PRODUCT_TOLERANCE
        )


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_a_matrix_packed_again_is_as_a_new_one(two_threads: Team, name: str) -> None:
    n, k = 80, 256
    rows, x = np.arange(n), random_input(5, k)
    blocks = random_blocks(name, n, k)
    first, second = (block_part(name, values, rows) for values in (blocks, np.ascontiguousarray(blocks[::-1])))
    weight = PackedMatrix(n, k, [first])
    before = linear(two_threads, weight, x)
    weight.repack([second])
    assert torch.equal(linear(two_threads, weight, x), linear(two_threads, PackedMatrix(n, k, [second]), x))
    weight.repack([first])
    assert torch.equal(linear(two_threads, weight, x), before)
    with pytest.raises(ValueError, match="format"):
        weight.repack([MatrixPart(rows, values=torch.zeros(n, k))])


def test_parts_of_different_formats_are_refused() -> None:
    parts = [block_part(name, random_blocks(name, 16, 256), np.arange(16)) for name in ("Q4_0", "Q8_0")]
    with pytest.raises(ValueError, match="cannot pack"):
        PackedMatrix(32, 256, parts)
    with pytest.raises(ValueError, match="k = 40"):
        PackedMatrix(16, 40, [MatrixPart(np.arange(16), values=torch.zeros(16, 40))])


STEPS = {
    "decode": [[40, 17, 16, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
    "prefill": [[40, 1, 16, 100]],
    "mixed": [[40, 17, 0, 3], [1, 1, 90, 0], [1, 20, 1, 1], [5, 5, 5, 5]],
    "long context": [[511, 512, 513, 1100], [1, 1, 1, 1], [9, 1, 2, 30]],
}


@pairwise(steps=STEPS, heads=[(2, 2), (9, 3), (14, 2)], head_dim=[32, 64, 128], block_size=[16, 64])
def test_attention(teams: list[Team], steps: str, heads: tuple[int, int], head_dim: int, block_size: int) -> None:
    sequences = RaggedSequences(4, 1152, block_size)
    spec = attention_spec(heads, head_dim, sequences, torch.bfloat16, CPU)
    backends = [NativeAttention(spec, team) for team in teams]
    reference = TorchPagedAttention(attention_spec(heads, head_dim, sequences, torch.float32, CPU))
    for output, expected in compare_backends(backends, reference, sequences, STEPS[steps]):
        assert largest_row_error(output, expected) < ATTENTION_TOLERANCE


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("sinks", [None, (-3.0, 0.0, 2.0, 4.0, 6.0, -1.0, 1.0, 3.0, 5.0)], ids=["no sinks", "sinks"])
def test_attention_within_a_window(
    teams: list[Team], steps: str, block_size: int, sinks: tuple[float, ...] | None
) -> None:
    """Each layer has its own; and products are scaled otherwise."""
    sequences = RaggedSequences(4, 1152, block_size)

    def spec(dtype: torch.dtype) -> AttentionSpec:
        shape = attention_spec((9, 3), 64, sequences, dtype, CPU, num_layers=4)
        return replace(shape, scale=0.2, windows=(1, 24, None, 600))

    backends = [NativeAttention(spec(torch.bfloat16), team) for team in teams]
    reference = TorchPagedAttention(spec(torch.float32))
    of_heads = None if sinks is None else torch.tensor(sinks)
    for output, expected in compare_backends(backends, reference, sequences, STEPS[steps], sinks=of_heads):
        assert largest_row_error(output, expected) < ATTENTION_TOLERANCE


@pytest.mark.parametrize("window", [None, 700])
def test_threads_share_the_keys_of_a_long_context(teams: list[Team], window: int | None) -> None:
    """Bit for bit what one thread computes: of one sequence with two KV heads there is too little else to do."""
    sequences = RaggedSequences(1, 3100, 16)
    spec = replace(attention_spec((6, 2), 64, sequences, torch.bfloat16, CPU), windows=(window, None))
    reference = TorchPagedAttention(replace(spec, dtype=torch.float32))
    backends = [NativeAttention(spec, team) for team in teams]
    outputs = []
    for output, expected in compare_backends(backends, reference, sequences, [[2040], [1], [5], [1000], [1]]):
        assert largest_row_error(output, expected) < ATTENTION_TOLERANCE
        outputs.append(output)
    for one, two, three in zip(outputs[::3], outputs[1::3], outputs[2::3], strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("heads", [(9, 3), (14, 2), (8, 1)])
def test_verifying_attends_as_decoding_does(two_threads: Team, heads: tuple[int, int], window: int | None) -> None:
    """Bit for bit: a token and all the drafts there can be at once, and one by one."""
    outputs = []
    count = 1 + MAX_SPECULATIVE_TOKENS
    for steps in ([[70, 3], [count, count]], [[70, 3]] + [[1, 1]] * count):
        sequences = RaggedSequences(2, 80, 16)
        spec = replace(attention_spec(heads, 64, sequences, torch.bfloat16, CPU), windows=(window, None))
        backend = NativeAttention(spec, two_threads)
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 80, count, 64, generator=generator) for count in (heads[0], heads[1], heads[1]))
        done, rows = [0, 0], []
        for counts in steps:
            backend.plan(sequences.step(counts))
            parts = [[(i, p) for p in range(done[i], done[i] + counts[i])] for i in range(2)]
            i, p = (torch.tensor(column) for column in zip(*(pair for part in parts for pair in part), strict=True))
            rows.append(
                torch.cat((i[:, None], p[:, None], backend.forward(0, q[i, p], k[i, p], v[i, p]).flatten(1)), 1)
            )
            done = [done[i] + counts[i] for i in range(2)]
        decoded = torch.cat(rows[1:])
        outputs.append(decoded[(decoded[:, 0] * 100 + decoded[:, 1]).argsort()])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", ["native", "torch"])
def test_what_is_no_number_stays_with_its_sequence(two_threads: Team, kind: str) -> None:
    """Its blocks go to another one, whose tokens do not fill them yet."""
    spec = attention_spec((4, 2), 32, RaggedSequences(1, 32, 16), torch.bfloat16, CPU)
    backend = NativeAttention(spec, two_threads) if kind == "native" else TorchPagedAttention(spec)

    def attended(count: int, bad: float | None) -> torch.Tensor:
        backend.plan(RaggedSequences(1, 32, 16).step([count]))
        q, k, v = (torch.randn(count, heads, 32).bfloat16() for heads in (4, 2, 2))
        if bad is not None:
            k[9], v[9] = bad, bad
        return backend.forward(0, q, k, v)

    for bad in (torch.nan, torch.inf, -torch.inf):
        attended(20, bad)
        assert attended(3, None).isfinite().all()


@pytest.mark.parametrize("stored", ["F32", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_model(teams: list[Team], architecture: str, stored: str, tmp_path: Path) -> None:
    """Q5_1 has no packed format and is kept as bf16."""
    directory = make_directory(tmp_path / "model", architecture, **SHAPE)
    files = make_gguf(tmp_path / "model.gguf", directory.path, GGMLQuantizationType[stored])
    check_model(files, random_tokens(100), teams)


def test_smollm2(two_threads: Team, smollm2_path: Path) -> None:
    files = ModelFiles("smollm2-135m", smollm2_path, "gguf")
    text = "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n"
    check_model(files, Tokenizer.from_files(files).encode(text), [two_threads])


@pytest.mark.parametrize("prompt", [0, 64])
def test_a_token_is_the_same_in_any_step(two_threads: Team, prompt: int, tmp_path: Path) -> None:
    """Bit for bit, of prompts and decoded: at once, in pieces, and token by token; so no batch changes a rounding."""
    directory = make_directory(tmp_path / "model", "llama", **SHAPE)
    files = make_gguf(tmp_path / "model.gguf", directory.path, GGMLQuantizationType.Q4_1)
    at_once = hidden_by_position(files, two_threads, [[60, 45]], prompt)
    assert torch.equal(hidden_by_position(files, two_threads, [[31, 0], [29, 40], [0, 5]], prompt), at_once)
    assert torch.equal(hidden_by_position(files, two_threads, [[1, 1]] * 45 + [[1, 0]] * 15, prompt), at_once)


@pytest.mark.parametrize("digits", [1, 2])
def test_a_decoded_token_is_the_same_with_drafts_and_beside_a_prompt(
    two_threads: Team, digits: int, tmp_path: Path
) -> None:
    directory = make_directory(tmp_path / "model", "llama", **SHAPE)
    files = make_gguf(tmp_path / "model.gguf", directory.path, GGMLQuantizationType.Q4_1)
    most = 1 + MAX_COPIED_TOKENS
    alone = [[20, 0], *[[1, 0]] * (most + 4), [0, 20], *[[0, 1]] * 9]
    in_company = [[20, 0], [4, 20], [most, 9]]
    hidden = [hidden_by_position(files, two_threads, steps, 20, digits) for steps in (alone, in_company)]
    assert torch.equal(*hidden)


@pytest.mark.parametrize("bits", ["8", "15"])
def test_activations_have_the_bits_that_are_asked_for(bits: Literal["8", "15"], tmp_path: Path) -> None:
    files = make_gguf(tmp_path / "model.gguf", make_directory(tmp_path / "model", **SHAPE).path)
    config = EngineConfig(runtime=RuntimeConfig(device="cpu", activation_bits=bits, threads=1))
    digits = load(config, files, validate_model_files(files)).digits
    assert digits == {"8": 1, "15": 2}[bits]


def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an update without a build: its structures may be laid out otherwise."""
    monkeypatch.setattr(targets, "sources_hash", lambda: "others")
    assert "other sources" in str(native.unsupported_reason())
    with pytest.raises(RuntimeError, match="other sources"):
        Team(1)


def test_memory_is_found_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 999)  # as a kernel without them takes it
    assert not huge_pages.huge_zeros(64 * 2**20).any()


@given(st.lists(st.integers(1, 3 * 2**20), min_size=1, max_size=40))
def test_pieces_of_huge_pages_are_zeros_of_their_own(sizes: list[int]) -> None:
    pieces = [huge_pages.huge_zeros(size) for size in sizes]
    for number, (piece, size) in enumerate(zip(pieces, sizes, strict=True), 1):
        assert len(piece) == size
        assert piece.data_ptr() % 64 == 0
        assert not piece.any()
        piece.fill_(number)
    assert all(bool((piece == number).all()) for number, piece in enumerate(pieces, 1))


def test_in_a_process_of_its_own_what_once_ended_one() -> None:
    """Equal infinities, as where penalties overflow, are cut: it went on for ever. And a draft that is no number drafts
    something: it read a table eight gigabytes before its beginning.
    """
    code = [sys.executable, "-c", _INFINITE_AND_NO_NUMBERS]
    result = subprocess.run(code, capture_output=True, text=True, timeout=120, check=True)
    threshold, *lines = result.stdout.splitlines()
    assert threshold == "inf"
    drafted = [json.loads(line) for line in lines]
    assert len(drafted) == 4
    for tokens, levels in drafted:
        assert all(token >= 0 for row in tokens for token in row)
        assert all(0 <= level < 16 for row in levels for level in row)


_INFINITE_AND_NO_NUMBERS = """
import itertools, json
import numpy as np, torch
from evospec.kernels.native import MatrixPart, PackedMatrix, Team
from evospec.kernels.choose_tokens import RowSampling
from evospec.kernels.native_chain import ChainBatch, NativeChain, StopRule, UnreadTokens
from evospec.kernels.native_decoder import Decoder, KvCache, LayerWeights
from evospec.kernels.kept_thresholds import Limits
from tests.native_calls import kept_thresholds

limits = Limits(*(torch.tensor([value], dtype=kind) for value, kind in
                  ((40, torch.int32), (1.0, torch.float64), (0.0, torch.float64))))
print(kept_thresholds(torch.full((1, 300), torch.inf), torch.ones(1), limits).item())

H, V, D = 64, 128, 32
team = Team(1)

def matrix(n, k):
    return PackedMatrix(n, k, [MatrixPart(np.arange(n), values=torch.randn(n, k) / 8)])

layer = LayerWeights(
    qkv=[matrix(4 * D, 2 * H)], output=matrix(H, 2 * D), mlp=(matrix(2 * H, H), matrix(H, H)),
    input_norm=torch.ones(H), mlp_norm=torch.ones(H), cos_sin=torch.rand(64, D), embedding_norm=torch.ones(H),
)
decoder = Decoder(
    team, hidden=H, intermediate=H, heads=2, kv_heads=1, head_dim=D, norm_eps=1e-5,
    layers=[layer],
)
embedding, cache = matrix(V, H), KvCache(1, 4, 16, 1, D)
chain = NativeChain(team, decoder, torch.ones(H), embedding, embedding, embedding, cache, None, None, None, 16)
for value, temperature in itertools.product((torch.nan, torch.inf), (0.0, 0.8)):
    g = torch.randn(1, H).bfloat16()
    g[0, 3] = value
    sampling = RowSampling([temperature], [1], [0], [1.0], [0.0]) if temperature else None
    stop = StopRule(np.full((1, 2, 16), 0.9, np.float32), [0.0] * 4, 0.01)
    batch = ChainBatch(
        [4], [5], np.array([[1, 2]], np.int32), sampling, stop=stop, tenants=[0], acceptance=[[0.9] * 4]
    )
    result = chain.run(batch, UnreadTokens([7], [5], [21], [0, 1], [6], [0], g))
    print(json.dumps([result.tokens, result.confidence]))
"""
