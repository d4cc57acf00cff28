"""Compiles every Triton kernel for GPUs that are not there: ``python -m tests.compiled_triton each 80 90 100``.

In a process of its own, in which Triton does not interpret. ``each`` takes the first configuration of each kernel, and
``every`` all of them. Prints a line for each that was compiled: generation, kernel, bytes, and how many loads it begins
before it needs them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evospec.engine.models.config import Activation
from evospec.kernels.session_options import PRESENCE
from evospec.kernels.triton import (
    batched_lora,
    between_products,
    draft_head,
    fp8,
    gumbel_argmax,
    int4,
    kept_thresholds,
    logits_edits,
    session_prior,
    text_repeats,
    topk,
)

FIRST_WITH_FP8 = 89
WIDTHS = {"width", "num_inputs", "num_outputs", "x_stride", "out_stride", "num_blocks"}
"""Arguments that are multiples of 16 where models are, which a launch tells the compiler, as that pointers are."""
Configuration = tuple[Any, dict[str, str], dict[str, Any]]
"""A kernel, the types of its arguments, and its constants, among them maybe ``num_warps``."""


def configurations(generation: int) -> Iterator[Configuration]:
    """All that the product launches on a generation of GPUs, on models in bfloat16."""
    numbers = {"stride": "i32", "columns": "i32", "num_rows": "i32", "num_columns": "i32", "width": "i32"}
    numbers |= {"key_stride": "i32", "num_slots": "i32", "first_column": "i32", "num_values": "i32", "rank": "i32"}
    numbers |= {"out_stride": "i32", "x_stride": "i32", "num_inputs": "i32", "num_outputs": "i32"}
    scores = {"logits": "*fp32", "temperatures": "*fp32", "keys": "*i64", "least": "*fp32"}
    of_gumbel = scores | {"token_ids": "*i32", "best_scores": "*fp32", "best_ids": "*i32"} | numbers
    for ids, least in product((False, True), repeat=2):
        has = {"HAS_IDS": ids, "HAS_LEAST": least, "BLOCK": 1024, "NUM_BLOCKS": 8}
        yield gumbel_argmax._gumbel_argmax_kernel, of_gumbel, has
    edits = {"rows": "*i64", "ends": "*i64", "token_ids": "*i64", "factors": "*fp32", "addends": "*fp32"}
    yield logits_edits._edit_kernel, scores | numbers | edits, {"BLOCK": 1024}
    yield logits_edits._mask_kernel, scores | numbers | {"allowed": "*i32"}, {"BLOCK": 1024}
    for rows, best in product((False, True), (2, 16)):
        has = {"HAS_ROWS": rows, "BEST": best, "BLOCK": 1024}
        yield topk._best_kernel, scores | numbers | {"rows": "*i64"}, has
    limits = {"top_k": "*i32", "top_p": "*fp64", "min_p": "*fp64", "suffices": "*i1", "values": "*fp32"}
    for values in (64, 1024):
        yield kept_thresholds._thresholds_kernel, scores | limits | numbers, {"VALUES": values, "BLOCK": 1024}
    head = {"hidden": "*bf16", "head": "*bf16", "tail_rows": "*bf16", "tail_ids": "*i32", "slabs": "*i32"} | numbers
    for best in (2, 64):
        of_core = {"BEST": best, "WIDTH": 32, "ROWS": 16, "COLUMNS": 256}
        yield draft_head._core_kernel, head | scores, of_core
        yield draft_head._tail_kernel, head | scores, {"BEST": min(best, 32), "WIDTH": 256, "SLOTS": 32}
    for weights, rank in product(("*bf16", "*fp32"), (8, 16, 32)):
        lora = {"out": "*bf16", "x": "*bf16", "a": weights, "b": weights, "slots": "*i32"} | numbers
        yield (
            batched_lora._lora_kernel,
            lora,
            {"RANK": rank, "INPUTS": 8192 // rank, "OUTPUTS": 8192 // rank, "SHARE": 2048},
        )
    yield from _of_layers()
    if generation >= FIRST_WITH_FP8:
        of_rows = {"x": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32", "largest": "fp32", "smallest": "fp32"}
        yield fp8._quantize_kernel, numbers | of_rows | {"size": "i32"}, {"BLOCK": 2048}
    blocks = numbers | {"x": "*bf16", "codes": "*u8", "scales": "*i32", "out": "*bf16"}
    blocks |= {"num_tokens": "i32", "num_blocks": "i32"}
    for height in (64, 32):
        yield int4._int4_kernel, blocks, {"TOKENS": 32, "ROWS": height, "BLOCKS": 8, "num_warps": 8}
    yield int4._expand_kernel, blocks, {"BLOCKS": 256}
    yield from _of_priors(numbers | scores | {"hidden": "*bf16", "head": "*bf16"})


def _of_layers() -> Iterator[Configuration]:
    types = dict.fromkeys(("size", "parts", "stride", "num_queries", "num_keys", "dim", "rotary"), "i32")
    types |= dict.fromkeys(("x", "added", "total", "out", "product", "q_out", "k_out"), "*bf16")
    types |= {"eps": "fp32", "slope": "fp32", "limit": "fp32", "positions": "*i32", "cos_sin": "*fp32"}
    launched = (True, True, True), (True, True, False), (True, False, True), (False, False, True)
    for weights in ("*fp32", "*bf16"):
        types |= dict.fromkeys(("added_weight", "weight", "q_weight", "k_weight"), weights)
        for has_added, norms_added, has_out in launched:
            has = {"HAS_ADDED": has_added, "NORMS_ADDED": norms_added, "HAS_OUT": has_out}
            yield between_products._norm_kernel, dict(types), has | {"BLOCK": 4096}
        for has_norms, has_rotary in product((True, False), repeat=2):
            has = {"HAS_NORMS": has_norms, "HAS_ROTARY": has_rotary}
            yield between_products._heads_kernel, dict(types), has | {"BLOCK": 128}
    for activation in get_args(Activation):
        yield between_products._gate_kernel, types, {"ACTIVATION": activation, "BLOCK": 1024}


def _of_priors(types: dict[str, str]) -> Iterator[Configuration]:
    types |= dict.fromkeys(("drafts_stride", "feature_stride", "capacity", "num_buckets", "num_drafts", "vocab"), "i32")
    types |= {"num_edges": "i32", "factor": "i64", "states": "*fp64"}
    types |= {"pair_keys": "*i64", "triple_keys": "*i64", "offsets": "*i64"}
    integers = (
        "found_tokens",
        "tokens",
        "row_of",
        "drafts",
        "texts",
        "text_tokens",
        "previous",
        "latest",
        "sizes",
        "best",
    )
    types |= dict.fromkeys((*integers, "sessions", "last", "pair_tokens", "triple_tokens", "edges"), "*i32")
    numbers = "found_logits", "features", "weights", "unigrams", "pair_counts", "triple_counts", "edge_values"
    types |= dict.fromkeys(numbers, "*fp32")
    for has_row_of in (False, True):
        yield text_repeats._repeats_kernel, types, {"HAS_ROW_OF": has_row_of, "COLUMNS": 64, "WIDTH": 128}
    tables = {"PAIR_ROWS": 2048, "PAIR_WIDTH": 16, "PAIR_SHIFT": 56}
    tables |= {"TRIPLE_ROWS": 8192, "TRIPLE_WIDTH": 4, "TRIPLE_SHIFT": 54}
    for order, edges in product((3, 2, 1), (16, 0)):
        sizes: dict[str, Any] = {"PRESENCE": PRESENCE, "ORDER": order, "EDGES": edges, "COLUMNS": 64}
        yield session_prior._prior_kernel, types | {"scores": "*fp32"}, sizes | tables


def main() -> None:
    which, *generations = sys.argv[1:]
    for generation in map(int, generations):
        chosen = list(configurations(generation))
        if which == "each":
            chosen = list({kernel.__name__: (kernel, *rest) for kernel, *rest in reversed(chosen)}.values())
        for kernel, types, constants in chosen:
            names, options = kernel.arg_names, {"num_warps": constants.get("num_warps", 4)}
            constants = {name: value for name, value in constants.items() if name in names}
            signature = {name: "constexpr" if name in constants else types[name] for name in names}
            places = {(names.index(name),): value for name, value in constants.items()}
            aligned = (place for place, name in enumerate(names) if signature[name][0] == "*" or name in WIDTHS)
            attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
            source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
            compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
            num_ahead = compiled.asm["ptx"].count("cp.async.cg")
            print(generation, kernel.__name__, len(compiled.asm["cubin"]), num_ahead, flush=True)


if __name__ == "__main__":
    main()
