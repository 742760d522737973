"""Small models and batches for the comparison with the references, in double precision.

Every key that a reference assumes is set here, so that a new default does not change the meaning of
a test.
"""

from __future__ import annotations

import numpy as np
import reference
import torch
from torch import Tensor

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
    "basis_init": "random", "attention_backend": "fused", "token_mixer": "none",
    "nystrom_landmarks": 4, "nystrom_conv": 3,
}

ATTENTIONS = ("astro", "softmax", "linear", "nystrom", "luna")
POOLINGS = ("mean", "last", "memory")
# Full; cut inside a segment; empty; a gap of a full segment and of single tokens; no first tokens.
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
    """Return the model in double precision, with noise on every weight, so that none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise)
    return module


def small_model(config: Config, seed: int = 0) -> RMAAT:
    """Return a model that runs every segment for every sample, padding included."""
    torch.manual_seed(seed)
    model = shaken(build_model(config), seed)
    model.fixed_shapes = True
    return model


def small_batch(config: Config, masks: tuple[tuple[int, ...], ...] | None = MASKS) -> Batch:
    """Return random tokens, at padding too; without masks three full sequences."""
    generator = torch.Generator().manual_seed(1)
    B = 3 if masks is None else len(masks)
    tokens = torch.randint(1, 16, (B, config.max_seq_len), generator=generator)
    labels = torch.randint(config.task.num_classes, (B,), generator=generator)
    return Batch(tokens, None if masks is None else torch.tensor(masks).bool(), labels)


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return the weights by name, as the references read them."""
    return {name: value.detach().numpy().copy() for name, value in module.named_parameters()}


def reference_logits(model: RMAAT, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the logits (B, C) of the reference forward pass with the model's weights."""
    weights, keys = arrays(model), model.config.model_dump()
    rows = [
        reference.logits(
            weights, keys, tokens[row].tolist(), None if mask is None else mask[row].tolist()
        )
        for row in range(len(tokens))
    ]
    return torch.from_numpy(np.array(rows))


def close(actual: Numbers, expected: Numbers, tolerance: float = 1e-9) -> None:
    """Assert equality up to `tolerance`, relative or absolute, and finite values."""
    actual, expected = (
        value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        for value in (actual, expected)
    )
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=False)
