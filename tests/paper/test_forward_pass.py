"""The full forward pass equals the loops: segments, memory, padding, read-outs, documents."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
import torch
from cases import (
    ATTENTIONS,
    MASKS,
    POOLINGS,
    arrays,
    close,
    reference_logits,
    small_batch,
    small_config,
    small_model,
)

from model import RMAAT
from train import amrb_backward, bptt_backward

VARIANTS = [
    *({"attention_type": a, "pooling": p} for a, p in itertools.product(ATTENTIONS, POOLINGS)),
    {"attention_type": "nystrom", "nystrom_landmarks": 9, "nystrom_conv": 0},
    {"attention_type": "nystrom", "nystrom_landmarks": 1, "nystrom_conv": 5},
    {"num_hidden": 3}, {"num_hidden": 7, "attention_type": "linear"},
    {"position_embedding": "sinusoidal"}, {"position_embedding": "none"},
    {"astro_mem": False}, {"num_memory_tokens": 0}, {"num_segments": 1}, {"num_segments": 12},
    {"num_layers": 1}, {"hebbian_sigmoid": True}, {"hebbian_astro": False},
    {"presynaptic_normalize": False}, {"num_memory_tokens": 0, "pooling": "last"},
    {"classifier_dim": 5},
]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_are_those_of_the_loops(variant, masked):
    config = small_config(**variant)
    model = small_model(config)
    batch = small_batch(config, MASKS if masked else None)
    close(model(batch.tokens, batch.mask), reference_logits(model, batch.tokens, batch.mask))


@pytest.mark.parametrize("hidden", [None, 5])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_two_documents_encoded_apart_meet_in_the_head_alone(pooling, hidden):
    config = small_config(
        dataset="aan", document_pair="separate", num_segments=6, pooling=pooling,
        classifier_dim=hidden,
    )
    model = small_model(config)
    batch = small_batch(config)
    close(model(batch.tokens, batch.mask), reference_logits(model, batch.tokens, batch.mask))
    # Each has half the segments, with the factors and positions of that half.
    assert len(model.retention_factors) == 3 and len(model.position_table) == 6
    assert (model.head[0] if hidden else model.head).in_features == 4 * config.dim


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_what_stands_at_padding_changes_nothing(attention_type, pooling):
    config = small_config(attention_type=attention_type, pooling=pooling)
    model, batch = small_model(config), small_batch(config)
    other = torch.where(batch.mask, batch.tokens, 16 - batch.tokens)
    assert not other.equal(batch.tokens)
    close(model(other, batch.mask), model(batch.tokens, batch.mask), 0.0)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_trailing_padding_may_be_cut_off_and_t_and_T_stay(attention_type, pooling):
    config = small_config(attention_type=attention_type, pooling=pooling)
    model = small_model(config)
    batch = small_batch(config, (MASKS[1], (1,) * 3 + (0,) * 9))
    expected = model(batch.tokens, batch.mask)
    for length in (7, 8):  # inside a segment, at its end
        close(model(batch.tokens[:, :length], batch.mask[:, :length]), expected)
    unmasked = model(batch.tokens[:1, :7])  # seven tokens, no mask
    close(unmasked, expected[:1])
    close(unmasked, reference_logits(model, batch.tokens[:1, :7]))


@pytest.mark.parametrize("changes", [
    *({"attention_type": a, "pooling": p} for a, p in itertools.product(ATTENTIONS, POOLINGS)),
    {"num_memory_tokens": 0}, {"dataset": "aan", "document_pair": "separate", "num_segments": 6},
], ids=str)
@pytest.mark.parametrize("backward", [bptt_backward, amrb_backward])
def test_to_leave_a_sample_out_of_a_segment_of_padding_changes_nothing(
    monkeypatch, backward, changes
):
    model = small_model(small_config(**changes))
    batch = small_batch(model.config)
    segment, samples, results = RMAAT.segment, set(), []

    def counted(self, tokens, memory, index, *rest):
        samples.add((index, len(tokens)))
        return segment(self, tokens, memory, index, *rest)

    monkeypatch.setattr(RMAAT, "segment", counted)
    for model.fixed_shapes in (True, False):
        samples.clear()
        model.zero_grad()
        result = backward(model, batch)
        results.append([*result, *(p.grad for p in model.parameters())])
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)
    segments, _ = model.split(batch.tokens, batch.mask)
    assert samples == {(t, int(mask.any(dim=1).sum())) for t, (_, mask) in enumerate(segments)}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_sequence_without_a_real_token_is_the_zero_vector(pooling):
    model = small_model(small_config(pooling=pooling))
    tokens = torch.ones(1, 12, dtype=torch.long)
    close(model(tokens, torch.zeros(1, 12, dtype=torch.bool))[0], model.head.bias)


@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_memories_follow_the_recurrence_and_an_empty_segment_leaves_them(attention_type):
    """mem_1 is learned; mem_{t+1} = factor(t, T) mem'_{t+1}, or mem_t if the segment is empty."""
    config = small_config(attention_type=attention_type)
    model, batch = small_model(config), small_batch(config)
    segments, _ = model.split(batch.tokens, batch.mask)
    memory = model.initial_memory(len(batch.tokens))
    found = [memory]
    for index, (tokens, mask) in enumerate(segments):
        memory, _ = model.segment(tokens, memory, index, mask)
        found.append(memory)
    found = torch.stack(found, dim=1)  # (B, T + 1, M, D)
    for row in range(len(batch.tokens)):
        memories: list[np.ndarray] = []
        reference.encode(
            arrays(model), config.model_dump(), batch.tokens[row].tolist(),
            batch.mask[row].tolist(), config.num_segments, memories,
        )
        close(found[row], np.stack(memories))
    assert torch.equal(found[3, 2], found[3, 1])  # its second segment holds nothing


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_segment_is_pure(pooling):
    """Repeated calls give equal results, also between other calls: the model keeps no state."""
    config = small_config(pooling=pooling)
    model, batch = small_model(config), small_batch(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    call = (batch.tokens[:, :4], model.initial_memory(5), 1, batch.mask[:, :4])
    first = model.segment(*call)
    model(batch.tokens)
    second = model.segment(*call)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_samples_of_a_batch_do_not_see_each_other(attention_type):
    config = small_config(attention_type=attention_type)
    model, batch = small_model(config), small_batch(config)
    together = model(batch.tokens, batch.mask)
    for row in range(len(together)):
        alone = model(batch.tokens[row : row + 1], batch.mask[row : row + 1])
        close(alone[0], together[row], 1e-12)


@pytest.mark.parametrize(("attention_type", "memory_tokens"), [
    pair for pair in itertools.product(ATTENTIONS, [0, 2]) if pair != ("luna", 0)
])
def test_only_the_memory_joins_segments(attention_type, memory_tokens):
    config = small_config(
        attention_type=attention_type, num_memory_tokens=memory_tokens, pooling="last"
    )
    model, tokens = small_model(config), small_batch(config, None).tokens
    changed = tokens.clone()
    changed[:, :4] = 16 - tokens[:, :4]
    assert torch.equal(model(tokens), model(changed)) == (memory_tokens == 0)
