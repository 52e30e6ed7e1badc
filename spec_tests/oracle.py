"""One step of the Compressive Transformer for one row, written with plain loops over Python floats.

No tensor, no mask, no shift, no batch: each line is a line of the paper. Weights are nested lists,
matrices input x output; `weights`, `settings` and `declared` are the adapter's.
"""

import math
from typing import Any, NamedTuple

from .adapter import Declaration, Settings

Vector = list[float]


class Result(NamedTuple):
    logits: list[Vector]
    mem: list[list[Vector]]  # a list of slots for each layer
    c_mem: list[list[Vector]]
    attention: list[list[list[Vector]]]  # for each layer [head][query][slot that the query sees]
    squares: list[tuple[float, int]]


def lists(weights: Any) -> Any:
    """The adapter's weights, tensors no more."""
    if isinstance(weights, dict):
        return {name: lists(value) for name, value in weights.items()}
    return [lists(value) for value in weights] if isinstance(weights, list) else weights.tolist()


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def add(a: Vector, b: Vector) -> Vector:
    return [x + y for x, y in zip(a, b, strict=True)]


def times(x: Vector, matrix: list[Vector]) -> Vector:
    return [dot(x, column) for column in zip(*matrix, strict=True)]


def layer_norm(x: Vector, weight: Vector, bias: Vector) -> Vector:
    mean = math.fsum(x) / len(x)
    variance = math.fsum((a - mean) ** 2 for a in x) / len(x)
    return [
        (a - mean) / math.sqrt(variance + 1e-5) * w + b
        for a, w, b in zip(x, weight, bias, strict=True)
    ]


def softmax(scores: Vector) -> Vector:
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / math.fsum(powers) for power in powers]


