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
    if isinstance(weights, list):
        return [lists(value) for value in weights]
    return weights.tolist()


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def add(a: Vector, b: Vector) -> Vector:
    return [x + y for x, y in zip(a, b, strict=True)]


def add_all(a: list[Vector], b: list[Vector]) -> list[Vector]:
    return [add(x, y) for x, y in zip(a, b, strict=True)]


def relu(x: Vector) -> Vector:
    return [max(0.0, a) for a in x]


def times(x: Vector, matrix: list[Vector]) -> Vector:
    return [dot(x, column) for column in zip(*matrix, strict=True)]


def layer_norm(x: Vector, weight: Vector, bias: Vector) -> Vector:
    mean = math.fsum(x) / len(x)
    variance = math.fsum((a - mean) ** 2 for a in x) / len(x)
    deviation = math.sqrt(variance + 1e-5)
    normalised = []
    for a, w, b in zip(x, weight, bias, strict=True):
        normalised.append((a - mean) / deviation * w + b)
    return normalised


def softmax(scores: Vector) -> Vector:
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


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
    keys = [times(slot, w["key"]) for slot in slots]
    values = [times(slot, w["value"]) for slot in slots]
    relative = []  # the key of each distance
    for distance in range(len(slots)):
        relative.append(times(sinusoid(distance, len(x[0])), w["relative_key"]))
    attention: Any = [[] for _ in range(heads)]
    output = []
    for t, h in enumerate(x):
        here = len(memory) + t  # the slot that is position t
        query = times(h, w["query"])
        mixed: Vector = []  # what the heads find, side by side
        for i in range(heads):
            q = head(query, i, heads)
            to_content = add(q, w["content_bias"][i])
            to_position = add(q, w["position_bias"][i])
            scores = []
            for j in range(here + 1):
                content = dot(to_content, head(keys[j], i, heads))
                position = dot(to_position, head(relative[here - j], i, heads))
                scores.append((content + position) / math.sqrt(len(q)))
            given = softmax(scores)
            seen = [head(value, i, heads) for value in values[: here + 1]]
            attention[i].append(given)
            mixed += mix(given, seen)
        output.append(times(mixed, w["output"]))
    return output, attention


def average_usage(attention: Any, slots: int) -> Vector:
    """The attention that each slot received, averaged over the heads and queries that saw it."""
    usage = []
    for j in range(slots):
        received = []
        for queries in attention:
            received += [seen[j] for seen in queries if j < len(seen)]
        usage.append(math.fsum(received) / len(received))
    return usage


def convolve(block: list[Vector], kernel: list[list[Vector]]) -> Vector:
    slot = [0.0] * len(kernel[0][0])
    for vector, matrix in zip(block, kernel, strict=True):
        slot = add(slot, times(vector, matrix))
    return slot


def compress(name: str, w: dict, old: list[Vector], usage: Vector, c: int) -> list[Vector]:
    """f_c."""
    n = len(old) // c
    if name == "most_used":
        ranked = sorted(range(len(old)), key=lambda j: (-usage[j], j))
        kept = sorted(ranked[:n])
        return [old[j] for j in kept]
    if name == "dilated_conv":
        old = dilated(w, old)
    slots = []
    for k in range(n):
        block = old[c * k : c * (k + 1)]
        features = list(zip(*block, strict=True))
        if name == "mean_pool":
            slot = [math.fsum(feature) / c for feature in features]
        elif name == "max_pool":
            slot = [max(feature) for feature in features]
        else:
            slot = convolve(block, w["convolution"])
            if "convolution_bias" in w:
                slot = add(slot, w["convolution_bias"])
        slots.append(slot)
    return slots


def dilated(w: dict, old: list[Vector]) -> list[Vector]:
    """Convolutions of each memory with an older one, zeros before the oldest."""
    zeros = [0.0] * len(old[0])
    for kernel, dilation in zip(w["dilated"], (1, 2, 4), strict=True):
        convolved = []
        for j in range(len(old)):
            older = old[j - dilation] if j >= dilation else zeros
            convolved.append(relu(convolve([older, old[j]], kernel)))
        old = convolved
    return old


def as_read(
    declared: Declaration, settings: Settings, w: dict, slots: list[Vector]
) -> list[Vector]:
    """Slots as attention reads them: those stored raw are normalised first, in pre-norm."""
    if declared.storage == "normalised" or not settings.norm_first:
        return slots
    return [layer_norm(slot, w["norm1_weight"], w["norm1_bias"]) for slot in slots]


def content_attention(w: dict, heads: int, x: list[Vector], slots: list[Vector]) -> list[Vector]:
    """Algorithm 2's attention: content alone, every slot seen, heads side by side."""
    keys = [times(slot, w["key"]) for slot in slots]
    values = [times(slot, w["value"]) for slot in slots]
    if "value_bias" in w:
        values = [add(value, w["value_bias"]) for value in values]
    output = []
    for h in x:
        query = times(h, w["query"])
        mixed: Vector = []
        for i in range(heads):
            q = head(query, i, heads)
            scores = [dot(q, head(key, i, heads)) / math.sqrt(len(q)) for key in keys]
            seen = [head(value, i, heads) for value in values]
            mixed += mix(softmax(scores), seen)
        output.append(mixed)
    return output


