"""The model's equations, padding rules and costs, as properties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_batch, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from astrocyte import retention_factors
from attention import ATTENTION
from attention.astromorphic import localised_basis
from attention.baselines import landmark_runs, pseudo_inverse
from attention.equations import (
    Terms,
    apply_position_kernel,
    astromorphic_response,
    feature_map,
    inverse_calcium,
)
from attention.fused import FusedResponse
from attention.heads import Attention, join_heads, split_heads
from lra_config import Config
from model import build_model
from training.diagnostics import inspect_model
from utils import sinusoidal_positions

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


def dense_reference(attention: Attention, config: Config, x, mask, positions) -> torch.Tensor:
    """Attention as an explicit N x N weighting of the values, one head and sample at a time."""
    if config.attention_type == "luna":
        return dense_luna(attention, config, x, mask)
    B, N, D = x.shape
    d = D // config.num_heads
    q, k, v = (x @ w.T for w in attention.to_qkv.weight.split(D))
    keep = torch.ones(B, N, dtype=torch.bool) if mask is None else mask
    out = torch.zeros_like(x)
    for b, h in itertools.product(range(B), range(config.num_heads)):
        span = slice(h * d, (h + 1) * d)
        qh, kh, vh = q[b, :, span], k[b, :, span], v[b, :, span]
        real = keep[b].double()
        if config.attention_type == "softmax":
            scores = (qh @ kh.T / math.sqrt(d)).masked_fill(~keep[b], -math.inf)
            heads = scores.softmax(dim=1) @ vh
        elif config.attention_type == "nystrom":
            heads = torch.zeros_like(vh)  # of the real rows, padding cut out of the sample
            heads[keep[b]] = dense_nystrom(
                attention, h, qh[keep[b]], kh[keep[b]], vh[keep[b]], config
            )
        else:
            phi_q, phi_k = feature_map(qh), feature_map(kh)
            weights = phi_q @ phi_k.T * real  # (N, N)
            if config.attention_type == "linear":
                heads = weights @ vh / weights.sum(dim=1, keepdim=True)
            else:
                if config.hebbian_astro:
                    weights = weights + phi_q @ positions[h].T * real
                scale = config.hebbian_scale or d
                if config.hebbian_sigmoid:
                    keys = phi_k + positions[h] if config.hebbian_astro else phi_k
                    numerator = phi_q @ ((keys * real[:, None]).T @ vh / scale).sigmoid()
                else:
                    numerator = weights @ vh / scale
                g = (phi_k * real[:, None]).sum(dim=0) ** config.presynaptic_alpha
                calcium = (phi_q * g).sum(dim=1, keepdim=True)
                heads = numerator / calcium if config.presynaptic_normalize else numerator
        out[b, :, span] = heads
    return attention.to_out(out)


def dense_nystrom(attention: Attention, h: int, q, k, v, config: Config) -> torch.Tensor:
    """One head and sample without padding: the N x N matrix F Z B plus the band of the kernel."""
    n = len(q)
    count = min(n, config.nystrom_landmarks)
    bounds = [-(-j * n // count) for j in range(count + 1)]
    means = torch.zeros(count, n, dtype=q.dtype)
    for j, (start, end) in enumerate(itertools.pairwise(bounds)):
        means[j, start:end] = 1 / (end - start)

    def softmax(a, b):
        return (a @ b.T / math.sqrt(q.shape[1])).softmax(dim=1)

    middle = softmax(means @ q, means @ k)
    inverse = middle.T / middle.sum(dim=0).max() / middle.sum(dim=1).max()
    for _ in range(config.nystrom_iterations):
        product = middle @ inverse
        powers = [torch.linalg.matrix_power(product, power) for power in range(4)]
        inverse = inverse @ sum(
            c * power for c, power in zip((13, -15, 7, -1), powers, strict=True)
        ) / 4
    weights = softmax(q, means @ k) @ inverse @ softmax(means @ q, k)  # (N, N)
    if config.nystrom_conv:
        kernel = attention.convolution.weight[h, 0, :, 0]
        middle_tap = len(kernel) // 2
        for i, j in itertools.product(range(n), range(n)):
            if abs(i - j) <= middle_tap:
                band = torch.zeros_like(weights)
                band[i, j] = 1
                weights = weights + band * kernel[j - i + middle_tap]
    return weights @ v


def dense_luna(attention: Attention, config: Config, x, mask) -> torch.Tensor:
    """Luna one head and sample at a time, the padded rows cut out."""
    B, N, D = x.shape
    M, d = config.num_memory_tokens, D // config.num_heads
    w_q, w_k, w_v = attention.to_qkv.weight.split(D)
    packed_k, packed_v = attention.to_packed_kv.weight.split(D)
    out = torch.zeros_like(x)

    def attend(q, k, v):  # (., D) each
        heads = [
            (qh @ kh.T / math.sqrt(d)).softmax(dim=1) @ vh
            for qh, kh, vh in zip(q.split(d, 1), k.split(d, 1), v.split(d, 1), strict=True)
        ]
        return torch.cat(heads, dim=1)

    for b in range(B):
        rows = torch.arange(M, N) if mask is None else mask[b].nonzero()[M:, 0]
        memory, tokens = x[b, :M], x[b, rows]
        packed = attend(memory @ w_q.T, tokens @ w_k.T, tokens @ w_v.T)
        unpacked = attend(tokens @ w_q.T, packed @ packed_k.T, packed @ packed_v.T)
        out[b, :M] = packed
        out[b, rows] = attention.to_out(unpacked)
    return out


VARIANTS = [
    {"attention_type": "astro"},
    {"attention_type": "astro", "hebbian_astro": False},
    {"attention_type": "astro", "hebbian_sigmoid": True},
    {"attention_type": "astro", "hebbian_sigmoid": True, "hebbian_astro": False},
    {"attention_type": "astro", "hebbian_scale": 3.0},
    {"attention_type": "astro", "presynaptic_alpha": 1.0},
    {"attention_type": "astro", "presynaptic_normalize": False},
    {"attention_type": "astro", "position_basis": "random", "decay_scale": 0.1},
    {"attention_type": "softmax"},
    {"attention_type": "linear"},
    {"attention_type": "nystrom", "nystrom_landmarks": 5, "nystrom_conv": 3},
    {"attention_type": "nystrom", "nystrom_landmarks": 9, "nystrom_conv": 0},
    {"attention_type": "nystrom"},
    {"attention_type": "luna"},
]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(map(str, v.values())))
def test_attention_equals_its_dense_form_in_outputs_and_gradients(variant, padded):
    config = tiny_config(num_memory_tokens=2, **variant)
    torch.manual_seed(0)
    attention = ATTENTION[config.attention_type](config).double()
    N = config.num_memory_tokens + config.segment_len
    x = torch.randn(2, N, config.dim, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[0, 7:], mask[1, 10:] = False, False
    mask = mask if padded else None
    weights = torch.randn(2, N, config.dim, dtype=torch.float64)
    if padded:
        weights = weights * mask[..., None]  # rows at padding carry no meaning

    results = []
    for form in (attention, lambda *a: dense_reference(attention, config, *a)):
        positions = attention.positions() if attention.has_positions else None
        loss = (form(x, mask, positions) * weights).sum()
        tensors = [x, *attention.parameters()]
        results.append([loss, *torch.autograd.grad(loss, tensors)])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def plain(qkv, num_heads, num_hidden, *rest):
    return join_heads(astromorphic_response(*split_heads(qkv, num_heads, num_hidden), *rest))


@pytest.mark.parametrize("m", [4, 7], ids="m={}".format)
@pytest.mark.parametrize("with_positions", [False, True], ids=["neuron", "neuron and astro"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("terms", [
    Terms(),
    Terms(alpha=0.25, scale=4.0),
    Terms(alpha=0.25, scale=4.0, sigmoid=True),
    Terms(scale=4.0, normalize=False),
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


def test_nystrom_with_a_landmark_per_row_is_softmax_attention():
    """F A^+ B is then A A^+ A: the softmax matrix, once the iteration has converged."""
    nystrom = tiny_config(
        attention_type="nystrom", nystrom_landmarks=16, nystrom_conv=0, nystrom_iterations=25
    )
    softmax = tiny_config(attention_type="softmax")
    torch.manual_seed(0)
    approximate = ATTENTION["nystrom"](nystrom).double()
    with torch.no_grad():
        approximate.to_qkv.weight.mul_(4)  # scores of the order of one: A is far from singular
    exact = ATTENTION["softmax"](softmax).double()
    exact.load_state_dict(approximate.state_dict())
    x = torch.randn(2, 10, 16, dtype=torch.float64)
    mask = torch.arange(10) < torch.tensor([[10], [6]])
    close(approximate(x, mask)[mask], exact(x, mask)[mask], 1e-6)


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


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize("decay_scale", [0.0, 0.01, 1.0, 50.0])
def test_position_kernel_equals_its_dense_form(size, decay_scale):
    torch.manual_seed(0)
    x = torch.randn(2, size, 3, dtype=torch.float64, requires_grad=True)
    at = torch.arange(size, dtype=torch.float64)
    kernel = torch.exp(-(at[:, None] - at).abs() * decay_scale)
    actual, expected = apply_position_kernel(x, decay_scale), kernel @ x
    close(actual, expected)
    weights = torch.randn_like(x)
    close(*(torch.autograd.grad(y, x, weights)[0] for y in (actual, expected)))


def test_position_kernel_stays_finite_over_long_segments():
    x = torch.randn(1, 100_000, 1)
    assert apply_position_kernel(x, 1.0).isfinite().all()


def test_localised_neurons_peak_at_their_own_places():
    torch.manual_seed(0)
    geometric, stepwise = localised_basis(2, 32, num_memory_tokens=3, segment_len=64).argmax(dim=2)
    for peaks in (geometric, stepwise):
        assert peaks[0] == 3 and peaks[-1] > 60  # the last bump is wide, its top flat
        assert len(peaks.unique()) > 16
    assert stepwise[:12].tolist() == list(range(3, 15))
    assert localised_basis(1, 1, 0, 1).shape == (1, 1, 1)


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
def test_padded_content_never_changes_the_logits(attention_type, pooling):
    config = tiny_config(attention_type=attention_type, pooling=pooling)
    model = double_model(config)
    batch = tiny_batch(config, lengths=[40, 3, 17, 0])
    other = torch.where(batch.mask, batch.tokens, 16 - batch.tokens)
    assert not other.equal(batch.tokens)
    close(model(other, batch.mask), model(batch.tokens, batch.mask), 0.0)


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
def test_an_empty_segment_leaves_the_memory_as_it_was(attention_type):
    config = tiny_config(attention_type=attention_type)
    model = double_model(config)
    tokens = tiny_batch(config).tokens[:2, :10]
    memory = torch.randn(2, 1, config.dim, dtype=torch.float64)
    mask = torch.tensor([[False] * 10, [True] * 10])
    next_memory, readout = model.segment(tokens, memory, 1, mask)
    close(next_memory[0], memory[0], 0.0)
    assert not readout[0].any()
    assert not torch.allclose(next_memory[1], memory[1])


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


def test_retention_factors_scale_the_memory_and_can_be_off():
    on, off = (tiny_config(astro_mem=value) for value in (True, False))
    with_factor, without = double_model(on), double_model(off)
    tokens = tiny_batch(on).tokens[:, :10]
    memory = without.initial_memory(3)
    for index, factor in enumerate(retention_factors(on.num_segments)):
        scaled, _ = with_factor.segment(tokens, memory, index)
        plain, _ = without.segment(tokens, memory, index)
        close(scaled, factor * plain)
    assert without.retention_factors.tolist() == [1.0] * 4


def test_pooling_reads_what_it_says():
    """Each read-out against the outputs of the segments, run one by one."""
    lengths = [40, 13, 20]
    for pooling in POOLINGS:
        config = tiny_config(pooling=pooling, num_memory_tokens=2)
        model = double_model(config)
        batch = tiny_batch(config, lengths=lengths)
        for row, length in enumerate(lengths):
            memory, outputs = model.initial_memory(1), []
            for index in range(-(-length // 10)):
                tokens = batch.tokens[row : row + 1, index * 10 : min(index * 10 + 10, length)]
                hidden = []
                handle = model.layers[-1].register_forward_hook(
                    lambda _m, _a, output, hidden=hidden: hidden.append(output)
                )
                memory, _ = model.segment(
                    tokens, memory, index, torch.ones_like(tokens, dtype=torch.bool)
                )
                handle.remove()
                outputs.append(hidden[0][0])
            pooled = {
                "mean": torch.cat([y[2:] for y in outputs]).mean(dim=0),
                "last": outputs[-1][2:].mean(dim=0),
                "memory": outputs[-1][:2].mean(dim=0),
            }[pooling]
            close(model(batch.tokens, batch.mask)[row], model.head(pooled))


def test_calcium_of_zero_gives_a_zero_gain_and_a_zero_gradient():
    q = torch.rand(1, 1, 3, 4, dtype=torch.float64).requires_grad_()
    k = torch.zeros(1, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    gain = inverse_calcium(q, k, alpha=0.25)
    gain.sum().backward()
    assert not gain.any() and not q.grad.any() and not k.grad.any()


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


@pytest.mark.parametrize("kind", ["learned", "sinusoidal", "none"])
def test_position_embedding_distinguishes_places_if_there_is_one(kind):
    config = tiny_config(
        position_embedding=kind, attention_type="linear", num_segments=1, pooling="mean"
    )
    model = double_model(config)
    tokens = tiny_batch(config).tokens
    swapped = torch.allclose(model(tokens), model(tokens.flip(1)))
    assert swapped == (kind == "none")
    assert hasattr(model, "position_table") == (kind == "learned")


GREY = {"dataset": "cifar10", "max_seq_len": 16, "num_segments": 2}
STARTS = {"token_embedding": "ordinal", "position_scale": 2.0, "readout_norm": "batch"}


@pytest.mark.parametrize("changed", STARTS)
def test_each_start_changes_its_own_weights_alone(changed):
    models = {}
    for name, changes in {"off": {}, "on": {changed: STARTS[changed]}}.items():
        torch.manual_seed(0)
        models[name] = build_model(tiny_config(**GREY, **changes))
    own = {"token_embedding": "token_embedding.weight", "position_scale": "position_table"}
    off, on = (dict(models[name].named_parameters()) for name in ("off", "on"))
    for name, parameter in off.items():
        same = parameter.equal(on[name.replace("head.", "head.1.") if changed == "readout_norm"
                                  else name])
        assert same == (name != own.get(changed)), name


LOCAL = {"position_basis": "local", "position_embedding": "periodic", "decay_scale": 4.0}


@pytest.mark.parametrize("lag", [-4, -1, 1, 3])
def test_a_row_of_the_local_start_reads_its_neighbour_of_the_lag_most(lag):
    config = tiny_config(
        **LOCAL, dim=64, num_heads=1, num_hidden=16, max_seq_len=32, num_segments=2,
        num_memory_tokens=2, num_layers=1, local_lags=[lag],
    )
    model = build_model(config)
    attention = model.layers[0].attention
    rows = model.embedding_norm(model.position_code)[None]  # (1, S, D), of no token
    q, _, _ = attention.project(rows)
    weights = feature_map(q[0, 0]) @ attention.positions()[0, 2:].T  # (S, S), row by key
    expected = (torch.arange(16) + lag) % 16
    assert weights.argmax(dim=1).equal(expected)
    # All the rows that it does not mean to read, together, weigh less than the one it does.
    share = weights.amax(dim=1) / weights.sum(dim=1)
    assert float(share.min().detach()) > 0.5


def test_the_periodic_code_counts_inside_the_segment_and_leaves_tokens_their_own_features():
    model = build_model(tiny_config(position_embedding="periodic"))
    assert model._position_embedding(0, 5).equal(model._position_embedding(1, 5))
    used = model.position_code.any(dim=0)
    assert used.any() and not model.token_embedding.weight[:, used].any()
    assert model.token_embedding.weight[1:, ~used].all()


def test_rows_of_the_local_start_differ_where_those_of_places_hardly_do():
    spread = {}
    for name, changes in {"places": {}, "local": LOCAL}.items():
        torch.manual_seed(0)
        config = tiny_config(
            **changes, dim=64, num_hidden=32, max_seq_len=64, num_segments=2, num_layers=1
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
    config = tiny_config(position_scale=2.0)
    one, two = (build_model(tiny_config(position_scale=s)).position_table for s in (1.0, 2.0))
    torch.testing.assert_close(two, 2 * one)
    torch.testing.assert_close(one, sinusoidal_positions(torch.arange(40), config.dim, one.dtype))


def test_a_batch_normed_readout_hands_the_head_standardised_features():
    model = build_model(tiny_config(readout_norm="batch"))
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
