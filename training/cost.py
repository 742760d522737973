"""What a training step takes: operations, counted on the model itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dataloader import Batch
from model import RMAAT


def count_flop(model: RMAAT, batch: Batch) -> float | None:
    """Multiplications and additions of matrix products in one step, the replay included.

    None for the softmax systems: not every fused kernel of softmax attention is counted.
    """
    config = model.config
    if config.attention_type not in ("astro", "linear"):
        return None
    parameters = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    model.eval()  # no statistics are taken in, no mask is drawn
    try:
        with torch.compiler.set_stance("force_eager"):
            with FlopCounterMode(display=False) as counter:
                loss = F.cross_entropy(model(batch.tokens, batch.mask), batch.labels)
                torch.autograd.grad(loss, parameters, allow_unused=True)
            flop = counter.get_total_flops()
            if config.memory_replay_backprop:
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    model(batch.tokens, batch.mask)
                T = config.num_segments // config.num_sequences
                again = T - 1  # the last segment runs once
                if isinstance(config.replay_segments, int):
                    again = config.replay_segments
                flop += counter.get_total_flops() * again / T
    finally:
        model.train(training)
    return flop


def flop_per_token(model: RMAAT, batch: Batch) -> float | None:
    """`count_flop` of a step over its tokens, padding counted with both, from two of its rows.

    What does not grow with the rows, the position terms, is shared out over all of them.
    """
    one, two = (
        count_flop(model, Batch(*(None if x is None else x[:rows] for x in batch)))
        for rows in (1, min(2, len(batch.labels)))
    )
    if one is None or len(batch.labels) < 2:
        return one if one is None else one / batch.tokens.numel()
    row = two - one
    return (one - row + len(batch.labels) * row) / batch.tokens.numel()
