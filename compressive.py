# SPDX-License-Identifier: MIT
"""The Compressive Transformer (Rae et al., 2019, arXiv 1911.05507) in one file.

A Transformer-XL keeps each layer's past inputs as memory and forgets the oldest. Here the oldest
are compressed instead: every c of them become one slot of a second, compressed memory, by a
function f_c that each layer learns from a loss of its own.

        forgotten <- [ compressed memory | memory | segment ] <- tokens
                       N_cm slots    f_c <- N_m slots   T

In a training loop of your own:

    model = CompressiveTransformer(Config(vocab_size=256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    memory = None                                       # None: empty memories, which grow
    for tokens, targets in segments:                    # [B, T] each, every row a stream of text
        output = model(tokens, memory)
        memory = output.memory
        loss = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
        (loss + output.compression_loss).backward()     # share no parameter but in bptt: no weight
        for group in model.parameter_groups():          # apart, or either scales the other down
            nn.utils.clip_grad_norm_(group, 1.0)
        optimizer.step()
        optimizer.zero_grad()

Shapes, in the docstrings and at line ends:
    B  rows of the batch              T  tokens of the segment (the paper's n_s)
    L  layers                         H  heads, each K = D / H wide
    D  d_model, width of a slot       N  any number
    M  slots of memory held           C  slots of compressed memory held      S = C + M + T
    c  compression rate               n  slots newly compressed in this step, from c*n memories
Slots are ordered oldest first, everywhere.
"""

import math
import numbers
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------- settings, memory, output


@dataclass(frozen=True)
class Config:
    """The settings of a model. Raises ValueError for one that cannot work."""

    vocab_size: Annotated[int, "number of different tokens"] = 256
    d_model: Annotated[int, "D, width of the residual stream and of every slot"] = 128
    n_heads: Annotated[int, "H, attention heads of a layer"] = 4
    n_layers: Annotated[int, "L, layers"] = 4
    d_ff: Annotated[int, "width of the feed-forward's hidden layer"] = 512
    mem_len: Annotated[int, "N_m, slots of memory that a layer keeps"] = 64
    c_mem_len: Annotated[int, "N_cm, slots of compressed memory that a layer keeps"] = 32
    compression_rate: Annotated[int, "c, memories that become one compressed slot"] = 4
    compression: Annotated[str, "f_c: conv, dilated_conv, most_used, mean_pool, max_pool"] = "conv"
    compression_loss: Annotated[str, "attention, autoencoding, or none (for bptt)"] = "attention"
    norm_first: Annotated[bool, "pre-norm, x + f(LN(x)); if not, post-norm, LN(x + f(x))"] = True
    dropout: Annotated[float, "of embeddings, attention weights and both branches of a layer"] = 0.0
    bptt: Annotated[bool, "memories keep their graph: later losses train what made them"] = False
    recompute: Annotated[bool, "activation checkpointing: layers run again in backward"] = False

    def __post_init__(self) -> None:
        check_config(self)


