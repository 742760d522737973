"""The encoder layer around the attention: post-norm, residuals added once, and dropout."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from cases import ATTENTIONS, arrays, close, shaken, small_batch, small_config, small_model

from model import EncoderLayer


def layer_output(layer: EncoderLayer, x: torch.Tensor, mask=None) -> torch.Tensor:
    attention = layer.attention
    positions = attention.positions() if attention.has_positions else None
    return layer(x, mask, positions, [None] * layer.NUM_KEYS)


@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_a_layer_is_that_of_the_loops(attention_type):
    config = small_config(attention_type=attention_type)
    layer = shaken(EncoderLayer(config))
    x = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 6, [True, True, True, False, True, False]])
    actual = layer_output(layer, x, mask)
    for row in range(2):
        expected = reference.encoder_layer(
            arrays(layer), "", config.model_dump(), x[row].numpy(), mask[row].tolist()
        )
        close(actual[row][mask[row]], expected[mask[row].numpy()])


def test_both_blocks_add_their_input_once():
    """With zero blocks a layer is its two norms; a block's output is added once."""
    layer = shaken(EncoderLayer(small_config()))
    with torch.no_grad():
        for linear in (layer.attention.to_out, layer.contract):
            linear.weight.zero_()
            linear.bias.zero_()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    close(layer_output(layer, x), layer.feed_forward_norm(layer.attention_norm(x)))

    added = torch.randn(8, dtype=torch.float64)
    with torch.no_grad():
        layer.attention.to_out.bias.copy_(added)
        layer.contract.bias.copy_(2 * added)
    between = layer.attention_norm(x + added)
    close(layer_output(layer, x), layer.feed_forward_norm(between + 2 * added))


def dropped(before: torch.Tensor, after: torch.Tensor, p: float) -> torch.Tensor:
    """Return where `after` is 0; elsewhere it must be `before` scaled by 1 / (1 - p)."""
    zero = after == 0
    close(after[~zero], before[~zero] / (1 - p))
    return zero


def test_dropout_acts_on_embeddings_attention_hidden_and_output_but_on_no_residual():
    """Every layer and segment has masks of its own for each, with the given rate."""
    p = 0.4
    config = small_config(dropout=p, dim=64, ffn_dim=64, num_memory_tokens=8)
    model = small_model(config).train()
    seen = {}

    def record(name):
        return lambda _module, inputs, output: seen.setdefault(name, []).append((inputs[0], output))

    parts = ("", ".attention", ".attention_norm", ".expand", ".contract", ".feed_forward_norm")
    for number, layer in enumerate(model.layers):
        for part in parts:
            layer.get_submodule(part[1:]).register_forward_hook(record(f"{number}{part}"))
    model.embedding_norm.register_forward_hook(record("embedding"))
    model(small_batch(config, masks=None).tokens)

    masks, M = [], config.num_memory_tokens
    for t in range(config.num_segments):
        layer_input = seen["0"][t][0]
        masks.append(dropped(seen["embedding"][t][1], layer_input[:, M:], p))
        if t == 0:
            close(layer_input[:, :M], model.initial_memory(3))
        for number in range(config.num_layers):
            inputs = {part: seen[f"{number}{part}"][t][0] for part in parts}
            outputs = {part: seen[f"{number}{part}"][t][1] for part in parts}
            residuals = {
                ".attention_norm": (inputs[""], outputs[".attention"]),
                ".feed_forward_norm": (outputs[".attention_norm"], outputs[".contract"]),
            }
            for norm, (residual, block) in residuals.items():
                added = inputs[norm] - residual
                added = torch.where(added.abs() < 1e-12, 0, added)
                masks.append(dropped(block, added, p))
            hidden = torch.nn.functional.gelu(outputs[".expand"])
            masks.append(dropped(hidden, inputs[".contract"], p))
    counts = np.array([[mask.sum().item(), mask.numel()] for mask in masks])
    share = counts[:, 0] / counts[:, 1]
    assert (abs(share - p) < 5 * (p * (1 - p) / counts[:, 1]) ** 0.5).all()
    rows = [mask[:, -4:].flatten()[: 3 * 4 * 64].double() for mask in masks]  # of the tokens
    for i, a in enumerate(rows):
        for b in rows[:i]:
            same = float((a == b).double().mean())
            assert abs(same - (p**2 + (1 - p) ** 2)) < 5 * 0.5 / len(a) ** 0.5


def test_nothing_is_dropped_outside_training():
    tokens = small_batch(small_config()).tokens
    model, undropped = (small_model(small_config(dropout=p)) for p in (0.4, 0.0))
    close(model.eval()(tokens), undropped(tokens))
