"""The paper's equations written out: one sample, one row at a time, in double precision.

It shares no code with the implementation. A model is a mapping from the names of its weights to
arrays and a mapping of the configuration's keys; a segment is a loop, a mask is an `if`. Letters
are the paper's: X (n x D) rows of a segment, M memory tokens before S tokens, m neurons of a head.

Source: RMAAT (arXiv 2601.00426); AT (arXiv 2312.10925), Eqs. 11-17.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from macro_model_reference import retention_factors

Array = np.ndarray
Weights = Mapping[str, Array]
Keys = Mapping[str, object]  # of the configuration


# ---- attention inside a segment ------------------------------------------------------------------


def phi(x: Array) -> Array:
    """Return elu(x) + 1."""
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(scores: Sequence[float]) -> Array:
    powers = [math.exp(score) for score in scores]
    return np.array(powers) / sum(powers)


def position_kernel(n: int, decay_scale: float) -> Array:
    """Return P_ij = exp(-|i - j| decay_scale), (n x n)."""
    kernel = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            kernel[i, j] = math.exp(-abs(i - j) * decay_scale)
    return kernel


def relative_positions(basis: Array, decay_scale: float) -> Array:
    """Return R = B^T D with D = B P B^T, (n x m), of one head's B (m x n)."""
    between_neurons = basis @ position_kernel(basis.shape[1], decay_scale) @ basis.T  # D (m x m)
    return basis.T @ between_neurons


def astromorphic_head(
    Q: Array, K: Array, V: Array, real: Sequence[bool], R: Array | None, *,
    alpha: float, divisor: float, take_sigmoid: bool = False, normalize: bool = True,
) -> Array:
    """Return (phi(Q) H) * P, (n x d_v), without the residual; without H_astro if R is None."""
    n, m = Q.shape
    neuron, astro = np.zeros((m, V.shape[1])), np.zeros((m, V.shape[1]))
    total = np.zeros(m)
    for t in range(n):
        if real[t]:
            neuron += np.outer(phi(K[t]), V[t]) / divisor
            total += phi(K[t])
            if R is not None:
                astro += np.outer(phi(R[t]), V[t]) / divisor
    hebbian = sigmoid(neuron + astro) if take_sigmoid else neuron + astro
    g = np.array([value**alpha if value > 0 else 0.0 for value in total])

    output = np.zeros((n, V.shape[1]))
    for i in range(n):
        calcium = sum(phi(Q[i, a]) * g[a] for a in range(m))
        inverse = 1 / calcium if calcium != 0 else 0.0
        for a in range(m):
            output[i] += phi(Q[i, a]) * hebbian[a] * (inverse if normalize else 1.0)
    return output


def linear_head(Q: Array, K: Array, V: Array, real: Sequence[bool]) -> Array:
    """Return rows i: sum_t w_it v_t / sum_t w_it with w_it = phi(q_i) phi(k_t)."""
    output = np.zeros((len(Q), V.shape[1]))
    for i in range(len(Q)):
        weights = [phi(Q[i]) @ phi(K[t]) if real[t] else 0.0 for t in range(len(K))]
        output[i] = sum(w * v for w, v in zip(weights, V, strict=True)) / sum(weights)
    return output


def softmax_head(Q: Array, K: Array, V: Array, real: Sequence[bool]) -> Array:
    """Return rows i: the mean of the real rows of V, weighted by exp(q_i k_t / sqrt(d))."""
    seen = [t for t in range(len(K)) if real[t]]
    output = np.zeros((len(Q), V.shape[1]))
    for i in range(len(Q)):
        weights = softmax([Q[i] @ K[t] / math.sqrt(Q.shape[1]) for t in seen])
        output[i] = sum(w * V[t] for w, t in zip(weights, seen, strict=True))
    return output