class Memory(NamedTuple):
    """What the layers remember: for each layer one tensor `[B, slots, D]`, oldest slot first."""

    mem: tuple[Tensor, ...]
    c_mem: tuple[Tensor, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Memory":
        """The memory with `function` applied to every tensor: to move it, cast it, choose rows."""
        mem = tuple(function(slots) for slots in self.mem)
        c_mem = tuple(function(slots) for slots in self.c_mem)
        return Memory(mem, c_mem)

    def detach(self) -> "Memory":
        """The same memory cut off from the graph that made it (of use with `Config.bptt`)."""
        return self.map(Tensor.detach)


torch.serialization.add_safe_globals([Memory])  # torch.load takes what torch.save wrote


class Output(NamedTuple):
    """What one step returns."""

    logits: Tensor  # [B, T, vocab_size]
    memory: Memory  # to hand to the next step
    compression_loss: Tensor  # [], the mean of the layers'; zero when nothing was compressed
    compression_losses: Tensor  # [L], each layer's
    attention_weights: tuple[Tensor | None, ...]  # each layer's, [B, H, T, S], if asked for


# --------------------------------------------------------------------------- relative attention


def sinusoid(distance: Tensor, d_model: int) -> Tensor:
    """R, the encoding of distances: `[N] -> [N, D]`, sines first (Transformer-XL, section 3.3)."""
    i = torch.arange(0, d_model, 2, dtype=distance.dtype, device=distance.device)
    angle = distance[:, None] * 10000 ** (-i / d_model)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def relative_shift(scores: Tensor) -> Tensor:
    """Transformer-XL's relative shift, without a copy: `[..., T, S + 1] -> [..., T, S]`.

    Row t must move left by T - 1 - t, so that distance 0 stands under its own token. Drop the first
    T - 1 numbers and cut what follows into rows of S instead of S + 1: every row then moves left by
    one less than the row above. T = 3, S = 4, digits for distances, dots for padding:

        3 2 1 0 .        1 0 . 3      What follows a distance 0 is rubbish (the padding, then the
        3 2 1 0 .   ->   2 1 0 .      next row). The causal mask hides it: there stand the tokens
        3 2 1 0 .        3 2 1 0      after t.
    """
    T = scores.size(-2)
    S = scores.size(-1) - 1
    return scores.flatten(-2)[..., T - 1 : T - 1 + T * S].unflatten(-1, (T, S))


def causal_softmax(scores: Tensor) -> Tensor:
    """Softmax of `scores [..., T, S]`, overwritten: query t does not see the tokens after t."""
    T, S = scores.shape[-2:]
    future = torch.ones(T, T, dtype=torch.bool, device=scores.device).triu(1)
    with torch.no_grad():  # in place, to save a copy; a hidden score has no gradient anyway
        scores[..., S - T :].masked_fill_(future, -math.inf)
    return scores.softmax(dim=-1, dtype=scores.dtype)  # autocast's float32 is twice as large


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    content_bias: Tensor,
    position_bias: Tensor,
    dropout: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Causal attention with relative positions (Transformer-XL, section 3.3):

        score(t, j) = [ (q_t + u) . k_j  +  (q_t + v) . W_R R_(t-j) ] / sqrt(K)

    Queries `q [H, B, T, K]`, keys and values `k` and `v [H, B, S, K]`, `r [H, S, K]` (W_R R of the
    distances S - 1, ..., 0), and the equation's u and v, `content_bias` and `position_bias [H, K]`.
    Returns what the heads read, `[H, B, T, K]`, and the attention weights, `[H, B, T, S]`, before
    dropout.
    """
    scale = q.size(-1) ** -0.5
    q_content = scale * (q + content_bias[:, None, None])
    q_position = scale * (q + position_bias[:, None, None])
    padded_r = F.pad(r, (0, 0, 0, 1))  # zeros: relative_shift's column of padding
    content = q_content @ k.mT  # AC in Transformer-XL's code, [H, B, T, S]
    by_distance = torch.einsum("hbtk,hsk->hbts", q_position, padded_r)  # [H, B, T, S + 1]
    position = relative_shift(by_distance)  # BD
    scores = content.add_(position)  # in place, to save a tensor of this size
    weights = causal_softmax(scores)
    return dropout(weights) @ v, weights


class RelativeMultiHeadAttention(nn.Module):
    """`relative_attention` of a segment over compressed memory, memory and itself."""

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        D = d_model
        H = n_heads
        K = D // H
        self.head_dim = K
        self.query = nn.Linear(D, D, bias=False)
        self.key_value = nn.Linear(D, 2 * D, bias=False)
        self.relative_key = nn.Linear(D, D, bias=False)  # W_R
        self.content_bias = nn.Parameter(torch.zeros(H, K))  # u
        self.position_bias = nn.Parameter(torch.zeros(H, K))  # v
        self.dropout = nn.Dropout(dropout)  # of the weights
        self.output = nn.Linear(D, D, bias=False)

    def forward(
        self, x: Tensor, past: Tensor, positions: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `x [B, T, D]` to `past [B, C + M, D]`, compressed memory and memory, and to x
        up to the query's position -> `[B, T, D]`, and the weights `[B, H, T, S]` if needed.
        `positions [S, D]` is the `sinusoid` of the distances S - 1, ..., 0."""
        q, k, v, r = self.project(x, past, positions)
        read, weights = relative_attention(
            q, k, v, r, self.content_bias, self.position_bias, self.dropout
        )
        side_by_side = read.movedim(0, 2).flatten(2)  # [B, T, D]
        output = self.output(side_by_side)
        if not need_weights:
            return output, None
        return output, weights.transpose(0, 1)

    def project(self, x: Tensor, past: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries `[H, B, T, K]`, keys and values `[H, B, S, K]`, and W_R R `[H, S, K]`."""
        q = self.heads(self.query(x))
        q = q.contiguous()  # else each of its two products copies it
        # Apart: in one product of both, the past's gradient would be computed, too.
        kv_past = self.heads(self.key_value(past))
        kv_x = self.heads(self.key_value(x))
        k, v = torch.cat([kv_past, kv_x], dim=-2).chunk(2)
        r = self.heads(self.relative_key(positions))
        return q, k, v, r

    def heads(self, x: Tensor) -> Tensor:
        """`[..., N, D] -> [H, ..., N, K]`, and `[..., N, 2*D] -> [2*H, ..., N, K]`: the heads of
        the keys, then those of the values. Heads come first, since all rows share W_R R: one matrix
        product a head."""
        by_head = x.unflatten(-1, (-1, self.head_dim))
        return by_head.movedim(-2, 0)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling the layer is its weight's product and no more: no adapter, hook (but for one
    of all modules), bias, parametrisation, or weight of another kind (quantised, sharded)."""
    if type(layer) is not nn.Linear or type(layer.weight) not in (nn.Parameter, Tensor):
        return False
    hooks = [layer._forward_hooks, layer._forward_pre_hooks]
    hooks += [layer._backward_hooks, layer._backward_pre_hooks]
    return layer.bias is None and "forward" not in vars(layer) and not any(hooks)


# --------------------------------------------------- for speed alone: all works without it, too


class FasterAttention(RelativeMultiHeadAttention):
    """The same output, sooner, unless weights are asked for (benchmarks/README.md: how much). To do
    without, delete this section and let the layer make a RelativeMultiHeadAttention.

    - With fewer queries than a head is wide, as in generation: q (W k) is (q W) k, so that W_k is
      applied to the few queries instead of the many slots, and W_v to what they read there.
    - On a CPU, a few heads at a time: larger scores would be fresh pages from the system each time.
    """

    SCORES_AT_ONCE = 2**21  # 8 MiB in float32

    def forward(
        self, x: Tensor, past: Tensor, positions: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights:
            return super().forward(x, past, positions, need_weights)
        few = x.size(1) < self.head_dim
        if few and is_plain_linear(self.key_value) and is_plain_linear(self.relative_key):
            read = self.attend_to_slots(x, past, positions)
        else:
            read = self.attend_in_groups(*self.project(x, past, positions))
        side_by_side = read.movedim(0, 2).flatten(2)
        return self.output(side_by_side), None

    def attend_to_slots(self, x: Tensor, past: Tensor, positions: Tensor) -> Tensor:
        """What the heads read, `[H, B, T, K]`, by products with the slots themselves."""
        B, T, _ = x.shape
        K = self.head_dim
        scale = K**-0.5
        w_k, w_v = self.key_value.weight.unflatten(0, (2, -1, K))  # [H, K, D] each
        w_r = self.relative_key.weight.unflatten(0, (-1, K))
        q = self.heads(self.query(x))
        q_content = scale * (q + self.content_bias[:, None, None])
        q_position = scale * (q + self.position_bias[:, None, None])
        if B * T < K:
            by_distance = torch.einsum("hbtk,hkd->hbtd", q_position, w_r) @ positions.mT
        else:  # W_R R, once for all rows, is cheaper
            by_distance = torch.einsum("hbtk,hks->hbts", q_position, w_r @ positions.mT)
        position = relative_shift(F.pad(by_distance, (0, 1)))
        q_slots = torch.einsum("hbtk,hkd->hbtd", q_content, w_k)  # (q + u) W_k
        slots = torch.cat([past, x], dim=1)  # for one product; the past's gradient is computed, too
        content = torch.einsum("hbtd,bsd->hbts", q_slots, slots)
        weights = self.dropout(causal_softmax(content + position))
        slots_read = torch.einsum("hbts,bsd->hbtd", weights, slots)
        return torch.einsum("hbtd,hkd->hbtk", slots_read, w_v)

    def attend_in_groups(self, q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        """What the heads read, `[H, B, T, K]`, some heads at a time if all are too many."""
        scores_of_a_head = q.size(1) * q.size(2) * k.size(2)
        group = max(1, self.SCORES_AT_ONCE // scores_of_a_head)
        of_all_heads = (q, k, v, r, self.content_bias, self.position_bias)
        if q.device.type != "cpu" or group >= q.size(0):
            return relative_attention(*of_all_heads, self.dropout)[0]
        split = [part.split(group) for part in of_all_heads]
        read = []
        for of_some_heads in zip(*split, strict=True):
            read.append(relative_attention(*of_some_heads, self.dropout)[0])
        return torch.cat(read)


# ----------------------------------------------------------- compression functions (section 3.2)


class Compression(nn.Module):
    """Base of the compression functions f_c: `[B, c*n, D] -> [B, n, D]` for any n >= 0."""

    def __init__(self, d_model: int, compression_rate: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.compression_rate = compression_rate

    def blocks(self, old: Tensor) -> Tensor:
        """`[B, c*n, D] -> [B, n, c, D]`: the c memories that become one slot."""
        c = self.compression_rate
        D = self.d_model
        if old.dim() != 3 or old.size(1) % c or old.size(2) != D:
            raise ValueError(f"old must be [B, a multiple of {c}, {D}], got {list(old.shape)}")
        return old.unflatten(1, (old.size(1) // c, c))


class MeanPoolCompression(Compression):
    """The mean of c memories: `[B, c*n, D] -> [B, n, D]`."""

    def forward(self, old: Tensor) -> Tensor:
        return self.blocks(old).mean(dim=2)


class MaxPoolCompression(Compression):
    """The largest of c memories, feature by feature: `[B, c*n, D] -> [B, n, D]`."""

    def forward(self, old: Tensor) -> Tensor:
        return self.blocks(old).amax(dim=2)


class Conv1dCompression(Compression):
    """A convolution of kernel and stride c, no bias: `[B, c*n, D] -> [B, n, D]`. With the stride as
    wide as the kernel, that is one linear map of c memories laid end to end."""

    def __init__(self, d_model: int, compression_rate: int) -> None:
        super().__init__(d_model, compression_rate)
        self.conv = nn.Linear(compression_rate * d_model, d_model, bias=False)

    def forward(self, old: Tensor) -> Tensor:
        return self.conv(self.blocks(old).flatten(2))


class DilatedConvCompression(Conv1dCompression):
    """Convolutions of kernel 2 and dilations 1, 2, 4, each with ReLU, then `Conv1dCompression`:
    `[B, c*n, D] -> [B, n, D]`. A memory is convolved with older ones; zeros stand before the
    oldest, so that no slot is lost at the edge."""

    DILATIONS = (1, 2, 4)

    def __init__(self, d_model: int, compression_rate: int) -> None:
        super().__init__(d_model, compression_rate)
        convs = [nn.Linear(2 * d_model, d_model, bias=False) for _ in self.DILATIONS]
        self.dilated = nn.ModuleList(convs)

    def forward(self, old: Tensor) -> Tensor:
        for dilation, conv in zip(self.DILATIONS, self.dilated, strict=True):
            older = F.pad(old, (0, 0, dilation, 0))[:, : old.size(1)]
            old = F.relu(conv(torch.cat([older, old], dim=-1)))
        return super().forward(old)


class MostUsedCompression(Compression):
    """Keep the n of c*n memories that were attended to most, in their order: `old [B, c*n, D]`,
    `usage [B, c*n or more] -> [B, n, D]`. Of equally used memories the older stays."""

    def forward(self, old: Tensor, usage: Tensor) -> Tensor:
        n = self.blocks(old).size(1)
        if usage.dim() != 2 or len(usage) != len(old) or usage.size(1) < old.size(1):
            expected = f"[{len(old)}, {old.size(1)} or more]"
            raise ValueError(f"usage must be {expected}, got {list(usage.shape)}")
        usage_of_old = usage[:, : old.size(1)]
        most_used_first = usage_of_old.argsort(dim=1, descending=True, stable=True)
        kept = most_used_first[:, :n].sort(dim=1).values  # [B, n]
        return old.take_along_dim(kept[..., None], dim=1)

    @staticmethod
    def usage(weights: Tensor, slots: int) -> Tensor:
        """The attention that each of the newest slots received, averaged over the heads and over
        the queries that saw it: `weights [B, H, T, S] -> [B, slots]`."""
        T = weights.size(2)
        received = weights[..., -slots:].mean(dim=1).sum(dim=1)  # [B, slots]
        not_older = torch.arange(slots, 0, -1, device=weights.device)  # slots, ..., 1
        seen_by = not_older.clamp(max=T)  # queries: T, ..., T, ..., 1
        return received / seen_by


COMPRESSIONS = {
    "conv": Conv1dCompression,
    "dilated_conv": DilatedConvCompression,
    "most_used": MostUsedCompression,
    "mean_pool": MeanPoolCompression,
    "max_pool": MaxPoolCompression,
}

# ---------------------------------------------------------------------- memory rule (Algorithm 1)


class MemoryUpdate(NamedTuple):
    """What `update_memory` returns."""

    mem: Tensor  # [B, M, D], the next step's
    c_mem: Tensor  # [B, C, D], the next step's
    old: Tensor  # [B, c*n, D], the memories that left to be compressed (old_mem)
    compressed: Tensor  # [B, n, D], the slots that they became (new_cm)


def update_memory(
    mem: Tensor, c_mem: Tensor, h: Tensor, compress: Callable[[Tensor], Tensor], config: Config
) -> MemoryUpdate:
    """One layer's memories after a step: Algorithm 1's old_mem, new_cm and the next m and cm.

    `h [B, T, D]` joins `mem [B, M, D]`. If more than mem_len slots are then held, the oldest leave,
    c at a time, n = ceil(overflow / c) times. Each c become one slot through `compress` and join
    `c_mem [B, C, D]`, of which the newest c_mem_len stay. With mem_len = 4, c_mem_len = 3, c = 2,
    letters for memories and pairs in brackets for compressed slots:

        mem  c d e f   c_mem  (ab)   h  g h i
          -> 7 held, 3 too many, n = 2, so c d e f leave:  mem  g h i   c_mem  (ab) (cd) (ef)

    With c_mem_len = 0 exactly the overflow is dropped: a Transformer-XL. Memories keep their dtype,
    where autocast gives what is new another.
    """
    c = config.compression_rate
    # The paper evicts before h joins. The same slots leave, if mem is full, T <= M and c divides T.
    held = torch.cat([mem, h.to(mem.dtype)], dim=1)  # [B, M + T, D]
    if not config.bptt:  # no gradient goes to earlier steps, nor from the loss of f_c into h
        held = held.detach()
    overflow = max(0, held.size(1) - config.mem_len)
    if config.c_mem_len == 0:
        n = 0
        leaving = overflow
    else:
        n = -(-overflow // c)  # rounded up
        leaving = n * c
    old = held[:, : n * c]  # line 8
    if n > 0:
        compressed = compress(old)  # line 9
        c_mem = torch.cat([c_mem, compressed.to(c_mem.dtype)], dim=1)
    else:
        compressed = old  # [B, 0, D]
    next_mem = held[:, leaving:].clone()  # line 10; a view would keep alive all that left
    next_c_mem = c_mem[:, max(0, c_mem.size(1) - config.c_mem_len) :].clone()  # line 11
    if not config.bptt:  # no gradient comes from later steps to f_c, through the slots they read
        next_c_mem = next_c_mem.detach()
    return MemoryUpdate(next_mem, next_c_mem, old, compressed)


# ---------------------------------------------------------------- compression losses (section 3.2)


def attention_reconstruction_loss(
    attention: RelativeMultiHeadAttention, h: Tensor, old: Tensor, compressed: Tensor
) -> Tensor:
    """Algorithm 2: how far the attention of `h [B, T, D]` over the slots `compressed [B, n, D]` is
    from that over the memories `old [B, c*n, D]` that they stand for, before the output
    projection, as a mean square `[]`. All but `compressed` is constant."""

    def attend(q: Tensor, kv: Tensor) -> Tensor:  # line 6: by content alone, no mask, no dropout
        k, v = attention.heads(kv).chunk(2)
        scores = (q.size(-1) ** -0.5 * q) @ k.mT
        return scores.softmax(dim=-1, dtype=scores.dtype) @ v

    # Lines 3 to 5: h, old_mem, Q, K and V are constant.
    q = attention.heads(attention.query(h)).detach()
    target = attend(q, attention.key_value(old)).detach()
    # Line 5 for new_cm: K and V are constant here, too, but the gradient passes through them.
    key_value = attention.key_value
    if is_plain_linear(key_value):
        kv = F.linear(compressed, key_value.weight.detach())
    elif torch.is_grad_enabled():  # an adapter, say, or quantised
        # Its parameters are exchanged during the call: no other thread may run it then.
        trained = {name: p for name, p in key_value.named_parameters() if p.requires_grad}
        constants = {name: p.detach() for name, p in trained.items()}
        kv = functional_call(key_value, constants, (compressed,))
    else:
        kv = key_value(compressed)
    return F.mse_loss(attend(q, kv), target)  # line 8


def autoencoding_loss(decompress: nn.Module, old: Tensor, compressed: Tensor) -> Tensor:
    """How far the memories that g reads from their compressed slots are from what they were, as a
    mean square: `old [B, c*n, D]`, `compressed [B, n, D] -> []`, n >= 1. `old` is held constant.
    `decompress` is g, `[B, n, D] -> [B, n, c*D]`, the c memories of a slot end to end."""
    recovered = decompress(compressed).reshape(old.shape)
    return F.mse_loss(recovered, old.detach())


# ------------------------------------------------------------------------------------------ layer


class LayerOutput(NamedTuple):
    """What a layer returns."""

    h: Tensor  # [B, T, D], the next layer's input
    mem: Tensor  # [B, M, D], the next step's
    c_mem: Tensor  # [B, C, D], the next step's
    compression_loss: Tensor  # []
    attention_weights: Tensor | None  # [B, H, T, S], if needed


class CompressiveTransformerLayer(nn.Module):
    """Attention over both memories, feed-forward, and the memory of the layer's own inputs: one
    turn of the loop over layers, lines 5 to 12 of Algorithm 1."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        D = config.d_model
        self.config = config
        self.attention = FasterAttention(D, config.n_heads, config.dropout)
        self.attention_norm = nn.LayerNorm(D)
        self.feed_forward = nn.Sequential(
            nn.Linear(D, config.d_ff), nn.ReLU(), nn.Linear(config.d_ff, D)
        )
        self.feed_forward_norm = nn.LayerNorm(D)
        self.dropout = nn.Dropout(config.dropout)
        self.compress = COMPRESSIONS[config.compression](D, config.compression_rate)  # f_c
        self.decompress = None  # g
        self.loss_kind = "none"
        if list(self.compress.parameters()):  # pooling and most-used have nothing to train
            self.loss_kind = config.compression_loss
        if self.loss_kind == "autoencoding":
            # A transposed convolution of kernel and stride c, without bias.
            self.decompress = nn.Linear(D, config.compression_rate * D, bias=False)

    def forward(
        self,
        h: Tensor,
        mem: Tensor,
        c_mem: Tensor,
        positions: Tensor,
        need_loss: bool = True,
        need_weights: bool = False,
    ) -> LayerOutput:
        """`h [B, T, D]`, `mem [B, M, D]`, `c_mem [B, C, D]`, `positions [S, D]` (those of
        `RelativeMultiHeadAttention`). A loss that is not needed is zero."""
        # What attention reads is what memory keeps.
        x = self.attention_norm(h) if self.config.norm_first else h
        evicts = self.config.c_mem_len > 0 and mem.size(1) + x.size(1) > self.config.mem_len
        need_usage = evicts and isinstance(self.compress, MostUsedCompression)
        past = torch.cat([c_mem, mem], dim=1)  # oldest first
        attended, weights = self.attention(x, past, positions, need_weights or need_usage)
        if self.config.norm_first:
            h = h + self.dropout(attended)
            h = h + self.dropout(self.feed_forward(self.feed_forward_norm(h)))
        else:  # lines 7 and 12
            h = self.attention_norm(h + self.dropout(attended))
            h = self.feed_forward_norm(h + self.dropout(self.feed_forward(h)))
        compress = self.compress
        if need_usage:
            usage = compress.usage(weights, mem.size(1) + x.size(1))
            compress = partial(compress, usage=usage)
        update = update_memory(mem, c_mem, x, compress, self.config)  # lines 8 to 11
        loss = x.new_zeros(())
        if need_loss and self.loss_kind != "none" and update.old.size(1) > 0:
            loss = self.compression_loss(x, update.old, update.compressed)
        return LayerOutput(h, update.mem, update.c_mem, loss, weights if need_weights else None)

    def compression_loss(self, x: Tensor, old: Tensor, compressed: Tensor) -> Tensor:
        """Of what left memory. It trains f_c (and g) and nothing else."""
        if self.config.bptt:
            old = old.detach()  # its graph would let the loss train the layers that made it
            compressed = self.compress(old)
        if self.loss_kind == "autoencoding":
            return autoencoding_loss(self.decompress, old, compressed)
        return attention_reconstruction_loss(self.attention, x, old, compressed)


# ------------------------------------------------------------------------------------------ model


class CompressiveTransformer(nn.Module):
    """The language model: embedding, layers, (pre-norm) a last normalisation, and logits, which are
    not tied to the embedding. Initialised as torch does, u and v with zeros. The memory is the
    caller's: `forward` takes one and returns the next, changing nothing in place."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        layers = [CompressiveTransformerLayer(config) for _ in range(config.n_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(config.d_model) if config.norm_first else nn.Identity()
        self.logits = nn.Linear(config.d_model, config.vocab_size)

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters of the language model, and those of f_c (and g). Clip their gradients
        apart: a joint norm would let the larger scale the other down."""
        named = list(self.named_parameters())  # layers.0.compress..., layers.0.decompress...
        language_model = [p for name, p in named if "compress." not in name]
        compression = [p for name, p in named if "compress." in name]
        return language_model, compression

    def initial_memory(self, batch_size: int) -> Memory:
        """Empty memories `[B, 0, D]`; they grow to mem_len and c_mem_len slots."""
        empty = self.embedding.weight.new_zeros(batch_size, 0, self.config.d_model)
        layers = (empty,) * self.config.n_layers
        return Memory(mem=layers, c_mem=layers)

    def forward(
        self,
        tokens: Tensor,
        memory: Memory | None = None,
        *,
        need_loss: bool = True,
        need_weights: bool = False,
    ) -> Output:
        """One segment: `tokens [B, T]` (int64 or int32) and the memory that the segment before
        returned (None: empty). T may differ from call to call. A loss that is not needed is zero,
        and costs nothing. Raises TypeError or ValueError for what does not fit."""
        check_input(self, tokens, memory)
        if memory is None:
            memory = self.initial_memory(tokens.size(0))
        mem, c_mem = memory
        try:
            h = self.dropout(self.embedding(tokens))
        except IndexError:  # on an accelerator, the program is stopped instead
            V = self.config.vocab_size
            wrong = tokens[(tokens < 0) | (tokens >= V)][0].item()
            raise ValueError(f"tokens must lie in [0, {V}), got {wrong}") from None
        S = c_mem[0].size(1) + mem[0].size(1) + tokens.size(1)
        dtype = torch.promote_types(h.dtype, torch.float32)  # bfloat16 cannot count to 257
        distance = torch.arange(S - 1, -1, -1, dtype=dtype, device=h.device)
        positions = sinusoid(distance, self.config.d_model).to(h.dtype)
        outputs = []
        for layer, m, cm in zip(self.layers, mem, c_mem, strict=True):
            run_layer = layer
            if self.config.recompute and torch.is_grad_enabled():
                run_layer = partial(checkpoint, layer, use_reentrant=False)
            output = run_layer(h, m, cm, positions, need_loss, need_weights)
            h = output.h
            outputs.append(output)
        logits = self.logits(self.norm(h))
        next_mem = tuple(output.mem for output in outputs)
        next_c_mem = tuple(output.c_mem for output in outputs)
        losses = torch.stack([output.compression_loss for output in outputs])
        weights = tuple(output.attention_weights for output in outputs)
        return Output(logits, Memory(next_mem, next_c_mem), losses.mean(), losses, weights)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        memory: Memory | None = None,
        generator: torch.Generator | None = None,
        stream: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Continue `prompt [B, T]`, T >= 1, by sampling: `-> [B, T + max_new_tokens]`.

        The prompt is fed whole (in segments, where it is longer than mem_len and 512), then each
        new token once, with the memory carried on; a model without memory is fed the whole text
        again. Temperature 0 takes the likeliest token; top_k samples among the k likeliest.
        `memory` is what stood before the prompt. `stream` is called with each new token `[B, 1]`.
        Raises as `forward` does, and warns where dropout would change the text.
        """
        if self.training and self.config.dropout > 0:
            warnings.warn("generate in training mode drops out: call eval() first", stacklevel=3)
        check_input(self, prompt, memory)
        check_sampling(max_new_tokens, temperature, top_k)
        has_memory = self.config.mem_len + self.config.c_mem_len > 0
        tokens = prompt.clone()
        segment = prompt
        if has_memory:
            *prefill, segment = prompt.split(max(self.config.mem_len, 512), dim=1)
            for part in prefill:
                memory = self(part, memory, need_loss=False).memory
        for _ in range(max_new_tokens):
            output = self(segment, memory, need_loss=False)
            logits = output.logits[:, -1]
            next_token = sample(logits, temperature, top_k, generator).to(tokens.dtype)
            tokens = torch.cat([tokens, next_token], dim=1)
            if stream is not None:
                stream(next_token)
            segment = tokens
            if has_memory:
                segment = next_token
                memory = output.memory
        return tokens


def sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """One token for each row, from its logits: `[B, vocab_size] -> [B, 1]`."""
    if not logits.amax(dim=-1).isfinite().all():  # some may be -inf: tokens that are ruled out
        raise ValueError("the logits are not finite: look at the model's weights")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # The largest becomes 0 and others -inf at worst; the bounds keep out 0 / 0 and inf / inf.
    logits = logits.float() - logits.amax(dim=-1, keepdim=True)
    logits = logits / min(max(float(temperature), 1e-30), 1e30)
    if top_k is None:
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
    kept = logits.topk(min(top_k, logits.size(-1)))
    choice = torch.multinomial(kept.values.softmax(dim=-1), 1, generator=generator)
    return kept.indices.gather(-1, choice)


# ----------------------------------------------------------------------- checks of what is given


def check_config(config: Config) -> None:
    """Raise ValueError for a setting that cannot work. Numbers of other kinds (NumPy's, of a
    sweep) become Python's."""

    def need(ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {expected}, got {getattr(config, name)!r}")

    for name in ("vocab_size", "d_model", "n_heads", "n_layers", "d_ff", "compression_rate"):
        need(is_integer(getattr(config, name), 1), name, "an integer of at least 1")
        object.__setattr__(config, name, int(getattr(config, name)))
    for name in ("mem_len", "c_mem_len"):
        need(is_integer(getattr(config, name), 0), name, "an integer of at least 0")
        object.__setattr__(config, name, int(getattr(config, name)))
    for name in ("norm_first", "bptt", "recompute"):
        need(type(getattr(config, name)) is bool, name, "True or False")
    heads = config.n_heads
    rate = config.compression_rate
    need(config.d_model % heads == 0, "d_model", f"divisible by n_heads = {heads}")
    need(config.d_model % 2 == 0, "d_model", "even (a sine and a cosine for each frequency)")
    if config.c_mem_len > 0:  # an eviction takes up to c - 1 slots more than overflowed
        need(config.mem_len >= rate - 1, "mem_len", f"at least compression_rate - 1 = {rate - 1}")
    losses = ("attention", "autoencoding", "none")
    choices = {"compression": tuple(COMPRESSIONS), "compression_loss": losses}
    for name, known in choices.items():
        need(getattr(config, name) in known, name, f"one of {', '.join(known)}")
        object.__setattr__(config, name, str(getattr(config, name)))
    number = isinstance(config.dropout, numbers.Real)
    need(number and 0 <= config.dropout < 1, "dropout", "a number in [0, 1)")
    object.__setattr__(config, "dropout", float(config.dropout))


def check_input(model: CompressiveTransformer, tokens: Tensor, memory: Memory | None) -> None:
    """Raise TypeError or ValueError for tokens and memories that do not fit."""
    weight = model.embedding.weight
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be a tensor, got {type(tokens)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be torch.int64 or torch.int32, got {tokens.dtype}")
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens must be [B, T], both at least 1, got {list(tokens.shape)}")
    if tokens.device != weight.device:
        raise ValueError(f"tokens must have device {weight.device}, got {tokens.device}")
    if memory is None:
        return
    if not isinstance(memory, (tuple, list)) or len(memory) != 2:
        raise TypeError(f"memory must be a Memory(mem, c_mem) or None, got {type(memory)}")
    L = model.config.n_layers
    for name, layers in zip(Memory._fields, memory, strict=True):
        if not isinstance(layers, (tuple, list)):
            raise TypeError(f"memory.{name} must be a tuple of tensors, got {type(layers)}")
        if len(layers) != L:
            raise ValueError(f"memory.{name} must have {L} layers, got {len(layers)}")
        for i, slots in enumerate(layers):
            where = f"memory.{name}[{i}]"
            if not isinstance(slots, Tensor):
                raise TypeError(f"{where} must be a tensor, got {type(slots)}")
            shape = list(slots.shape)
            slots_of_first = layers[0].shape[1:2]  # of a tensor of any shape
            expected = [tokens.size(0), *slots_of_first, weight.size(1)]
            if shape != expected:
                raise ValueError(f"{where} must be [B, slots, D] = {expected}, got {shape}")
            if slots.dtype != weight.dtype:
                raise TypeError(f"{where} must have dtype {weight.dtype}, got {slots.dtype}")
            if slots.device != weight.device:
                raise ValueError(f"{where} must have device {weight.device}, got {slots.device}")


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None) -> None:
    """Raise ValueError for what `generate` cannot work with."""
    if not is_integer(max_new_tokens, 0):
        raise ValueError(f"max_new_tokens must be an integer of at least 0, got {max_new_tokens!r}")
    if not isinstance(temperature, numbers.Real) or not temperature >= 0:
        raise ValueError(f"temperature must be a number of at least 0, got {temperature!r}")
    if top_k is not None and not is_integer(top_k, 1):
        raise ValueError(f"top_k must be None or an integer of at least 1, got {top_k!r}")


def is_integer(value: object, least: int) -> bool:
    """Whether value is an integer, Python's or NumPy's, of at least `least`."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least