def sinusoid(distance: float, width: int) -> Vector:
    angles = [distance / 10000 ** (2 * i / width) for i in range(width // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def head(x: Vector, i: int, heads: int) -> Vector:
    width = len(x) // heads
    return x[i * width : (i + 1) * width]


def mix(weights: Vector, values: list[Vector]) -> Vector:
    return [dot(weights, list(column)) for column in zip(*values, strict=True)]


def attend(w: dict, x: list[Vector], memory: list[Vector]) -> tuple[list[Vector], Any]:
    """Relative attention of the segment x over memory and itself."""
    heads = len(w["content_bias"])
    slots = memory + x
    keys, values = [times(s, w["key"]) for s in slots], [times(s, w["value"]) for s in slots]
    relative = [times(sinusoid(d, len(x[0])), w["relative_key"]) for d in range(len(slots))]
    attention: Any = [[] for _ in range(heads)]
    output = []
    for t, h in enumerate(x):
        here = len(memory) + t  # the slot that is position t
        query, mixed = times(h, w["query"]), []
        for i in range(heads):
            q, u, v = head(query, i, heads), w["content_bias"][i], w["position_bias"][i]
            scores = []
            for j in range(here + 1):
                content = dot(add(q, u), head(keys[j], i, heads))
                position = dot(add(q, v), head(relative[here - j], i, heads))
                scores.append((content + position) / math.sqrt(len(q)))
            attention[i].append(softmax(scores))
            mixed += mix(attention[i][t], [head(value, i, heads) for value in values[: here + 1]])
        output.append(times(mixed, w["output"]))
    return output, attention


def average_usage(attention: Any, slots: int) -> Vector:
    """The attention that each slot received, averaged over the heads and queries that saw it."""
    usage = []
    for j in range(slots):
        received = [seen[j] for queries in attention for seen in queries if j < len(seen)]
        usage.append(math.fsum(received) / len(received))
    return usage


def convolve(block: list[Vector], kernel: list[list[Vector]]) -> Vector:
    slot = [0.0] * len(kernel[0][0])
    for vector, matrix in zip(block, kernel, strict=True):
        slot = add(slot, times(vector, matrix))
    return slot


def compress(name: str, w: dict, old: list[Vector], usage: Vector, c: int) -> list[Vector]:
    """f_c."""
    n, zeros = len(old) // c, [0.0] * len(old[0])
    if name == "most_used":
        ranked = sorted(range(len(old)), key=lambda j: (-usage[j], j))
        return [old[j] for j in sorted(ranked[:n])]
    if name == "dilated_conv":
        for kernel, dilation in zip(w["dilated"], (1, 2, 4), strict=True):
            older = [old[j - dilation] if j >= dilation else zeros for j in range(len(old))]
            old = [
                [max(0.0, a) for a in convolve([before, now], kernel)]
                for before, now in zip(older, old, strict=True)
            ]
    slots = []
    for k in range(n):
        block = old[c * k : c * (k + 1)]
        if name == "mean_pool":
            slots.append([math.fsum(column) / c for column in zip(*block, strict=True)])
        elif name == "max_pool":
            slots.append([max(column) for column in zip(*block, strict=True)])
        else:
            slots.append(add(convolve(block, w["convolution"]), w.get("convolution_bias", zeros)))
    return slots


def as_read(
    declared: Declaration, settings: Settings, w: dict, slots: list[Vector]
) -> list[Vector]:
    """Slots as attention reads them: those stored raw are normalised first, in pre-norm."""
    if declared.storage == "normalised" or not settings.norm_first:
        return slots
    return [layer_norm(slot, w["norm1_weight"], w["norm1_bias"]) for slot in slots]


def content_attention(w: dict, heads: int, x: list[Vector], slots: list[Vector]) -> list[Vector]:
    """Algorithm 2's attention: content alone, every slot seen, heads side by side."""
    keys, values = [times(s, w["key"]) for s in slots], [times(s, w["value"]) for s in slots]
    if "value_bias" in w:
        values = [add(value, w["value_bias"]) for value in values]
    output = []
    for h in x:
        query, mixed = times(h, w["query"]), []
        for i in range(heads):
            q = head(query, i, heads)
            scores = [dot(q, head(key, i, heads)) / math.sqrt(len(q)) for key in keys]
            mixed += mix(softmax(scores), [head(value, i, heads) for value in values])
        output.append(mixed)
    return output


def squares(a: list[Vector], b: list[Vector]) -> tuple[float, int]:
    """Of the differences of all entries: their sum, and how many there are."""
    found = [(x - y) ** 2 for v, w in zip(a, b, strict=True) for x, y in zip(v, w, strict=True)]
    return math.fsum(found), len(found)


def compression_loss(
    declared: Declaration, settings: Settings, w: dict, h: list[Vector], old: Any, new: Any
) -> tuple[float, int]:
    """Of one row and layer, on slots as they are stored, the squares to `reduce`; none for a
    function without parameters."""
    if settings.compression not in ("conv", "dilated_conv") or not old:
        return 0.0, 0
    if settings.compression_loss == "attention":
        x, old, new = (as_read(declared, settings, w, slots) for slots in (h, old, new))
        heads = settings.n_heads
        return squares(content_attention(w, heads, x, old), content_attention(w, heads, x, new))
    if settings.compression_loss == "autoencoding":
        kernel = w["transposed_convolution"]
        read_back = [[dot(row, slot) for row in matrix] for slot in new for matrix in kernel]
        return squares(old, read_back)
    return 0.0, 0


def reduce(declared: Declaration, rows: list[list[tuple[float, int]]]) -> float:
    """The loss of all rows' and layers' squares, as declared."""
    losses = []
    for layer in zip(*rows, strict=True):
        total, count = math.fsum(s for s, _ in layer), sum(n for _, n in layer)
        if declared.loss_reduction == "mean_square":
            losses.append(total / max(count, 1))
        else:
            losses.append(math.sqrt(total) if declared.loss_reduction == "norm" else total)
    return math.fsum(losses) / (len(losses) if declared.loss_over_layers == "mean" else 1)


def layer_step(
    declared: Declaration,
    settings: Settings,
    w: dict,
    h: list[Vector],
    mem: list[Vector],
    c_mem: list[Vector],
) -> tuple[list[Vector], list[Vector], list[Vector], Any, tuple[float, int]]:
    pre = settings.norm_first

    def norm(i: int, x: Vector) -> Vector:
        return layer_norm(x, w[f"norm{i}_weight"], w[f"norm{i}_bias"])

    def feed_forward(x: Vector) -> Vector:
        inner = [max(0.0, a) for a in add(times(x, w["ff1_weight"]), w["ff1_bias"])]
        return add(times(inner, w["ff2_weight"]), w["ff2_bias"])

    x = [norm(1, a) for a in h] if pre else h
    stored = h if declared.storage == "raw" else x
    mixed, attention = attend(w, x, as_read(declared, settings, w, c_mem + mem))
    if pre:
        h = [add(a, b) for a, b in zip(h, mixed, strict=True)]
        h = [add(a, feed_forward(norm(2, a))) for a in h]
    else:
        h = [norm(1, add(a, b)) for a, b in zip(h, mixed, strict=True)]
        h = [norm(2, add(a, feed_forward(a))) for a in h]

    usage = average_usage(attention, len(c_mem) + len(mem) + len(x))[len(c_mem) :]
    held, old, new = mem + stored, [], []
    if settings.c_mem_len == 0:
        while len(held) > settings.mem_len:
            held = held[1:]
    else:
        while len(held) > settings.mem_len:
            old += held[: settings.compression_rate]
            held = held[settings.compression_rate :]
    if old:
        new = compress(settings.compression, w, old, usage, settings.compression_rate)
    c_mem = c_mem + new
    while len(c_mem) > settings.c_mem_len:
        c_mem = c_mem[1:]
    return h, held, c_mem, attention, compression_loss(declared, settings, w, stored, old, new)


def step(
    declared: Declaration,
    settings: Settings,
    weights: dict,
    tokens: list[int],
    mem: list[list[Vector]],
    c_mem: list[list[Vector]],
) -> Result:
    h = [weights["embedding"][token] for token in tokens]
    mems, c_mems, attention, losses = [], [], [], []
    for w, m, cm in zip(weights["layers"], mem, c_mem, strict=True):
        h, m, cm, a, loss = layer_step(declared, settings, w, h, m, cm)
        mems.append(m)
        c_mems.append(cm)
        attention.append(a)
        losses.append(loss)
    if settings.norm_first:
        h = [layer_norm(x, weights["norm_weight"], weights["norm_bias"]) for x in h]
    logits = [add(times(x, weights["logits_weight"]), weights["logits_bias"]) for x in h]
    return Result(logits, mems, c_mems, attention, losses)
