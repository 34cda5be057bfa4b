"""pytorch-quantization's published searches on a linear histogram, spelled out in float64 loops.

Left out are the faults that the original is known for: a percentile that falls into the first bin
gives amax 0 there (which deletes the tensor), the entropy search writes into the histogram it
reads, fp32 counts saturate, and a candidate with nothing inside has divergence NaN, which numpy's
argmin takes for the least.
"""

import numpy as np

LEVELS = 128  # magnitudes of a signed 8-bit code
START_BIN = 128


def percentile(counts: np.ndarray, edges: np.ndarray, percent: float) -> float:
    cumulated = 0.0
    for i, count in enumerate(counts):
        cumulated += count
        if cumulated / counts.sum() >= percent / 100:
            return float(edges[i]) if i else float(edges[1])
    return float(edges[len(counts) - 1])


def squared_error(values: np.ndarray, counts: np.ndarray, amax: float) -> float:
    scale = 127 / amax
    rounded = np.clip(np.rint(values * scale), -128, 127) / scale
    return float(((rounded - values) ** 2 * counts).sum())


def mse_errors(counts: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Candidates, the centres of the bins from START_BIN on, and the error of each."""
    centres = (edges[1:] + edges[:-1]) / 2
    candidates = centres[START_BIN:]
    return candidates, np.array([squared_error(centres, counts, a) for a in candidates])


def divergence(counts: np.ndarray, bins: int, beyond: float = 0.0) -> float:
    """Kullback-Leibler divergence of the clipped distribution from its 128-level version."""
    inside, tail = counts[:bins], counts[bins:].sum() + beyond
    if inside.sum() == 0:
        return np.inf
    group = np.arange(bins) * LEVELS // bins
    filled = inside > 0
    mass = np.bincount(group, inside, LEVELS)
    members = np.bincount(group[filled], minlength=LEVELS)
    level = mass / np.maximum(members, 1)
    q = np.where(filled, level[group], 0.0)
    p = inside.astype(np.float64).copy()
    p[-1] += tail
    p, q = p / p.sum(), q / q.sum()
    with np.errstate(divide="ignore"):
        return float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())


def entropy_divergences(
    counts: np.ndarray, beyond: float = 0.0, keep_first: bool = False
) -> np.ndarray:
    """The divergence of each candidate: START_BIN, ..., all bins. The last least one is taken.

    ``beyond`` and ``keep_first`` are ours: counts above the last bin, and a first bin as it is.
    """
    counts = counts.astype(np.float64).copy()
    if not keep_first:
        counts[0] = counts[1]
    return np.array([divergence(counts, i, beyond) for i in range(START_BIN, len(counts) + 1)])


def last_argmin(values: np.ndarray) -> int:
    return len(values) - 1 - int(np.argmin(values[::-1]))
