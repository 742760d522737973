"""The model's equations, padding rules and costs, as properties."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_batch, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from attention import ATTENTION
from attention.astromorphic import landmark_basis
from attention.baselines import landmark_runs, pseudo_inverse
from attention.equations import (
    Terms,
    astromorphic_response,
    feature_map,
    inverse_calcium,
)
from attention.fused import FusedResponse
from attention.heads import join_heads, split_heads
from lra_config import Config
from model import build_model
from readout import intensity
from training.diagnostics import inspect_model
from utils import grid_positions, sinusoidal_positions

FLOAT64_TOLERANCE = 1e-10
ATTENTIONS = ["astro", "softmax", "linear", "nystrom", "luna"]
POOLINGS = ["mean", "last", "memory"]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = FLOAT64_TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def double_model(config: Config, seed: int = 0):
    torch.manual_seed(seed)
    return build_model(config).double()


def test_the_feature_map_is_elu_plus_one_and_never_zero():
    x = torch.linspace(-30, 30, 121, dtype=torch.float64, requires_grad=True)
    expected = F.elu(x) + 1
    close(feature_map(x), expected)
    (gradient,) = torch.autograd.grad(feature_map(x).square().sum(), x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    close(gradient, expected_gradient)
    assert (feature_map(torch.tensor([-80.0, -30.0])) > 0).all()


def plain(qkv, num_heads, num_hidden, *rest):
    return join_heads(astromorphic_response(*split_heads(qkv, num_heads, num_hidden), *rest))


@pytest.mark.parametrize("m", [4, 7], ids="m={}".format)
@pytest.mark.parametrize("with_positions", [False, True], ids=["neuron", "neuron and astro"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("terms", [
    Terms(),
    Terms(alpha=0.25, divisor=4.0),
    Terms(alpha=0.25, divisor=4.0, sigmoid=True),
    Terms(divisor=4.0, normalize=False),
    Terms(sigmoid=True, normalize=False),
], ids=str)
def test_the_fused_response_equals_the_plain_one_in_outputs_and_gradients(
    terms, padded, with_positions, m
):
    B, H, N, d = 3, 2, 9, 4
    torch.manual_seed(0)
    qkv = torch.randn(B, N, H * (2 * m + d), dtype=torch.float64, requires_grad=True)
    positions = torch.rand(H, N, m, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(N) < torch.tensor([[N], [4], [0]])  # one sample without a real row
    weights = torch.randn(B, N, H * d, dtype=torch.float64)

    results = []
    for form in (FusedResponse.apply, plain):
        output = form(
            qkv, H, m, mask if padded else None, positions if with_positions else None, terms
        )
        inputs = [qkv, positions] if with_positions else [qkv]
        results.append([output, *torch.autograd.grad((output * weights).sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("form", [FusedResponse.apply, plain], ids=["fused", "plain"])
def test_a_row_that_hardly_any_neuron_hears_has_the_gradient_of_double_precision(form):
    B, H, N, m, d = 1, 1, 5, 4, 4
    torch.manual_seed(0)
    qkv = torch.randn(B, N, H * (2 * m + d))
    qkv[:, 2, :m] -= 50  # phi(q) and C are about 1e-22 there, 1 / C^2 is beyond float32
    qkv[:, 3, :m] -= 200  # and here 0 in float32
    weights = torch.randn(B, N, H * d)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x = qkv.detach().to(dtype, copy=True).requires_grad_()
        (form(x, H, m, None, None, Terms(alpha=0.25)) * weights).sum().backward()
        gradients.append(x.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 12), (2, 5, 12)])
def test_the_fused_response_leaves_its_input_as_it_is(shape):
    qkv = torch.randn(shape)
    before = qkv.clone()
    FusedResponse.apply(qkv, 1, 4, torch.zeros(shape[:2], dtype=torch.bool), None, Terms())
    assert torch.equal(qkv, before)


def test_the_fused_response_keeps_half_of_what_autograd_keeps():
    qkv = torch.randn(2, 64, 3 * 32, requires_grad=True)
    positions = torch.rand(4, 64, 8, requires_grad=True)
    kept = []
    for form in (FusedResponse.apply, plain):
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = form(qkv, 4, 8, None, positions, Terms(alpha=0.25))
        kept.append(sum(storages.values()))
        del output
    fused, by_autograd = kept
    assert fused < by_autograd / 2


def test_landmark_runs_split_the_real_rows_evenly_wherever_they_are():
    real = torch.rand(6, 50, generator=torch.Generator().manual_seed(0)) < 0.6
    real[4], real[5] = False, torch.arange(50) < 3
    runs = landmark_runs(real, 8)
    assert torch.equal(runs.any(dim=2), real)
    sizes = runs.sum(dim=1)
    assert (sizes[:4].amax(1) - sizes[:4].amin(1) <= 1).all()
    assert not sizes[4].any() and sizes[5].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    for sample, rows in zip(runs, real, strict=True):
        order = sample[rows].int().argmax(dim=1)
        assert (order.diff() >= 0).all()


def test_the_pseudo_inverse_is_that_of_moore_and_penrose():
    torch.manual_seed(0)
    matrix = (3 * torch.randn(4, 6, 6, dtype=torch.float64)).softmax(dim=-1)
    matrix[1, 4:], matrix[1, :, 4:] = 0, 0  # a sample with fewer landmarks
    matrix[2] *= 1e-3  # each matrix is scaled on its own
    close(pseudo_inverse(matrix, 30), torch.linalg.pinv(matrix), 1e-6)
    assert pseudo_inverse(matrix.bfloat16(), 6).dtype == torch.float32


def test_luna_spares_its_packed_rows_the_feed_forward_block():
    config = tiny_config(attention_type="luna", num_memory_tokens=3)
    layer = double_model(config).layers[0]
    seen = []
    layer.feed_forward_norm.register_forward_hook(lambda _m, inputs, _y: seen.append(inputs[0]))
    x = torch.randn(2, 13, config.dim, dtype=torch.float64)
    y = layer(x, None, None, [None] * layer.NUM_KEYS)
    assert seen[0].shape == (2, 10, config.dim)
    close(y[:, :3], layer.attention_norm(x + layer.attention(x, None))[:, :3])


def test_localised_neurons_peak_at_their_own_places():
    torch.manual_seed(0)
    geometric, stepwise = landmark_basis(2, 32, num_memory_tokens=3, segment_len=64).argmax(dim=2)
    for peaks in (geometric, stepwise):
        assert peaks[0] == 3 and peaks[-1] > 60  # the last bump is wide, its top flat
        assert len(peaks.unique()) > 16
    assert stepwise[:12].tolist() == list(range(3, 15))
    assert landmark_basis(1, 1, 0, 1).shape == (1, 1, 1)


@pytest.mark.parametrize("attention_type", ["astro", "linear", "nystrom", "luna"])
def test_cost_is_linear_in_the_segment_length(attention_type):
    def flops(segment_len: int) -> int:
        config = tiny_config(
            attention_type=attention_type, max_seq_len=segment_len, num_segments=1,
            num_memory_tokens=int(attention_type == "luna"), dim=32, nystrom_landmarks=8,
        )
        model = build_model(config)
        with FlopCounterMode(display=False) as counter:
            model(tiny_batch(config).tokens).sum().backward()
        return counter.get_total_flops()

    counts = [flops(n) for n in (512, 1024, 2048, 4096)]
    for half, whole in itertools.pairwise(counts):
        assert 1.95 < whole / half < 2.01


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_trailing_padding_may_be_trimmed(attention_type, pooling):
    config = tiny_config(attention_type=attention_type, pooling=pooling)
    model = double_model(config)
    batch = tiny_batch(config, lengths=[15, 3, 0])
    expected = model(batch.tokens, batch.mask)
    for length in (15, 20, 30):  # inside a segment, at its end, a whole segment of padding more
        close(model(batch.tokens[:, :length], batch.mask[:, :length]), expected)


def test_a_length_that_fills_no_whole_segment_needs_no_mask():
    config = tiny_config()
    model = double_model(config)
    batch = tiny_batch(config, lengths=[13, 13])
    close(model(batch.tokens[:, :13]), model(batch.tokens, batch.mask))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_a_sequence_without_a_real_token_pools_to_zero(attention_type, pooling):
    config = tiny_config(attention_type=attention_type, pooling=pooling)
    model = double_model(config)
    batch = tiny_batch(config, lengths=[0, 40])
    logits = model(batch.tokens, batch.mask)
    close(logits[0], model.head.bias)
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_rows_of_padding_alone_leave_everything_finite(attention_type):
    memory_tokens = int(attention_type == "luna")
    config = tiny_config(attention_type=attention_type, num_memory_tokens=memory_tokens)
    attention = ATTENTION[attention_type](config)
    x = torch.randn(2, 10 + memory_tokens, config.dim, requires_grad=True)
    mask = torch.zeros(2, 10 + memory_tokens, dtype=torch.bool)
    mask[0], mask[:, :memory_tokens] = True, True
    y = attention(x, mask, attention.positions() if attention.has_positions else None)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (x, *attention.parameters()))


@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_samples_do_not_see_each_other(attention_type):
    config = tiny_config(attention_type=attention_type)
    model = double_model(config)
    batch = tiny_batch(config, lengths=[40, 3, 17])
    order = torch.tensor([2, 0, 1])
    close(model(batch.tokens[order], batch.mask[order]), model(batch.tokens, batch.mask)[order])


@pytest.mark.parametrize(("attention_type", "memory_tokens"), [
    pair for pair in itertools.product(ATTENTIONS, [0, 1, 4]) if pair != ("luna", 0)
])
def test_only_the_memory_joins_segments(attention_type, memory_tokens):
    config = tiny_config(
        attention_type=attention_type, num_memory_tokens=memory_tokens, pooling="last"
    )
    model = double_model(config)
    tokens = tiny_batch(config).tokens
    changed = tokens.clone()
    changed[:, :10] = 16 - tokens[:, :10]  # the first of four segments
    same = torch.equal(model(tokens), model(changed))
    assert same == (memory_tokens == 0)


def test_calcium_is_float32_under_autocast():
    seen = []
    config = tiny_config(precision="bfloat16")
    model = build_model(config)
    tokens = tiny_batch(config).tokens
    with torch.autocast("cpu", torch.bfloat16):
        q = torch.rand(1, 2, 3, 4, dtype=torch.bfloat16)
        seen.append(inverse_calcium(q, q, alpha=0.25).dtype)
    assert seen == [torch.float32]
    exact = build_model(tiny_config())
    exact.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens), exact(tokens), rtol=0.1, atol=0.05)
    assert not model(tokens).equal(exact(tokens))


GREY = {"dataset": "cifar10", "max_seq_len": 16, "num_segments": 2}
STARTS = {"token_embedding": "ordinal", "position_init": "sinusoidal", "readout_norm": "batch"}


@pytest.mark.parametrize("changed", STARTS)
def test_each_start_changes_its_own_weights_alone(changed):
    models = {}
    for name, changes in {"off": {}, "on": {changed: STARTS[changed]}}.items():
        torch.manual_seed(0)
        models[name] = build_model(tiny_config(**GREY, **changes))
    own = {"token_embedding": "token_embedding.weight", "position_init": "position_table"}
    off, on = (dict(models[name].named_parameters()) for name in ("off", "on"))
    for name, parameter in off.items():
        same = parameter.equal(on[name.replace("head.", "head.1.") if changed == "readout_norm"
                                  else name])
        assert same == (name != own.get(changed)), name


LOCAL = {"basis_init": "neighbors", "position_embedding": "none", "decay_scale": 4.0}


@pytest.mark.parametrize(("S", "digits"), [(16, 2), (12, 2), (27, 3), (20, 3)])
@pytest.mark.parametrize("lag", [-4, -1, 1, 3])
def test_a_row_of_the_local_start_reads_its_neighbour_of_the_lag(lag, S, digits):
    M = 2
    config = tiny_config(
        **LOCAL, dim=64, num_heads=1, num_hidden=S, max_seq_len=2 * S, num_segments=2,
        num_memory_tokens=M, num_layers=1, neighbor_offsets=[lag], neighbor_code_digits=digits,
    )
    model = build_model(config)
    attention = model.layers[0].attention
    rows = model.embedding_norm(model.position_code)[None]  # (1, S, D), of no token
    q, _, _ = attention.project(torch.cat([model.memory[None], rows], dim=1))
    weights = feature_map(q[0, 0]) @ attention.positions()[0].T  # (M + S, M + S), row by key
    weights = weights / weights.sum(dim=1, keepdim=True)
    expected = torch.zeros(M + S, M + S)
    for i in range(S):
        expected[M + i, M + (i + lag) % S] = 1
    expected[:M] = expected[-1]  # the memory reads as the last row does
    assert (weights - expected).abs().sum(dim=1).max() < 0.5  # of 2: what they do not share


@pytest.mark.parametrize("positions", ["none", "learned"])
def test_the_code_of_places_counts_inside_the_segment_in_features_of_its_own(positions):
    config = tiny_config(**LOCAL | {"position_embedding": positions}, num_hidden=10)
    model = build_model(config)
    used = model.position_code.any(dim=0)
    first, second = (model._position_embedding(t, 5) for t in (0, 1))
    assert first[:, used].equal(second[:, used]) and len(first[:, used].unique(dim=0)) == 5
    assert first[:, ~used].equal(second[:, ~used]) == (positions == "none")
    assert not model.token_embedding.weight[:, used].any()
    assert model.token_embedding.weight[1:, ~used].all()
    for layer in model.layers:  # behind each, the code is what came in, scaled by the norms
        x = torch.randn(2, 11, 16)
        x[..., used] = 1 + torch.randn(1).square()
        y = layer(x, None, None, [None] * 3)[..., used]
        assert torch.allclose(y, y[..., :1].expand_as(y), atol=1e-5)


def test_rows_of_the_local_start_differ_where_those_of_places_hardly_do():
    spread = {}
    for name, changes in {"places": {}, "local": LOCAL}.items():
        torch.manual_seed(0)
        config = tiny_config(
            **changes, dim=64, num_hidden=32, hebbian_divisor=8.0, max_seq_len=64, num_segments=2,
            num_layers=1,
        )
        found = inspect_model(build_model(config), tiny_batch(config))
        spread[name] = found["attention_spread/1"]
    assert 0 < spread["places"] < spread["local"] / 3 < 1 / 3


def test_an_ordinal_start_gives_like_grey_levels_like_vectors():
    weight = build_model(tiny_config(**GREY, token_embedding="ordinal")).token_embedding.weight
    assert not weight[0].any()  # padding
    levels = weight.detach()[1:]
    near, far = ((levels[d:] - levels[:-d]).norm(dim=1).mean() for d in (1, 128))
    assert near < far / 10
    assert float(levels.square().mean()) == pytest.approx(1, abs=0.2)


def test_position_scale_starts_the_learned_positions_at_multiples_of_the_sinusoids():
    config = tiny_config(position_init="sinusoidal", position_init_scale=2.0)
    one, two = (build_model(tiny_config(position_init="sinusoidal", position_init_scale=s)).position_table for s in (1.0, 2.0))
    torch.testing.assert_close(two, 2 * one)
    torch.testing.assert_close(one, sinusoidal_positions(torch.arange(40), config.dim, one.dtype))


def test_a_grid_tells_how_far_two_pixels_lie_apart_along_either_axis():
    side, dim = 8, 16
    grid = grid_positions(torch.arange(side**2), side, dim + 3)
    assert not grid[:, dim:].any()  # no whole quarter
    rows, columns = grid[:, :dim].unflatten(0, (side, side)).chunk(2, dim=-1)
    assert rows.equal(rows[:, :1].expand_as(rows)) and columns.equal(columns[:1].expand_as(columns))
    close(rows[:, 0], columns[0], 1e-6)
    likeness = rows[:, 0] @ rows[:, 0].T  # sines and cosines: of the distance alone
    for distance in range(side):
        diagonal = likeness.diagonal(distance)
        close(diagonal, diagonal[:1].expand_as(diagonal), 1e-4)
    assert likeness[0].argmax() == 0 and (likeness[0, :3].diff() < 0).all()


@pytest.mark.parametrize("local", [{}, {"basis_init": "neighbors", "num_hidden": 8}], ids=str)
def test_position_grid_starts_the_learned_positions_beside_the_code_of_places(local):
    model = build_model(tiny_config(**GREY, **local, position_init="sinusoidal_2d", position_init_scale=2.0))
    free = model.config.dim - model.config.position_code_width
    table = model.position_table.detach()
    close(table[:, -free:], 2 * grid_positions(torch.arange(16), 32, free), 1e-6)
    assert not table[:, :-free].any()


def test_a_bright_read_out_adds_up_rows_by_the_eighth_power_of_their_grey_level():
    models = {}
    for pooling in ("mean", "intensity"):
        config = tiny_config(**GREY, pooling=pooling, num_memory_tokens=0)
        models[pooling] = double_model(config)
        models[pooling].head = torch.nn.Identity()
    level = torch.tensor([255, 204, 51, 0])
    grey = 1 + level[:, None].expand(4, 16)  # images of one grey
    weights = (level.double() / 255) ** 8
    close(models["intensity"](grey), 16 * weights[:, None] * models["mean"](grey), 1e-6)
    assert not intensity(torch.tensor([[0, 1]])).any()  # padding, black


@pytest.mark.parametrize("changes", [
    {}, {"dataset": "aan", "document_pair": "separate", "max_seq_len": 40, "num_segments": 4},
], ids=["single", "pairs"])  # of a pair each document, before the match
def test_a_batch_normed_readout_hands_the_head_standardised_features(changes):
    model = build_model(tiny_config(readout_norm="batch", **changes))
    seen = []
    model.head[1].register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    tokens = torch.cat([tiny_batch(model.config, seed=s).tokens for s in range(20)])
    model.train()(tokens)
    torch.testing.assert_close(seen[0].mean(dim=0), torch.zeros(16), atol=1e-4, rtol=0)
    assert float(seen[0].detach().std(dim=0).min()) > 0.5
    # In evaluation an example's result does not depend on its batch.
    model.eval()
    torch.testing.assert_close(model(tokens)[:1], model(tokens[:1]))


def test_sequences_that_do_not_fit_are_refused():
    config = tiny_config()
    model = build_model(config)
    with pytest.raises(ValueError, match="max_seq_len=40"):
        model(torch.ones(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match="differ in shape"):
        model(torch.ones(1, 40, dtype=torch.long), torch.ones(1, 39, dtype=torch.bool))