def squares(a: list[Vector], b: list[Vector]) -> tuple[float, int]:
    """Of the differences of all entries: their sum, and how many there are."""
    found = []
    for v, w in zip(a, b, strict=True):
        found += [(x - y) ** 2 for x, y in zip(v, w, strict=True)]
    return math.fsum(found), len(found)


def compression_loss(
    declared: Declaration, settings: Settings, w: dict, h: list[Vector], old: Any, new: Any
) -> tuple[float, int]:
    """Of one row and layer, on slots as they are stored, the squares to `reduce`; none for a
    function without parameters."""
    if settings.compression not in ("conv", "dilated_conv") or not old:
        return 0.0, 0
    if settings.compression_loss == "attention":
        x = as_read(declared, settings, w, h)
        over_old = as_read(declared, settings, w, old)
        over_new = as_read(declared, settings, w, new)
        heads = settings.n_heads
        target = content_attention(w, heads, x, over_old)
        return squares(target, content_attention(w, heads, x, over_new))
    if settings.compression_loss == "autoencoding":
        read_back = []
        for slot in new:
            for matrix in w["transposed_convolution"]:
                read_back.append([dot(row, slot) for row in matrix])
        return squares(old, read_back)
    return 0.0, 0


def reduce(declared: Declaration, rows: list[list[tuple[float, int]]]) -> float:
    """The loss of all rows' and layers' squares, as declared."""
    losses = []
    for layer in zip(*rows, strict=True):
        total = math.fsum(square for square, _ in layer)
        count = sum(n for _, n in layer)
        if declared.loss_reduction == "mean_square":
            losses.append(total / max(count, 1))
        elif declared.loss_reduction == "norm":
            losses.append(math.sqrt(total))
        else:
            losses.append(total)
    loss = math.fsum(losses)
    if declared.loss_over_layers == "mean":
        loss /= len(losses)
    return loss


def layer_step(
    declared: Declaration,
    settings: Settings,
    w: dict,
    h: list[Vector],
    mem: list[Vector],
    c_mem: list[Vector],
) -> tuple[list[Vector], list[Vector], list[Vector], Any, tuple[float, int]]:
    def norm1(x: list[Vector]) -> list[Vector]:
        return [layer_norm(a, w["norm1_weight"], w["norm1_bias"]) for a in x]

    def norm2(x: list[Vector]) -> list[Vector]:
        return [layer_norm(a, w["norm2_weight"], w["norm2_bias"]) for a in x]

    def feed_forward(x: Vector) -> Vector:
        inner = relu(add(times(x, w["ff1_weight"]), w["ff1_bias"]))
        return add(times(inner, w["ff2_weight"]), w["ff2_bias"])

    slots = as_read(declared, settings, w, c_mem + mem)
    if settings.norm_first:
        x = norm1(h)
        mixed, attention = attend(w, x, slots)
        between = add_all(h, mixed)
        output = add_all(between, [feed_forward(a) for a in norm2(between)])
    else:
        x = h
        mixed, attention = attend(w, x, slots)
        between = norm1(add_all(h, mixed))
        output = norm2(add_all(between, [feed_forward(a) for a in between]))

    stored = h if declared.storage == "raw" else x
    held = mem + stored
    usage = average_usage(attention, len(c_mem) + len(held))[len(c_mem) :]
    old: list[Vector] = []
    leave = settings.compression_rate if settings.c_mem_len > 0 else 1
    while len(held) > settings.mem_len:
        if settings.c_mem_len > 0:
            old += held[:leave]
        held = held[leave:]
    new: list[Vector] = []
    if old:
        new = compress(settings.compression, w, old, usage, settings.compression_rate)
    compressed = c_mem + new
    while len(compressed) > settings.c_mem_len:
        compressed = compressed[1:]
    loss = compression_loss(declared, settings, w, stored, old, new)
    return output, held, compressed, attention, loss


def step(
    declared: Declaration,
    settings: Settings,
    weights: dict,
    tokens: list[int],
    mem: list[list[Vector]],
    c_mem: list[list[Vector]],
) -> Result:
    h = [weights["embedding"][token] for token in tokens]
    result = Result([], [], [], [], [])
    for i, w in enumerate(weights["layers"]):
        h, m, cm, attention, loss = layer_step(declared, settings, w, h, mem[i], c_mem[i])
        result.mem.append(m)
        result.c_mem.append(cm)
        result.attention.append(attention)
        result.squares.append(loss)
    if settings.norm_first:
        h = [layer_norm(x, weights["norm_weight"], weights["norm_bias"]) for x in h]
    for x in h:
        result.logits.append(add(times(x, weights["logits_weight"]), weights["logits_bias"]))
    return result