def nystrom_head(
    Q: Array, K: Array, V: Array, real: Sequence[bool], kernel: Array | None, *,
    landmarks: int, iterations: int,
) -> Array:
    """F Z B V plus the convolution of V, in which padded rows are zero; padded rows stay zero."""
    seen = [t for t in range(len(K)) if real[t]]
    count = min(len(seen), landmarks)
    runs = [[t for rank, t in enumerate(seen) if rank * count // len(seen) == j]
            for j in range(count)]
    mean_q = [sum(Q[t] for t in run) / len(run) for run in runs]
    mean_k = [sum(K[t] for t in run) / len(run) for run in runs]

    def weights(queries: Sequence[Array], keys: Sequence[Array]) -> Array:
        return np.array([
            softmax([q @ k / math.sqrt(Q.shape[1]) for k in keys]) for q in queries
        ])

    F = weights([Q[t] for t in seen], mean_k)
    A = weights(mean_q, mean_k)
    B = weights(mean_q, [K[t] for t in seen])
    Z = A.T / (max(np.abs(A).sum(axis=0)) * max(np.abs(A).sum(axis=1)))
    for _ in range(iterations):
        AZ = A @ Z
        Z = Z @ (13 * np.eye(count) - 15 * AZ + 7 * AZ @ AZ - AZ @ AZ @ AZ) / 4
    output = np.zeros((len(Q), V.shape[1]))
    output[seen] = F @ Z @ B @ V[seen]
    if kernel is not None:
        for i in seen:
            for tap, weight in enumerate(kernel):
                t = i + tap - len(kernel) // 2
                if 0 <= t < len(V) and real[t]:
                    output[i] += weight * V[t]
    return output


def attend(weights: Weights, layer: str, keys: Keys, X: Array, real: Sequence[bool]) -> Array:
    """Return the attention block of one layer without its residual, (n x D)."""
    D, heads = X.shape[1], keys["num_heads"]
    d = D // heads
    kind = keys["attention_type"]
    m = d if keys["num_hidden"] is None else keys["num_hidden"]
    W = weights[layer + "attention.to_qkv.weight"]  # W_Q, W_K, W_V below each other, transposed
    Q, K, V = X @ W[: heads * m].T, X @ W[heads * m : 2 * heads * m].T, X @ W[2 * heads * m :].T

    def project(concatenated: Array) -> Array:
        return (
            concatenated @ weights[layer + "attention.to_out.weight"].T
            + weights[layer + "attention.to_out.bias"]
        )

    def of_head(h: int, *matrices: Array) -> list[Array]:
        return [np.split(matrix, heads, axis=1)[h] for matrix in matrices]

    if kind == "luna":
        M = keys["num_memory_tokens"]
        W_packed = weights[layer + "attention.to_packed_kv.weight"]
        packed = np.hstack([
            softmax_head(q[:M], k[M:], v[M:], real[M:])
            for q, k, v in (of_head(h, Q, K, V) for h in range(heads))
        ])
        packed_K, packed_V = packed @ W_packed[:D].T, packed @ W_packed[D:].T
        unpacked = np.hstack([
            softmax_head(of_head(h, Q)[0][M:], *of_head(h, packed_K, packed_V), [True] * M)
            for h in range(heads)
        ])
        return np.vstack([packed, project(unpacked)])

    columns = []
    for h in range(heads):
        q, k, v = of_head(h, Q, K, V)
        if kind == "softmax":
            columns.append(softmax_head(q, k, v, real))
        elif kind == "linear":
            columns.append(linear_head(q, k, v, real))
        elif kind == "nystrom":
            kernel = None
            if keys["nystrom_conv"]:
                kernel = weights[layer + "attention.convolution.weight"][h, 0, :, 0]
            columns.append(nystrom_head(
                q, k, v, real, kernel,
                landmarks=keys["nystrom_landmarks"], iterations=6,
            ))
        else:
            R = None
            if keys["hebbian_astro"]:
                basis = weights[layer + "attention.position_basis"][h]
                R = relative_positions(basis, keys["decay_scale"])
            columns.append(astromorphic_head(
                q, k, v, real, R, alpha=keys["presynaptic_alpha"],
                divisor=m if keys["hebbian_divisor"] is None else keys["hebbian_divisor"],
                take_sigmoid=keys["hebbian_sigmoid"], normalize=keys["presynaptic_normalize"],
            ))
    return project(np.hstack(columns))


# ---- the encoder ---------------------------------------------------------------------------------


def layer_norm(x: Array, weights: Weights, name: str) -> Array:
    """Normalize each row to mean 0 and variance 1, then apply weight and bias."""
    rows = []
    for row in x:
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        rows.append((row - mean) / math.sqrt(variance + 1e-5))
    return np.array(rows).reshape(x.shape) * weights[name + ".weight"] + weights[name + ".bias"]


def gelu(x: Array | Sequence[Array]) -> Array:
    """Return x times the normal distribution function of x."""
    return np.array([
        [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in row] for row in x
    ])


def encoder_layer(
    weights: Weights, layer: str, keys: Keys, X: Array, real: Sequence[bool]
) -> Array:
    """Post-norm: LN(x + attention), then LN(x + feed-forward). Luna's memory skips the second."""
    X = layer_norm(X + attend(weights, layer, keys, X, real), weights, layer + "attention_norm")
    hidden = gelu(X @ weights[layer + "expand.weight"].T + weights[layer + "expand.bias"])
    fed = hidden @ weights[layer + "contract.weight"].T + weights[layer + "contract.bias"]
    Y = layer_norm(X + fed, weights, layer + "feed_forward_norm")
    if keys["attention_type"] == "luna":
        M = keys["num_memory_tokens"]
        Y[:M] = X[:M]
    return Y


def position_embedding(weights: Weights, keys: Keys, at: int) -> Array:
    """Return the embedding of position `at` of the full sequence, counted from 0."""
    D = keys["dim"]
    if keys["position_embedding"] == "learned":
        return weights["position_table"][at]
    embedding = np.zeros(D)
    if keys["position_embedding"] == "sinusoidal":
        for i in range(D // 2):
            angle = at / 10_000 ** (2 * i / D)
            embedding[i], embedding[D // 2 + i] = math.sin(angle), math.cos(angle)
    return embedding


def encode(
    weights: Weights, keys: Keys, tokens: Sequence[int], real: Sequence[bool], T: int,
    memories: list[Array] | None = None,
) -> Array:
    """Run the segments of one sequence and pool the read-out, (D,).

    Args:
        memories: receives mem_1 ... mem_{T+1}.
    """
    M, S = keys["num_memory_tokens"], keys["max_seq_len"] // keys["num_segments"]
    tokens = [*tokens, *[0] * (T * S - len(tokens))]
    real = [*real, *[False] * (T * S - len(real))]
    factors = retention_factors(T) if keys["astro_mem"] else [1.0] * T
    memory = weights["memory"]
    memories = [] if memories is None else memories
    memories.append(memory)
    token_outputs, last_tokens, last_memory = [], None, None
    for t in range(1, T + 1):
        first = (t - 1) * S
        of_segment = real[first : first + S]
        if any(of_segment):
            x = np.array([
                weights["token_embedding.weight"][tokens[first + i]]
                + position_embedding(weights, keys, first + i)
                for i in range(S)
            ])
            rows = np.vstack([memory, layer_norm(x, weights, "embedding_norm")])
            for number in range(keys["num_layers"]):
                rows = encoder_layer(
                    weights, f"layers.{number}.", keys, rows, [True] * M + of_segment
                )
            last_memory = rows[:M]
            memory = factors[t - 1] * last_memory
            last_tokens = [rows[M + i] for i in range(S) if of_segment[i]]
            token_outputs += last_tokens
        memories.append(memory)
    if not token_outputs:
        return np.zeros(keys["dim"])
    pooled = {"mean": token_outputs, "last": last_tokens, "memory": last_memory}[keys["pooling"]]
    return sum(pooled) / len(pooled)


def logits(
    weights: Weights, keys: Keys, tokens: Sequence[int], real: Sequence[bool] | None = None
) -> Array:
    """Return the logits of one example, (C,), by the full forward pass."""
    real = [True] * len(tokens) if real is None else list(real)
    if keys["document_pair"] == "separate":
        half = len(tokens) // 2
        u, v = (
            encode(weights, keys, tokens[part], real[part], keys["num_segments"] // 2)
            for part in (slice(half), slice(half, None))
        )
        pooled = np.concatenate([u, v, u * v, u - v])
    else:
        pooled = encode(weights, keys, tokens, real, keys["num_segments"])
    if keys["classifier_dim"] is None:
        return weights["head.weight"] @ pooled + weights["head.bias"]
    hidden = gelu([weights["head.0.weight"] @ pooled + weights["head.0.bias"]])[0]
    return weights["head.2.weight"] @ hidden + weights["head.2.bias"]


def mean_loss(
    weights: Weights, keys: Keys, tokens: Array, mask: Array | None, labels: Sequence[int]
) -> float:
    """Return the mean over the examples of -log softmax(logits)[label], in nats."""
    losses = []
    for row, label in enumerate(labels):
        scores = logits(weights, keys, tokens[row], None if mask is None else mask[row])
        losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[label])
    return sum(losses) / len(losses)
