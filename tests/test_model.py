"""The model's equations, padding rules and costs, as properties."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import tiny_batch, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from attention import ATTENTION
from attention.baselines import landmark_runs, pseudo_inverse
from attention.equations import Terms, feature_map, inverse_calcium
from attention.fused import FusedResponse, reference_response
from model import build_model
from utils import grid_positions, sinusoidal_positions

FLOAT64_TOLERANCE = 1e-10
ATTENTIONS = ["astro", "softmax", "linear", "nystrom", "luna"]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = FLOAT64_TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


BACKENDS = pytest.mark.parametrize(
    "form", [FusedResponse.apply, reference_response], ids=["fused", "reference"]
)


@pytest.mark.parametrize("m", [4, 7], ids="m={}".format)
@pytest.mark.parametrize("with_positions", [False, True], ids=["neuron", "neuron and astro"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("terms", [
    Terms(),
    Terms(alpha=0.25, divisor=4.0),
    Terms(alpha=0.25, divisor=4.0, sigmoid=True),
    Terms(divisor=4.0, normalize=False),
    Terms(sigmoid=True, normalize=False),
], ids=str)
def test_the_fused_response_equals_the_reference_in_outputs_and_gradients(
    terms, padded, with_positions, m
):
    B, H, N, d = 3, 2, 9, 4
    torch.manual_seed(0)
    qkv = torch.randn(B, N, H * (2 * m + d), dtype=torch.float64, requires_grad=True)
    positions = torch.rand(H, N, m, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(N) < torch.tensor([[N], [4], [0]])  # one sample without a real row
    weights = torch.randn(B, N, H * d, dtype=torch.float64)

    results = []
    for form in (FusedResponse.apply, reference_response):
        output = form(
            qkv, H, m, mask if padded else None, positions if with_positions else None, terms
        )
        inputs = [qkv, positions] if with_positions else [qkv]
        results.append([output, *torch.autograd.grad((output * weights).sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


@BACKENDS
def test_very_negative_queries_have_the_gradient_of_double_precision(form):
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


def test_the_slope_of_the_feature_map_at_zero_is_one_on_either_branch():
    x = torch.zeros(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(feature_map(x).sum(), x)
    assert gradient.tolist() == [1.0, 1.0, 1.0]


@BACKENDS
@pytest.mark.parametrize("terms", [Terms(), Terms(alpha=0.25, divisor=32.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_holds_at_every_shipped_length(form, terms, dtype):
    N, H, m = 8_192, 1, 32
    torch.manual_seed(0)
    qkv = torch.randn(1, N, 3 * m)
    qkv[..., 2 * m :] = 0.5
    low, exact = (qkv.to(t).requires_grad_() for t in (dtype, torch.float64))
    results = []
    for x in (low, exact):
        y = form(x, H, m, None, None, terms)
        (1_000 * y[:, :, 0]).mean().backward()
        results.append([y.detach().double(), x.grad.double()])
        assert y.dtype == x.dtype
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).norm() < 0.02 * expected.norm()


@BACKENDS
@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize(("dtype", "key"), [
    (torch.float16, -14.5), (torch.float16, -16.5), (torch.float16, -40.0),
    (torch.float32, -40.0), (torch.float32, -86.5), (torch.float32, -95.0),
    (torch.float32, -200.0),
], ids=str)
def test_very_negative_keys_leave_values_and_gradients_finite(form, dtype, key, with_positions):
    B, H, N, m = 2, 2, 16, 4
    torch.manual_seed(0)
    qkv = torch.randn(B, N, 3 * H * m)
    qkv[..., H * m : 2 * H * m] = key - torch.rand(B, N, H * m)
    qkv = qkv.to(dtype).requires_grad_()
    positions = torch.rand(H, N, m).requires_grad_() if with_positions else None
    for terms in (Terms(alpha=0.25, divisor=4.0), *([] if with_positions else [Terms()])):
        y = form(qkv, H, m, None, positions, terms)
        y.float().mean().backward()
        assert y.isfinite().all() and qkv.grad.isfinite().all()
        assert positions is None or positions.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1, 12), (2, 5, 12)])
def test_the_fused_response_leaves_its_input_as_it_is(shape):
    qkv = torch.randn(shape)
    before = qkv.clone()
    FusedResponse.apply(qkv, 1, 4, torch.zeros(shape[:2], dtype=torch.bool), None, Terms())
    assert torch.equal(qkv, before)


def test_the_fused_response_saves_half_of_what_autograd_saves():
    qkv = torch.randn(2, 64, 3 * 32, requires_grad=True)
    positions = torch.rand(4, 64, 8, requires_grad=True)
    kept = []
    for form in (FusedResponse.apply, reference_response):
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
    matrix[2] *= 1e-3  # each matrix is scaled separately
    close(pseudo_inverse(matrix, 30), torch.linalg.pinv(matrix), 1e-6)
    assert pseudo_inverse(matrix.bfloat16(), 6).dtype == torch.float32


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


IMAGE = {"dataset": "cifar10", "max_seq_len": 16, "num_segments": 2}
INITIALIZATIONS = {
    "token_embedding": "ordinal", "position_init": "sinusoidal", "readout_norm": "batch",
}


@pytest.mark.parametrize("changed", INITIALIZATIONS)
def test_each_initialization_changes_its_own_weights_only(changed):
    models = {}
    for name, changes in {"off": {}, "on": {changed: INITIALIZATIONS[changed]}}.items():
        torch.manual_seed(0)
        models[name] = build_model(tiny_config(**IMAGE, **changes))
    own = {"token_embedding": "token_embedding.weight", "position_init": "position_table"}
    off, on = (dict(models[name].named_parameters()) for name in ("off", "on"))
    for name, parameter in off.items():
        same = parameter.equal(on[name.replace("head.", "head.1.") if changed == "readout_norm"
                                  else name])
        assert same == (name != own.get(changed)), name


def test_an_ordinal_embedding_gives_similar_gray_levels_similar_vectors():
    weight = build_model(tiny_config(**IMAGE, token_embedding="ordinal")).token_embedding.weight
    assert not weight[0].any()  # padding
    levels = weight.detach()[1:]
    near, far = ((levels[d:] - levels[:-d]).norm(dim=1).mean() for d in (1, 128))
    assert near < far / 10
    assert float(levels.square().mean()) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_learned_positions_are_initialized_to_multiples_of_the_sinusoids(scale):
    config = tiny_config(position_init="sinusoidal", position_init_scale=scale)
    table = build_model(config).position_table.detach()
    close(table, scale * sinusoidal_positions(torch.arange(40), config.dim, table.dtype), 1e-6)


def test_a_grid_encodes_the_distance_of_two_pixels_along_either_axis():
    side, dim = 8, 16
    grid = grid_positions(torch.arange(side**2), side, dim + 3)
    assert not grid[:, dim:].any()  # not a multiple of a quarter
    rows, columns = grid[:, :dim].unflatten(0, (side, side)).chunk(2, dim=-1)
    assert rows.equal(rows[:, :1].expand_as(rows)) and columns.equal(columns[:1].expand_as(columns))
    close(rows[:, 0], columns[0], 1e-6)
    likeness = rows[:, 0] @ rows[:, 0].T  # sines and cosines: a function of the distance alone
    for distance in range(side):
        diagonal = likeness.diagonal(distance)
        close(diagonal, diagonal[:1].expand_as(diagonal), 1e-4)
    assert likeness[0].argmax() == 0 and (likeness[0, :3].diff() < 0).all()


@pytest.mark.parametrize("basis", [{}, {"basis_init": "neighbors", "num_hidden": 8}], ids=str)
def test_a_grid_initializes_learned_positions_next_to_the_position_code(basis):
    model = build_model(tiny_config(
        **IMAGE, **basis, position_init="sinusoidal_2d", position_init_scale=2.0
    ))
    free = model.config.dim - model.config.position_code_width
    table = model.position_table.detach()
    close(table[:, -free:], 2 * grid_positions(torch.arange(16), 32, free), 1e-6)
    assert not table[:, :-free].any()


@pytest.mark.parametrize("changes", [
    {}, {"dataset": "aan", "document_pair": "separate", "max_seq_len": 40, "num_segments": 4},
], ids=["single", "pairs"])  # each document of a pair, before matching
def test_batch_norm_gives_the_head_standardized_features(changes):
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
