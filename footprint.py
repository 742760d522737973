"""What a configuration's model needs of memory, estimated before any of it is built."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from lra_config import Config, ConfigError

FLOAT = 4  # bytes of a weight
LAYER_OVERHEAD = 20_000  # bytes of a layer's modules, whatever its width
TRAINING_COPIES = 4  # weights, gradients and the optimizer's two moments
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

Terms = dict[tuple[str, ...], int]  # keys of the configuration to the weights they decide


def weight_terms(config: Config) -> Terms:
    """The weights of the model without biases and norms, by the keys that decide their number."""
    D, H, M = config.dim, config.num_heads, config.num_memory_tokens
    d = D // H
    m = config.num_hidden or d
    layers = config.num_layers
    terms = {
        ("dim",): config.task.tokenizer.vocab_size * D + layers * D * D,
        ("dim", "num_hidden"): layers * D * H * (2 * m + d),
        ("dim", "ffn_dim"): layers * 2 * D * config.ffn_dim,
        ("dim", "num_memory_tokens"): M * D,
    }
    if config.position_embedding == "learned":
        terms["dim", "max_seq_len"] = config.segment_len * config.num_segments * D
        terms["dim", "max_seq_len"] //= config.num_sequences
    if config.attention_type == "astro" and config.hebbian_astro:
        rows = M + config.segment_len
        terms["num_hidden", "max_seq_len", "num_memory_tokens"] = layers * H * m * rows
    if config.classifier_dim:
        features = D if config.num_sequences == 1 else 4 * D  # of a pair's match
        terms["dim", "classifier_dim"] = features * config.classifier_dim
    if config.attention_type == "luna":
        terms["dim", "attention_type"] = layers * 2 * D * D
    if config.attention_type == "nystrom":
        terms["num_heads", "nystrom_conv"] = layers * H * config.nystrom_conv
    return terms


def weight_bytes(config: Config) -> int:
    """What the weights take at least."""
    return FLOAT * sum(weight_terms(config).values())


def check_fits(config: Config, *, training: bool, memory: int | None = None) -> None:
    """Refuse a model that cannot fit, before it is built.

    Args:
        training: with gradients and the optimizer's moments, else the weights alone.
        memory: bytes there are; None asks the machine. What activations take is not counted.
    Raises:
        ConfigError: naming the keys that decide the most of it.
    """
    copies = TRAINING_COPIES if training else 1
    terms = {keys: FLOAT * copies * count for keys, count in weight_terms(config).items()}
    terms["num_layers",] = LAYER_OVERHEAD * config.num_layers
    terms["num_segments",] = 8 * config.num_segments
    needed = sum(terms.values())
    memory = available_memory() if memory is None else memory
    if memory is not None and needed > memory:
        largest = max(terms, key=terms.__getitem__)
        keys = ", ".join(f"{key}={getattr(config, key)}" for key in largest)
        raise ConfigError(
            f"{keys}: the model takes {_gib(needed)} GiB at least"
            f"{' in training' if training else ''}, there are {_gib(memory)}; lower one of them"
        )


def _gib(size: int) -> str:
    gib = size / 2**30
    return f"{gib:,.1f}" if gib < 10**6 else f"{gib:.1e}"


def available_memory() -> int | None:
    """Bytes that this process may still take: what the system has free, swap included, or less
    where a container has a limit; None where neither is told."""
    figures = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        figures.append(1024 * (kib["MemAvailable"] + kib["SwapFree"]))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if not figures:  # not Linux
            figures.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            figures.append(int(Path(path).read_text()))
    return min(figures, default=None)
