"""A plain Compressive Transformer in JAX, the test subject of `bridge.py`; README.md has its adapter.

The parameters are a dict of arrays, the memory a list of (mem, c_mem) for each layer, `[B, slots, D]`,
empty at first. A layer is what is compiled: all layers of all models of one shape share that.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    heads: int
    mem_len: int
    c_mem_len: int
    rate: int


def initialize(vocabulary: int, width: int, shape: Shape, layers: int, inner: int) -> dict:
    key = jax.random.PRNGKey(0)

    def matrix(*size: int) -> jax.Array:
        nonlocal key
        key, now = jax.random.split(key)
        return jax.random.normal(now, size) / width**0.5

    def layer() -> dict:
        square = {x: matrix(width, width) for x in ("query", "key", "value", "relative", "output")}
        biases = {x: jnp.zeros((shape.heads, width // shape.heads)) for x in ("u", "v")}
        norms = {x: {"gain": jnp.ones(width), "bias": jnp.zeros(width)} for x in ("norm1", "norm2")}
        inside = {"in": matrix(width, inner), "out": matrix(inner, width)}
        return {**square, **biases, **norms, **inside, "conv": matrix(shape.rate, width, width)}

    return {
        "embedding": matrix(vocabulary, width),
        "layers": [layer() for _ in range(layers)],
        "logits": matrix(width, vocabulary),
    }


def normalize(x, norm):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * norm["gain"] + norm["bias"]


def split(x, heads):
    return x.reshape(*x.shape[:-1], heads, -1)


def attention(p, x, slots, heads):
    T = x.shape[1]
    S = slots.shape[1]
    D = x.shape[2]
    q = split(x @ p["query"], heads)
    k = split(slots @ p["key"], heads)
    v = slots @ p["value"]
    distance = jnp.arange(S - T, S)[:, None] - jnp.arange(S)
    angle = jnp.maximum(distance, 0)[..., None] * 10000.0 ** (-jnp.arange(0, D, 2) / D)
    encoding = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)  # [T, S, D]
    r = split(encoding.astype(x.dtype) @ p["relative"], heads)
    scores = jnp.einsum("bthk,bshk->bhts", q + p["u"], k)
    scores += jnp.einsum("bthk,tshk->bhts", q + p["v"], r)
    scores = jnp.where(distance >= 0, scores / k.shape[-1] ** 0.5, -jnp.inf)
    read = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), split(v, heads))
    return read.reshape(x.shape) @ p["output"]


def compress(convolution, old):
    """[B, c*n, D] -> [B, n, D]"""
    c = convolution.shape[0]
    blocks = old.reshape(old.shape[0], -1, c, old.shape[2])
    return jnp.einsum("bncd,cde->bne", blocks, convolution)


def attention_loss(p, x, old, new, heads):
    p = jax.lax.stop_gradient(p)

    def read(slots):
        q, k, v = (split(y, heads) for y in (x @ p["query"], slots @ p["key"], slots @ p["value"]))
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5)
        return jnp.einsum("bhts,bshk->bthk", weights, v)

    return jnp.square(read(old) - read(new)).mean()


@partial(jax.jit, static_argnames="shape")
def layer(p, h, mem, c_mem, shape):
    x = normalize(h, p["norm1"])
    h = h + attention(p, x, jnp.concatenate([c_mem, mem, x], axis=1), shape.heads)
    h = h + jax.nn.relu(normalize(h, p["norm2"]) @ p["in"]) @ p["out"]
    x, mem, c_mem = jax.lax.stop_gradient((x, mem, c_mem))
    held = jnp.concatenate([mem, x], axis=1)
    overflow = max(0, held.shape[1] - shape.mem_len)
    loss = jnp.zeros((), h.dtype)
    if overflow and shape.c_mem_len:
        overflow = -(-overflow // shape.rate) * shape.rate
        old = held[:, :overflow]
        new = compress(p["conv"], old)
        loss = attention_loss(p, x, old, new, shape.heads)
        c_mem = jnp.concatenate([c_mem, jax.lax.stop_gradient(new)], axis=1)
        c_mem = c_mem[:, max(0, c_mem.shape[1] - shape.c_mem_len) :]
    return h, held[:, overflow:], c_mem, loss


def step(parameters, tokens, memory, shape):
    """`tokens [B, T]` -> logits, the next memory, the compression loss."""
    h = parameters["embedding"][tokens]
    after = []
    losses = []
    for p, (mem, c_mem) in zip(parameters["layers"], memory, strict=True):
        h, mem, c_mem, loss = layer(p, h, mem, c_mem, shape)
        after.append((mem, c_mem))
        losses.append(loss)
    return h @ parameters["logits"], after, jnp.stack(losses).mean()
