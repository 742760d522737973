"""Astromorphic attention and AMRB in a model of your own: a signal is classified by how it began.

    python examples/own_model.py

The input is a signal of 256 samples: noise around zero, and in its first quarter around one of four
levels, which is the class. Four segments are encoded one after the other. The class is visible in
the first segment only, so the memory tokens have to carry it through all others.
`recurrence.SegmentRecurrent` states what AMRB requires of a model, and runs the loop over segments.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this is a repository to run from

import torch
from torch import Tensor, nn

from astrocyte import retention_factors
from attention import AstromorphicAttention
from dataloader import Batch
from lra_config import make_config
from recurrence import SegmentRecurrent
from training.gradients import amrb_backward, bptt_backward

LENGTH, SEGMENTS, MEMORY, DIM, CLASSES = 256, 4, 2, 32, 4


class SignalClassifier(SegmentRecurrent):
    """Windows of a signal and memory tokens through pre-norm layers; the last memory is read."""

    def __init__(self, num_layers: int = 2, window: int = 4) -> None:
        super().__init__()
        self.window = window  # samples per token
        self.max_seq_len, self.segment_len = LENGTH, LENGTH // SEGMENTS
        tokens = LENGTH // window
        # The attention reads its sizes and switches here; the data set has no effect.
        config = make_config({
            "dataset": "imdb_lra", "dim": DIM, "num_heads": 4, "num_memory_tokens": MEMORY,
            "max_seq_len": tokens, "num_segments": SEGMENTS,
        })
        self.embed = nn.Linear(window, DIM)
        self.memory = nn.Parameter(0.1 * torch.randn(MEMORY, DIM))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(num_layers))
        self.attentions = nn.ModuleList(AstromorphicAttention(config) for _ in range(num_layers))
        for attention in self.attentions:
            # Small at first, so that it does not dominate the memory to which it is added.
            attention.to_out.weight.data *= 0.1
        self.feed_forwards = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 64), nn.GELU(), nn.Linear(64, DIM))
            for _ in range(num_layers)
        )
        self.leave = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)
        factors = SEGMENTS * retention_factors(SEGMENTS).float()  # of mean 1
        self.register_buffer("factors", factors)

    def positions(self) -> Tensor:
        """Return phi(R) of all layers, (layers, H, N, m): once per step, not once per segment."""
        return torch.stack([attention.positions() for attention in self.attentions])

    def initial_memory(self, batch_size: int) -> Tensor:
        return self.memory.expand(batch_size, -1, -1)

    def segment(
        self, tokens: Tensor, memory: Tensor, index: int, mask: Tensor | None = None,
        positions: Tensor | None = None, seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode samples (B, S) of segment `index`. Nothing is padded or random here."""
        windows = tokens.unflatten(1, (-1, self.window))  # (B, S / window, window)
        x = torch.cat([memory, self.embed(windows)], dim=1)  # (B, N, D)
        for layer, attention in enumerate(self.attentions):
            # The attention has no residual: it is added here.
            x = x + attention(self.norms[layer](x), None, positions[layer])
            x = x + self.feed_forwards[layer](x)
        memory = self.leave(x[:, :MEMORY])
        return self.factors[index] * memory, memory.mean(dim=1)

    def combine(self, readouts: list[Tensor], mask: Tensor | None = None) -> Tensor:
        return readouts[-1]


def signals(count: int, generator: torch.Generator) -> Batch:
    """Return signals (count, LENGTH) and the level (count,) around which each begins."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    samples = torch.randn(count, LENGTH, generator=generator)
    samples[:, : LENGTH // SEGMENTS] += labels[:, None] - (CLASSES - 1) / 2
    return Batch(samples, None, labels)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = SignalClassifier()

    batch = signals(32, generator)
    gradients = []
    for backward in (bptt_backward, amrb_backward):
        model.zero_grad()
        backward(model, batch)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    print(f"AMRB and BPTT: gradients differ by {difference:.1e} of their norm")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        result = amrb_backward(model, signals(64, generator))
        optimizer.step()
        if step % 20 == 0 or step == steps:
            print(f"step {step}: loss {result.loss:.3f}")
    test = signals(1_000, generator)
    with torch.no_grad():
        accuracy = (model(test.tokens).argmax(dim=1) == test.labels).float().mean()
    print(f"test accuracy {accuracy:.3f}, chance {1 / CLASSES:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
