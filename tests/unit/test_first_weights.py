"""What a draft's training begins with: the target's last layer, whatever the sizes of its features."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from evospec.adapters.training.first_weights import fit_to_features, init_from_target
from evospec.engine.models.eagle3 import Eagle3
from evospec.engine.models.eagle3_config import Eagle3Config
from evospec.engine.models.registry import validate_model_files
from evospec.engine.models.weights import open_weights
from evospec.kernels.between_products import rms_norm
from tests.tiny_models import make_directory


def test_training_starts_from_the_targets_last_layer(tmp_path: Path) -> None:
    files = make_directory(tmp_path / "model", "qwen2")  # with biases
    spec, weights = validate_model_files(files), open_weights(files)
    draft = Eagle3(Eagle3Config.for_target(spec, files.name, (0, 1, 2), spec.intermediate_size))
    init_from_target(draft, weights.dequantized, spec)
    prefix = f"model.layers.{spec.num_layers - 1}."

    def layer(name: str) -> torch.Tensor:
        return weights.dequantized(prefix + name)

    g = torch.randn(7, spec.hidden_size)
    x = rms_norm(g, layer("input_layernorm.weight"), spec.rms_norm_eps)
    for ours, name in zip(draft.qkv(torch.zeros_like(g), g), "qkv", strict=True):
        expected = F.linear(x, layer(f"self_attn.{name}_proj.weight"), layer(f"self_attn.{name}_proj.bias"))
        torch.testing.assert_close(ours.flatten(-2), expected)


def test_features_of_any_sizes_are_read_as_the_targets_last_layer_reads_them(tmp_path: Path) -> None:
    files = make_directory(tmp_path / "model", "qwen3")  # with norms of queries and keys
    spec, weights = validate_model_files(files), open_weights(files)
    draft = Eagle3(Eagle3Config.for_target(spec, files.name, (0, 1, 2), spec.intermediate_size))
    init_from_target(draft, weights.dequantized, spec)
    high = torch.randn(50, spec.hidden_size) * torch.logspace(0, 4, spec.hidden_size)
    high *= 100 / high.square().mean(1, keepdim=True).sqrt()
    features = torch.cat((torch.zeros(50, 2 * spec.hidden_size), high), dim=1)
    fit_to_features(draft, features)
    g = draft.fuse(features)
    torch.testing.assert_close(g.square().mean(0), torch.ones(spec.hidden_size))

    prefix = f"model.layers.{spec.num_layers - 1}."
    x = rms_norm(high, weights.dequantized(prefix + "input_layernorm.weight"), spec.rms_norm_eps)
    for ours, name in zip(draft.qkv(torch.zeros_like(g), g), "qkv", strict=True):
        expected = F.linear(x, weights.dequantized(f"{prefix}self_attn.{name}_proj.weight")).view_as(ours)
        if name != "v":
            expected = rms_norm(expected, weights.dequantized(f"{prefix}self_attn.{name}_norm.weight"), 1e-6)
        else:  # the norm of g is not quite that of the features: one factor a position
            ours, expected = F.normalize(ours.flatten(1)), F.normalize(expected.flatten(1))
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
