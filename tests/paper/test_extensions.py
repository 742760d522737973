"""Extensions, off by default: neighbors, token mixer, intensity pooling, read-out norm, Muon."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import close, shaken, small_batch, small_config, small_model

from attention.equations import feature_map
from attention.token_mixer import ImageConvolution
from model import build_model
from readout import intensity, recompute_statistics
from training.gradients import amrb_backward, bptt_backward
from training.optimizer import build_optimizers

NEIGHBORS = {"basis_init": "neighbors", "position_embedding": "none", "decay_scale": 4.0}
IMAGE = {"dataset": "cifar10", "max_seq_len": 1024, "num_segments": 2}


# ---- neighbor initialization ---------------------------------------------------------------------


@pytest.mark.parametrize(("S", "digits"), [(16, 2), (12, 2), (27, 3)])
@pytest.mark.parametrize("offsets", [[-4, 1], [-1, 3, 2, -2]], ids=str)
def test_each_head_first_copies_the_token_at_its_offset(offsets, S, digits):
    M, heads = 2, 2
    config = small_config(
        **NEIGHBORS, dim=64, num_heads=heads, num_hidden=S, max_seq_len=2 * S, num_segments=2,
        num_memory_tokens=M, num_layers=2, neighbor_offsets=offsets, neighbor_code_digits=digits,
    )
    torch.manual_seed(0)
    model = build_model(config)
    rows = model.embedding_norm(model.position_code)[None]  # (1, S, D), of no token
    x = torch.cat([model.memory[None], rows], dim=1)
    for index in range(2 * heads):  # the heads of both layers
        attention, head = model.layers[index // heads].attention, index % heads
        offset = offsets[index % len(offsets)]
        q, _, _ = attention.project(x)
        weights = feature_map(q[0, head]) @ attention.positions()[head].T  # row by key
        weights = weights / weights.sum(dim=1, keepdim=True)
        expected = torch.zeros(M + S, M + S)
        for i in range(S):
            expected[M + i, M + (i + offset) % S] = 1
        expected[:M] = expected[-1]  # memory rows read as the last row does
        assert (weights - expected).abs().sum(dim=1).max() < 0.5  # disjoint rows have 2


@pytest.mark.parametrize("positions", ["none", "learned"])
def test_the_position_code_passes_every_layer_in_features_of_its_own(positions):
    config = small_config(
        **NEIGHBORS | {"position_embedding": positions}, dim=24, max_seq_len=20, num_segments=2,
        num_hidden=10,
    )
    torch.manual_seed(0)
    model = build_model(config)
    used = torch.arange(24) < config.position_code_width
    first, second = (model._position_embedding(t, 10) for t in (0, 1))
    assert first[:, used].equal(second[:, used]) and len(first[:, used].unique(dim=0)) == 10
    assert first[:, ~used].equal(second[:, ~used]) == (positions == "none")
    assert not model.token_embedding.weight[:, used].any()
    assert model.token_embedding.weight[1:, ~used].all()
    x = torch.randn(2, 12, 24)
    x[..., used] = 1.5
    for layer in model.layers:
        y = layer(x, None, None, [None] * 3)[..., used]  # scaled by the norms, otherwise unchanged
        assert torch.allclose(y, y[..., :1].expand_as(y), atol=1e-5)
        values = layer.attention.to_qkv.weight.tensor_split(3)[2]
        assert not values[-24:, used].any()


# ---- token mixer ---------------------------------------------------------------------------------


def test_the_token_mixer_is_a_residual_convolution_of_the_pixels_only():
    mixer = shaken(ImageConvolution(3, num_memory_tokens=2, image_width=4))
    x = torch.randn(2, 2 + 12, 3, dtype=torch.float64)
    y = mixer(x)
    assert y[:, :2].equal(x[:, :2])
    image = F.pad(x[:, 2:].reshape(2, 3, 4, 3), (0, 0, 1, 1, 1, 1))  # rows, columns, features
    kernel, bias = mixer.convolution.weight[:, 0], mixer.convolution.bias  # (3, 3, 3)
    for row in range(3):
        for column in range(4):
            patch = image[:, row : row + 3, column : column + 3]
            mixed = torch.einsum("bijd,dij->bd", patch, kernel) + bias
            close(y[:, 2 + 4 * row + column], x[:, 2 + 4 * row + column] + F.gelu(mixed))


def test_without_the_token_mixer_a_model_is_the_same_bit_for_bit():
    logits = []
    for changes in ({}, {"token_mixer": "none"}, {"token_mixer": "conv3x3"}):
        torch.manual_seed(0)
        model = build_model(small_config(**IMAGE, num_layers=1) if not changes
                            else small_config(**IMAGE, num_layers=1, **changes))
        has_mixer = any("token_mixer" in name for name in model.state_dict())
        assert has_mixer == (changes.get("token_mixer") == "conv3x3")
        logits.append(model(small_batch(model.config, None).tokens))
    assert logits[0].equal(logits[1]) and not logits[0].equal(logits[2])


def test_amrb_is_bptt_with_the_token_mixer_bit_for_bit():
    config = small_config(**IMAGE, token_mixer="conv3x3", num_layers=1, dropout=0.3)
    results = []
    for backward in (bptt_backward, amrb_backward):
        torch.manual_seed(0)
        model = build_model(config)
        backward(model, small_batch(config, None), seed=torch.tensor(7))
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_the_token_mixer_does_not_reach_across_segments():
    config = small_config(
        **IMAGE, token_mixer="conv3x3", num_layers=1, num_memory_tokens=0, pooling="last"
    )
    model, tokens = small_model(config), small_batch(config, None).tokens
    changed = tokens.clone()
    changed[:, :512] = 16 - tokens[:, :512]  # the first segment, up to the border
    assert torch.equal(model(tokens), model(changed))


# ---- read-out ------------------------------------------------------------------------------------


def test_the_intensity_read_out_adds_rows_by_the_eighth_power_of_their_gray_level():
    models = {}
    for pooling in ("mean", "intensity"):
        config = small_config(
            dataset="cifar10", max_seq_len=16, num_segments=2, num_memory_tokens=0, pooling=pooling
        )
        models[pooling] = small_model(config)
        models[pooling].head = torch.nn.Identity()
    level = torch.tensor([255, 204, 51, 0])
    gray = 1 + level[:, None].expand(4, 16)  # images of one gray level
    weights = (level.double() / 255) ** 8
    close(models["intensity"](gray), 16 * weights[:, None] * models["mean"](gray), 1e-6)
    assert not intensity(torch.tensor([[0, 1]])).any()  # padding, black


def test_recomputed_read_out_statistics_are_means_over_the_batches_and_of_nothing_earlier():
    config = small_config(readout_norm="batch")
    model = small_model(config)
    norm = model.head[0]
    norm.running_mean.fill_(100.0)
    norm.running_var.fill_(100.0)
    norm.num_batches_tracked.fill_(10)  # of a training
    batches = [small_batch(config), small_batch(config, None)]
    seen = []
    norm.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].detach()))
    momentum = norm.momentum
    recompute_statistics(model, batches)
    close(norm.running_mean, torch.stack([x.mean(dim=0) for x in seen]).mean(dim=0))
    close(norm.running_var, torch.stack([x.var(dim=0) for x in seen]).mean(dim=0))
    assert len(seen) == 2 and norm.momentum == momentum


# ---- optimizer -----------------------------------------------------------------------------------


def test_muon_takes_the_matrices_of_the_layers_and_adamw_everything_else():
    config = small_config(optimizer="muon", classifier_dim=5)
    model = build_model(config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        kind: [{names[p] for p in group["params"]} for group in optimizer.param_groups]
        for kind, optimizer in build_optimizers(model, config).items()
    }
    parts = ("attention.to_qkv", "attention.to_out", "expand", "contract")
    matrices = {f"layers.{i}.{part}.weight" for i in range(2) for part in parts}
    basis = {f"layers.{i}.attention.position_basis" for i in range(2)}
    head = {name for name in names.values() if name.startswith("head") and "weight" in name}
    assert found["muon"] == [matrices]
    assert found["adamw"] == [basis, head, set(names.values()) - matrices - basis - head]


# ---- implementation ------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "backend"), [
    ("auto", "fused"), ("fused", "fused"), ("reference", "reference"),
])
@pytest.mark.parametrize("attention_type", ["astro", "linear"])
def test_the_attention_backend_is_the_one_that_its_key_names(attention_type, key, backend):
    config = small_config(attention_type=attention_type, attention_backend=key)
    model = small_model(config)
    assert model.attention_backend == backend
    nodes, found = [model(small_batch(config).tokens).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    assert any("FusedResponse" in node.name() for node in found) == (backend == "fused")
