"""Small models and batches for the comparison with the references, in double precision.

Every key that a reference assumes is written here, so that a default may change without a test of
the paper changing its meaning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from attention import astromorphic, baselines
from attention.fused import plain_response
from dataloader import Batch
from lra_config import Config, make_config
from model import RMAAT, build_model

Numbers = Tensor | np.ndarray | list

KEYS = {
    "dataset": "listops", "document_pair": "joint", "device": "cpu", "precision": "float32",
    "compile": False, "cuda_graphs": False,
    "max_seq_len": 12, "num_segments": 3, "num_memory_tokens": 2, "astro_mem": True,
    "memory_replay_backprop": True,
    "attention_type": "astro", "dim": 8, "num_layers": 2, "num_heads": 2, "ffn_dim": 6,
    "dropout": 0.0, "pooling": "mean", "readout_norm": "none", "classifier_dim": None,
    "token_embedding": "random",
    "position_embedding": "learned",
    "num_hidden": None, "hebbian_astro": True, "hebbian_sigmoid": False, "hebbian_divisor": None,
    "presynaptic_alpha": 0.25, "presynaptic_normalize": True, "decay_scale": 0.5,
    "basis_init": "random",
    "nystrom_landmarks": 4, "nystrom_conv": 3,
}

ATTENTIONS = ("astro", "softmax", "linear", "nystrom", "luna")
POOLINGS = ("mean", "last", "memory")
# Whole; cut inside a segment; nothing; a hole of a whole segment and of single tokens; no start.
MASKS = (
    (1,) * 12,
    (1,) * 7 + (0,) * 5,
    (0,) * 12,
    (1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0),
    (0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0),
)


def small_config(**changes) -> Config:
    return make_config({**KEYS, **changes})


def shaken(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """In double precision, with noise on every weight: none is 0 or 1, where changes would hide."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise)
    return module


def small_model(config: Config, seed: int = 0) -> RMAAT:
    """It runs every segment for every sample, where the rules of padding have to hold."""
    torch.manual_seed(seed)
    model = shaken(build_model(config), seed)
    model.fixed_shapes = True
    return model


def small_batch(config: Config, masks: tuple[tuple[int, ...], ...] | None = MASKS) -> Batch:
    """Random tokens, at padding too; without masks three whole sequences."""
    generator = torch.Generator().manual_seed(1)
    B = 3 if masks is None else len(masks)
    tokens = torch.randint(1, 16, (B, config.max_seq_len), generator=generator)
    labels = torch.randint(config.task.num_classes, (B,), generator=generator)
    return Batch(tokens, None if masks is None else torch.tensor(masks).bool(), labels)


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The weights by name, as the references read them."""
    return {name: value.detach().numpy().copy() for name, value in module.named_parameters()}


def reference_logits(model: RMAAT, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the written-out forward pass makes of the model's weights, (B, C)."""
    weights, keys = arrays(model), model.config.model_dump()
    rows = [
        reference.logits(
            weights, keys, tokens[row].tolist(), None if mask is None else mask[row].tolist()
        )
        for row in range(len(tokens))
    ]
    return torch.from_numpy(np.array(rows))


def close(actual: Numbers, expected: Numbers, tolerance: float = 1e-9) -> None:
    """Equal up to `tolerance`, relative or absolute, and finite."""
    actual, expected = (
        value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        for value in (actual, expected)
    )
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=False)


@contextlib.contextmanager
def plain_form() -> Iterator[None]:
    """The response by the equations themselves, in the place of its written-out gradient."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (astromorphic, baselines):
            patch.setattr(module, "respond", plain_response)
        yield
