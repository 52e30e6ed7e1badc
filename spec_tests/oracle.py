"""One step of the Compressive Transformer for one row, written with plain loops over Python floats.

No tensor, no mask, no shift, no batch: each line is a line of the paper. Weights are nested lists,
matrices input x output; `weights`, `settings` and `declared` are the adapter's.
"""

import math
from typing import Any, NamedTuple

from .adapter import Declaration, Settings

Vector = list[float]


# What is often done instead, to tell by its result: each is a `mistake` that a step can make.
NO_SCALE = "scores are not scaled by 1/sqrt(K)"
TIMES_ROOT = "scores are scaled by sqrt(K) instead of 1/sqrt(K)"
WIDE_SCALE = "scores are scaled by the whole width, 1/sqrt(D), instead of a head's"
TRANSPOSED = "weights() gives matrices output x input; they are wanted as in y = x @ W"
NEWEST_FIRST = "memories are attended to newest first"
SWAPPED = "u and v are swapped: u belongs to content, v to position"
AFTER_ATTENTION = "the loss takes h after attention instead of the layer's input"
WITH_BIAS = "the loss adds u to its queries"
PROJECTED = "the loss compares what comes after the output projection instead of before it"
MISTAKES = (NO_SCALE, TIMES_ROOT, WIDE_SCALE, TRANSPOSED, NEWEST_FIRST, SWAPPED)
MISTAKES += (AFTER_ATTENTION, WITH_BIAS, PROJECTED)
NEEDS = {WITH_BIAS: "content_bias", PROJECTED: "output"}  # of the weights


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


def projected(w: dict, name: str, x: Vector) -> Vector:
    """By a layer's matrix of this name, and its bias if there is one."""
    y = times(x, w[name])
    if f"{name}_bias" in w:
        y = add(y, w[f"{name}_bias"])
    return y


def layer_norm(x: Vector, weight: Vector, bias: Vector, eps: float) -> Vector:
    mean = math.fsum(x) / len(x)
    variance = math.fsum((a - mean) ** 2 for a in x) / len(x)
    deviation = math.sqrt(variance + eps)
    normalised = []
    for a, w, b in zip(x, weight, bias, strict=True):
        normalised.append((a - mean) / deviation * w + b)
    return normalised


def softmax(scores: Vector) -> Vector:
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


