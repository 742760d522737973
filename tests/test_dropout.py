"""Dropout: its rate, its independence between masks and elements, and repetition by key."""

from __future__ import annotations

import pytest
import torch

from attention.dropout import derive_keys, draw_seed, dropout, mix

ONES = torch.ones(400, 500)
STANDARD_ERRORS = 5


def kept(p: float, seed: int, number: int = 0) -> torch.Tensor:
    key = derive_keys(torch.tensor(seed), number, 1)[0]
    return dropout(ONES, p, key) != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p_and_the_mean_stays(p):
    key = derive_keys(torch.tensor(3), 0, 1)[0]
    out = dropout(ONES, p, key)
    tolerance = STANDARD_ERRORS * (p * (1 - p) / ONES.numel()) ** 0.5
    assert abs(float((out == 0).double().mean()) - p) < tolerance
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / (1 - p)))


def test_a_key_repeats_its_mask_and_none_drops_nothing():
    assert torch.equal(kept(0.3, seed=1), kept(0.3, seed=1))
    assert dropout(ONES, 0.3, None) is ONES


def test_the_seed_is_always_drawn_on_the_cpu():
    """A failed capture leaves a CUDA generator unusable."""
    torch.manual_seed(1)
    numbers = [int(draw_seed(torch.device("cpu"))) for _ in range(2)]
    torch.manual_seed(1)
    assert draw_seed(torch.device("meta")).device.type == "meta"
    assert int(draw_seed(torch.device("cpu"))) == numbers[1] != numbers[0]


@pytest.mark.parametrize(("other_seed", "other_number"), [(1, 5), (2, 4), (12345, 4)])
def test_masks_of_different_numbers_and_seeds_are_independent(other_seed, other_number):
    a = kept(0.5, seed=1, number=4).double() - 0.5
    b = kept(0.5, seed=other_seed, number=other_number).double() - 0.5
    bound = STANDARD_ERRORS * 0.25 / ONES.numel() ** 0.5
    assert abs(float((a * b).mean())) < bound
    # They are not shifted copies of each other or of themselves, either.
    for shift in (1, 2, 64, 500):
        shifted = a.flatten().roll(shift).view_as(a)
        assert abs(float((shifted * b).mean())) < bound
        assert abs(float((shifted * a).mean())) < bound


def test_the_hash_is_a_bijection_of_32_bits():
    x = torch.arange(2**16) * 65_537 % 2**32
    mixed = mix(x)
    assert mixed.unique().numel() == x.unique().numel()
    assert 0 <= int(mixed.min()) and int(mixed.max()) < 2**32