def sinusoid(distance: float, width: int, order: str = "halves") -> Vector:
    angles = [distance / 10000 ** (2 * i / width) for i in range(width // 2)]
    if order == "halves":
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    waves: Vector = []
    for a in angles:
        waves += [math.sin(a), math.cos(a)]
    return waves


def head(x: Vector, i: int, heads: int) -> Vector:
    width = len(x) // heads
    return x[i * width : (i + 1) * width]


def mix(weights: Vector, values: list[Vector]) -> Vector:
    return [dot(weights, list(column)) for column in zip(*values, strict=True)]


def scaled(score: float, width: int, heads: int, mistake: str) -> float:
    if mistake == NO_SCALE:
        return score
    if mistake == TIMES_ROOT:
        return score * math.sqrt(width)
    if mistake == WIDE_SCALE:
        return score / math.sqrt(width * heads)
    return score / math.sqrt(width)


def turned(w: dict) -> dict:
    """The weights with square matrices transposed."""
    other = {}
    for name, value in w.items():
        matrix = name in ("query", "key", "value", "relative_key", "output")
        if matrix and len(value) == len(value[0]):
            value = [list(column) for column in zip(*value, strict=True)]
        other[name] = value
    return other


def attend(
    declared: Declaration, w: dict, x: list[Vector], memory: list[Vector], mistake: str = ""
) -> tuple[list[Vector], Any]:
    """Relative attention of the segment x over memory and itself."""
    heads = len(w["content_bias"])
    of_content = w["content_bias"]
    of_position = w["position_bias"]
    if mistake == SWAPPED:
        of_content = w["position_bias"]
        of_position = w["content_bias"]
    slots = memory + x
    keys = [projected(w, "key", slot) for slot in slots]
    values = [projected(w, "value", slot) for slot in slots]
    relative = []  # the key of each distance
    for distance in range(len(slots)):
        waves = sinusoid(distance, len(x[0]), declared.sinusoid)
        relative.append(times(waves, w["relative_key"]))
    attention: Any = [[] for _ in range(heads)]
    output = []
    for t, h in enumerate(x):
        here = len(memory) + t  # the slot that is position t
        query = projected(w, "query", h)
        mixed: Vector = []  # what the heads find, side by side
        for i in range(heads):
            q = head(query, i, heads)
            to_content = add(q, of_content[i])
            to_position = add(q, of_position[i])
            scores = []
            for j in range(here + 1):
                content = dot(to_content, head(keys[j], i, heads))
                position = dot(to_position, head(relative[here - j], i, heads))
                scores.append(scaled(content + position, len(q), heads, mistake))
            given = softmax(scores)
            seen = [head(value, i, heads) for value in values[: here + 1]]
            attention[i].append(given)
            mixed += mix(given, seen)
        output.append(projected(w, "output", mixed))
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
    weight = w["norm1_weight"]
    bias = w["norm1_bias"]
    return [layer_norm(slot, weight, bias, declared.norm_eps) for slot in slots]


def content_attention(
    w: dict, heads: int, x: list[Vector], slots: list[Vector], mistake: str = ""
) -> list[Vector]:
    """Algorithm 2's attention: content alone, every slot seen, heads side by side."""
    keys = [projected(w, "key", slot) for slot in slots]
    values = [projected(w, "value", slot) for slot in slots]
    output = []
    for h in x:
        query = projected(w, "query", h)
        mixed: Vector = []
        for i in range(heads):
            q = head(query, i, heads)
            if mistake == WITH_BIAS:
                q = add(q, w["content_bias"][i])
            scores = []
            for key in keys:
                content = dot(q, head(key, i, heads))
                scores.append(scaled(content, len(q), heads, mistake))
            seen = [head(value, i, heads) for value in values]
            mixed += mix(softmax(scores), seen)
        if mistake == PROJECTED:
            mixed = projected(w, "output", mixed)
        output.append(mixed)
    return output


def squares(a: list[Vector], b: list[Vector]) -> tuple[float, int]:
    """Of the differences of all entries: their sum, and how many there are."""
    found = []
    for v, w in zip(a, b, strict=True):
        found += [(x - y) ** 2 for x, y in zip(v, w, strict=True)]
    return math.fsum(found), len(found)


def compression_loss(
    declared: Declaration,
    settings: Settings,
    w: dict,
    h: list[Vector],
    old: Any,
    new: Any,
    mistake: str = "",
) -> tuple[float, int]:
    """Of one row and layer, on slots as they are stored, the squares to `reduce`; none for a
    function without parameters."""
    if settings.compression in ("mean_pool", "max_pool", "most_used") or not old:
        return 0.0, 0
    if settings.compression_loss == "attention":
        x = as_read(declared, settings, w, h)
        over_old = as_read(declared, settings, w, old)
        over_new = as_read(declared, settings, w, new)
        heads = settings.n_heads
        if mistake == TRANSPOSED:
            w = turned(w)
        target = content_attention(w, heads, x, over_old, mistake)
        return squares(target, content_attention(w, heads, x, over_new, mistake))
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


def evict(
    declared: Declaration, settings: Settings, held: list[Vector], usage: Vector
) -> tuple[list[Vector], Vector, list[Vector]]:
    """Of what memory holds the block that is compressed, its usage, and what stays."""
    c = settings.compression_rate
    most = settings.mem_len
    leaving = max(0, len(held) - most)
    if settings.c_mem_len == 0:
        return [], [], held[leaving:]
    if declared.overflow in ("round_up", "divisible"):
        leaving = 0
        while len(held) - leaving > most:
            leaving += c
    if declared.overflow == "keep":
        leaving = 0
        while len(held) - leaving - c >= most:
            leaving += c
    old = held[:leaving]
    of_old = usage[:leaving]
    while declared.overflow == "pad" and len(old) % c != 0:
        old = [[0.0] * len(held[0]), *old]
        of_old = [0.0, *of_old]
    while declared.overflow == "drop" and len(old) % c != 0:
        old = old[:-1]
        of_old = of_old[:-1]
    return old, of_old, held[leaving:]


def layer_step(
    declared: Declaration,
    settings: Settings,
    w: dict,
    h: list[Vector],
    mem: list[Vector],
    c_mem: list[Vector],
    mistake: str = "",
) -> tuple[list[Vector], list[Vector], list[Vector], Any, tuple[float, int]]:
    def norm1(x: list[Vector]) -> list[Vector]:
        return [layer_norm(a, w["norm1_weight"], w["norm1_bias"], declared.norm_eps) for a in x]

    def norm2(x: list[Vector]) -> list[Vector]:
        return [layer_norm(a, w["norm2_weight"], w["norm2_bias"], declared.norm_eps) for a in x]

    def feed_forward(x: Vector) -> Vector:
        inner = relu(add(times(x, w["ff1_weight"]), w["ff1_bias"]))
        return add(times(inner, w["ff2_weight"]), w["ff2_bias"])

    attended_to = c_mem + mem
    if mistake == NEWEST_FIRST:
        attended_to = c_mem[::-1] + mem[::-1]
    of_attention = turned(w) if mistake == TRANSPOSED else w
    slots = as_read(declared, settings, w, attended_to)
    if settings.norm_first:
        x = norm1(h)
        mixed, attention = attend(declared, of_attention, x, slots, mistake)
        between = add_all(h, mixed)
        output = add_all(between, [feed_forward(a) for a in norm2(between)])
    else:
        x = h
        mixed, attention = attend(declared, of_attention, x, slots, mistake)
        between = norm1(add_all(h, mixed))
        output = norm2(add_all(between, [feed_forward(a) for a in between]))

    stored = h if declared.storage == "raw" else x
    held = mem + stored
    usage = average_usage(attention, len(c_mem) + len(held))[len(c_mem) :]
    old, of_old, stays = evict(declared, settings, held, usage)
    new: list[Vector] = []
    if old:
        new = compress(settings.compression, w, old, of_old, settings.compression_rate)
    compressed = c_mem + new
    while len(compressed) > settings.c_mem_len:
        compressed = compressed[1:]
    queries = between if mistake == AFTER_ATTENTION else stored
    loss = compression_loss(declared, settings, w, queries, old, new, mistake)
    return output, stays, compressed, attention, loss


def step(
    declared: Declaration,
    settings: Settings,
    weights: dict,
    tokens: list[int],
    mem: list[list[Vector]],
    c_mem: list[list[Vector]],
    mistake: str = "",
) -> Result:
    h = [weights["embedding"][token] for token in tokens]
    result = Result([], [], [], [], [])
    for i, w in enumerate(weights["layers"]):
        output, m, cm, attention, loss = layer_step(
            declared, settings, w, h, mem[i], c_mem[i], mistake
        )
        result.mem.append(m)
        result.c_mem.append(cm)
        result.attention.append(attention)
        result.squares.append(loss)
        h = output
    if settings.norm_first:
        weight = weights["norm_weight"]
        bias = weights["norm_bias"]
        h = [layer_norm(x, weight, bias, declared.norm_eps) for x in h]
    for x in h:
        result.logits.append(add(times(x, weights["logits_weight"]), weights["logits_bias"]))
    return result
