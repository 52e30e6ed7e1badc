# SPDX-License-Identifier: MIT
"""The Compressive Transformer (Rae et al., 2019, arXiv 1911.05507) in one file.

A Transformer-XL keeps each layer's past inputs as memory and forgets the oldest. Here the oldest
are compressed instead: every c of them become one slot of a second, compressed memory, by a
function f_c that each layer learns from a loss of its own.

        forgotten <- [ compressed memory | memory | segment ] <- tokens
                       N_cm slots    f_c <- N_m slots   T

The file reads bottom-up, in the paper's order: notation, relative attention, compression
functions, memory rule, compression losses, layer, model. In a training loop of your own:

    model = CompressiveTransformer(Config(vocab_size=256))
    memory = None                                       # None: empty memories, which grow
    for tokens, targets in segments:                    # [B, T] each, every row a stream of text
        logits, memory, compression_loss = model(tokens, memory)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        (loss + compression_loss).backward()            # they share no parameter: no weight needed
        for group in model.parameter_groups():          # clip apart: a joint norm lets the larger
            nn.utils.clip_grad_norm_(group, 1.0)        # gradient scale the other down
        optimizer.step()
        optimizer.zero_grad()

Shapes, in the comments at line ends:
    B  rows of the batch              T  tokens of the segment (the paper's n_s)
    D  d_model, width of a slot       H  heads, each K = D / H wide
    M  slots of memory held           C  slots of compressed memory held      S = C + M + T
    c  compression rate               n  slots newly compressed in this step, from c*n memories
Slots are ordered oldest first, everywhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------ notation


def setting(default: object, help: str) -> Any:
    """A field of Config; a command line can show its help (train.py does)."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """The settings of a model. One that cannot work raises ValueError here, where it is made."""

    vocab_size: int = setting(256, "number of different tokens")
    d_model: int = setting(128, "D, width of the residual stream and of every slot")
    n_heads: int = setting(4, "H, attention heads of a layer")
    n_layers: int = setting(4, "L, layers")
    d_ff: int = setting(512, "width of the feed-forward's hidden layer")
    mem_len: int = setting(64, "N_m, slots of memory that a layer keeps")
    c_mem_len: int = setting(32, "N_cm, slots of compressed memory that a layer keeps")
    compression_rate: int = setting(4, "c, memories that become one compressed slot")
    compression: str = setting("conv", "f_c: conv, dilated_conv, most_used, mean_pool or max_pool")
    compression_loss: str = setting("attention", "attention, autoencoding or none")
    norm_first: bool = setting(True, "pre-norm, x + f(LN(x)); if not, post-norm, LN(x + f(x))")
    dropout: float = setting(0.0, "of embeddings, attention weights and both branches of a layer")
    bptt: bool = setting(False, "memories keep their graph: a later loss reaches f_c through them")
    recompute: bool = setting(False, "layers run again in backward and keep less until then")

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        for name in ("vocab_size", "d_model", "n_heads", "n_layers", "d_ff", "compression_rate"):
            value = getattr(self, name)
            need(type(value) is int and value >= 1, name, "an integer of at least 1")
        for name in ("mem_len", "c_mem_len"):
            value = getattr(self, name)
            need(type(value) is int and value >= 0, name, "an integer of at least 0")
        for name in ("norm_first", "bptt", "recompute"):
            need(type(getattr(self, name)) is bool, name, "True or False")
        heads, rate = self.n_heads, self.compression_rate
        need(self.d_model % heads == 0, "d_model", f"divisible by n_heads = {heads}")
        need(self.d_model % 2 == 0, "d_model", "even (a sine and a cosine for each frequency)")
        if self.c_mem_len > 0:  # an eviction takes up to c - 1 slots more than overflowed
            need(self.mem_len >= rate - 1, "mem_len", f"at least compression_rate - 1 = {rate - 1}")
        need(self.compression in COMPRESSIONS, "compression", f"one of {', '.join(COMPRESSIONS)}")
        names = ", ".join(COMPRESSION_LOSSES)
        need(self.compression_loss in COMPRESSION_LOSSES, "compression_loss", f"one of {names}")
        number = type(self.dropout) in (int, float)
        need(number and 0 <= self.dropout < 1, "dropout", "a number in [0, 1)")


class Memory(NamedTuple):
    """What the layers remember: for each layer one tensor `[B, slots, D]`, oldest slot first."""

    mem: tuple[Tensor, ...]
    c_mem: tuple[Tensor, ...]

    def detach(self) -> "Memory":
        """The same memory cut off from the graph that made it (of use with `Config.bptt`)."""
        return Memory(*(tuple(slots.detach() for slots in layers) for layers in self))


class Output(NamedTuple):
    """What one step returns: `logits [B, T, vocab_size]`, the memory to hand to the next step, and
    the compression loss, a scalar averaged over layers (zero when nothing was compressed)."""

    logits: Tensor
    memory: Memory
    compression_loss: Tensor


class Linear(nn.Linear):
    """nn.Linear, but a CPU's threads share the product of a large weight and few rows, as in
    generation. Torch leaves it to one thread, unless it is a batch or its numbers have two bytes,
    and one thread cannot read as fast as memory delivers."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if (
            self.in_features * self.out_features < 2**16  # waking threads would cost more
            or x.device.type != "cpu"
            or x.element_size() == 2
            or torch.is_autocast_enabled("cpu")
            or not 0 < rows <= 16  # from some more on, torch shares it, too
        ):
            return super().forward(x)
        parts = math.gcd(8, self.out_features)
        weight = self.weight.unflatten(0, (parts, -1)).mT  # [parts, in, out / parts]
        y = torch.bmm(x.reshape(rows, -1).expand(parts, -1, -1), weight)
        y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


# --------------------------------------------------------------------------- relative attention


def sinusoid(distance: Tensor, d_model: int) -> Tensor:
    """R, the encoding of distances: `[N] -> [N, D]`, sines first, then cosines (Transformer-XL,
    section 3.3). Computed for the lengths at hand, so that no length is built in."""
    i = torch.arange(0, d_model, 2, dtype=distance.dtype, device=distance.device)
    angle = distance[:, None] * 10000 ** (-i / d_model)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def relative_shift(scores: Tensor) -> Tensor:
    """Line the scores by distance up with the slots: `[..., T, S + 1] -> [..., T, S]`, no copy.

    Column p comes in as distance S - 1 - p, the last one (distance -1) as padding. Query t needs
    distance 0 in column S - T + t: row t moves left by T - 1 - t. Read on from the first row's
    shift with rows one shorter, and every row starts one further right than the row above. T = 3,
    S = 4, digits for distances:

        3 2 1 0 .        1 0 . 3      What follows a distance 0 is rubbish (the padding, then the
        3 2 1 0 .   ->   2 1 0 .      next row), and harmless: there stand the tokens after t,
        3 2 1 0 .        3 2 1 0      which the causal mask hides.
    """
    T, S = scores.size(-2), scores.size(-1) - 1
    return scores.flatten(-2)[..., T - 1 : T - 1 + T * S].unflatten(-1, (T, S))


# On a CPU, heads are taken in groups of about so many scores, which its caches hold. What is larger
# would also come as fresh pages from the system every time, and they cost more than the products.
SCORES_AT_ONCE = 2**21


class Attended(NamedTuple):
    """What attention returns: the output `[B, T, D]`; the weights `[B, H, T, S]`, if needed; and,
    for the compression loss, the queries, scaled, `[H*B, T, K]`, and the keys and values of all
    slots, `[2, H*B, S, K]`, if it has made any."""

    output: Tensor
    weights: Tensor | None
    q: Tensor
    kv: Tensor | None


class RelativeMultiHeadAttention(nn.Module):
    """Causal attention over memory and segment with relative positions (Transformer-XL, sec. 3.3):

    score(t, j) = [ (q_t + u) . k_j  +  (q_t + v) . W_R R_(t-j) ] / sqrt(K)
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.query = Linear(d_model, d_model, bias=False)
        self.key_value = Linear(d_model, 2 * d_model, bias=False)
        self.relative_key = Linear(d_model, d_model, bias=False)  # W_R
        self.content_bias = nn.Parameter(torch.zeros(n_heads, d_model // n_heads))  # u
        self.position_bias = nn.Parameter(torch.zeros(n_heads, d_model // n_heads))  # v
        self.output = Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        c_mem: Tensor,
        mem: Tensor,
        positions: Tensor,
        *,
        need_weights: bool = False,
    ) -> Attended:
        """Attend from `x [B, T, D]` to `c_mem [B, C, D]`, `mem [B, M, D]` and to x itself up to
        one's own position; `positions [S + 1, D]` is the `sinusoid` of the distances S - 1, ..., 0
        and of -1, which `relative_shift` wastes.

        Products are associative: q (W k) is (q W) k. Where there are fewer queries than a head is
        wide, as in generation, it is they that W is applied to, and no slot has to be projected.
        """
        (B, T, D), H, slots = x.shape, self.n_heads, (c_mem, mem, x)
        S, K = c_mem.size(1) + mem.size(1) + T, D // H
        if positions.shape != (S + 1, D):
            raise ValueError(f"positions must be [{S + 1}, {D}], got {list(positions.shape)}")
        q, biases = self.queries(x), (self.content_bias, self.position_bias)
        biases = [bias[:, None].to(q.dtype) for bias in biases]
        queries = [torch.add(q.view(H, B * T, K), bias, alpha=K**-0.5) for bias in biases]
        attend = self.attend_to_slots if T < K else self.attend_to_keys
        found, weights, kv = attend(queries, slots, positions, need_weights)
        found = found.view(H, B, T, K).permute(1, 2, 0, 3).flatten(2)  # [B, T, D]
        whole = torch.cat(weights).view(H, B, T, S).transpose(0, 1) if need_weights else None
        return Attended(self.output(found), whole, q, kv)

    def attend_to_keys(
        self,
        queries: list[Tensor],
        slots: tuple[Tensor, ...],
        positions: Tensor,
        need_weights: bool,
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Queries `[H, B*T, K]`, q + u and q + v, scaled, and slots, projected to keys and values
        -> what the heads found, `[H*B, T, K]`, the weights, in parts, if they are needed, and the
        keys and values."""
        # The memories need no gradient: products of their own, not one over all slots, save it.
        kv = torch.cat([self.key_value(part) for part in slots], dim=1)  # [B, S, 2*D]
        (B, S, _), H, T = kv.shape, self.n_heads, slots[-1].size(1)
        kv = self.heads(kv, parts=2)  # [2, H*B, S, K]
        on_cpu = kv.device.type == "cpu"
        group = max(1, SCORES_AT_ONCE // (B * T * S)) if on_cpu else H  # heads at once
        k, v = (x.split(group * B) for x in kv)  # [group*B, S, K] each
        r = self.heads(self.relative_key(positions[None]))[0].split(group)  # [group, S + 1, K]
        by_content, by_distance = (x.split(group) for x in queries)  # [group, B*T, K] each
        found, handed_out = [], []
        for q_k, k_h, v_h, q_r, r_h in zip(by_content, k, v, by_distance, r, strict=True):
            scores = relative_shift(torch.bmm(q_r, r_h.mT).view(-1, T, S + 1))
            scores = torch.baddbmm(scores, q_k.view(len(k_h), T, -1), k_h.mT)
            weights = self.masked_softmax(scores)  # [group*B, T, S]
            found.append(torch.bmm(F.dropout(weights, self.dropout, self.training), v_h))
            handed_out += [weights] * need_weights
        return torch.cat(found), handed_out, kv

    def attend_to_slots(
        self,
        queries: list[Tensor],
        slots: tuple[Tensor, ...],
        positions: Tensor,
        need_weights: bool,
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """The same, but the queries go through W_k to the slots, and what they find, `[H, B*T, K]`,
        through W_v. There are no keys and values."""
        (by_content, by_distance), S = queries, positions.size(0) - 1
        (H, _, K), D = by_content.shape, positions.size(1)
        B, T, _ = slots[-1].shape
        w_k, w_v = self.key_value.weight.view(2, H, K, D)
        w_r = self.relative_key.weight.view(H, K, D)
        r = positions.mT  # [D, S + 1]
        by_distance = by_distance @ w_r @ r if B * T < K else by_distance @ (w_r @ r)
        by_distance = relative_shift(by_distance.view(H, B, T, S + 1))
        q = self.by_row(by_content @ w_k, B)  # [B, H*T, D]
        by_content = torch.cat([torch.bmm(q, part.mT) for part in slots], dim=2)  # [B, H*T, S]
        weights = self.masked_softmax(by_distance + by_content.view(B, H, T, S).transpose(0, 1))
        kept = self.by_row(F.dropout(weights, self.dropout, self.training), B)  # [B, H*T, S]
        parts = zip(kept.split([part.size(1) for part in slots], dim=2), slots, strict=True)
        found = sum(torch.bmm(to_part, part) for to_part, part in parts)  # [B, H*T, D]
        found = found.view(B, H, T, D).transpose(0, 1).reshape(H, B * T, D)
        return found @ w_v.mT, [weights] * need_weights, None

    @staticmethod
    def masked_softmax(scores: Tensor) -> Tensor:
        """Attention weights from scores `[..., T, S]`: tokens after t are hidden from query t."""
        T, S = scores.shape[-2:]
        future = torch.ones(T, T, dtype=torch.bool, device=scores.device).triu(1)
        with torch.no_grad():  # in place, unseen by autograd: softmax sends no gradient there
            scores[..., S - T :].masked_fill_(future, -math.inf)
        return scores.softmax(dim=-1, dtype=scores.dtype)  # bfloat16 stays so under autocast

    def heads(self, x: Tensor, parts: int = 1) -> Tensor:
        """`[B, N, parts*D] -> [parts, H*B, N, K]`. Heads come before rows: one matrix product for
        each head then takes all rows to what they share, W_R R."""
        return x.unflatten(-1, (parts, self.n_heads, -1)).permute(2, 3, 0, 1, 4).flatten(1, 2)

    def by_row(self, x: Tensor, rows: int) -> Tensor:
        """`[H, B*T, N]` or `[H, B, T, N] -> [B, H*T, N]`."""
        return x.reshape(self.n_heads, rows, -1, x.size(-1)).transpose(0, 1).flatten(1, 2)

    def queries(self, x: Tensor) -> Tensor:
        """The queries of `x [B, T, D]`, scaled: `[H*B, T, K]`."""
        q = self.heads(self.query(x))[0]
        return q * q.size(-1) ** -0.5

    def project(self, slots: Tensor) -> Tensor:
        """Keys and values of `slots [B, N, D]`, with the parameters held constant, for the
        compression loss: `[2, H*B, N, K]`."""
        return self.heads(F.linear(slots, self.key_value.weight.detach()), parts=2)

    @staticmethod
    def content(q: Tensor, kv: Tensor) -> Tensor:
        """The attention that Algorithm 2 compares, by content alone, without mask, dropout or
        output projection: `q [H*B, T, K]`, scaled, and `kv [2, H*B, N, K] -> [H*B, T, K]`."""
        scores = torch.bmm(q, kv[0].mT)  # [H*B, T, N]
        return torch.bmm(scores.softmax(dim=-1, dtype=scores.dtype), kv[1])


# ------------------------------------------------------------- compression functions (section 3)


class Compression(nn.Module):
    """Base of the compression functions f_c: `[B, c*n, D] -> [B, n, D]` for any n >= 0."""

    def __init__(self, d_model: int, compression_rate: int) -> None:
        super().__init__()
        self.d_model, self.compression_rate = d_model, compression_rate

    def blocks(self, old: Tensor) -> Tensor:
        """`[B, c*n, D] -> [B, n, c, D]`: the c memories that become one slot."""
        c, D = self.compression_rate, self.d_model
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
        self.conv = Linear(compression_rate * d_model, d_model, bias=False)

    def forward(self, old: Tensor) -> Tensor:
        return self.conv(self.blocks(old).flatten(2))


class DilatedConvCompression(Conv1dCompression):
    """Convolutions of kernel 2 and dilations 1, 2, 4, each with ReLU, then `Conv1dCompression`:
    `[B, c*n, D] -> [B, n, D]`. A memory is convolved with older ones; zeros stand before the
    oldest, so that no slot is lost at the edge."""

    def __init__(self, d_model: int, compression_rate: int) -> None:
        super().__init__(d_model, compression_rate)
        self.dilations = 1, 2, 4
        maps = (Linear(2 * d_model, d_model, bias=False) for _ in self.dilations)
        self.dilated = nn.ModuleList(maps)

    def forward(self, old: Tensor) -> Tensor:
        for dilation, conv in zip(self.dilations, self.dilated, strict=True):
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
        order = usage[:, : old.size(1)].argsort(dim=1, descending=True, stable=True)
        kept = order[:, :n].sort(dim=1).values  # [B, n]
        return old.take_along_dim(kept[..., None], dim=1)

    @staticmethod
    def usage(weights: Tensor, slots: int) -> Tensor:
        """The attention that each of the newest slots received, averaged over the heads and over
        the queries that saw it: `weights [B, H, T, S] -> [B, slots]`."""
        T = weights.size(2)
        received = weights[..., weights.size(3) - slots :].mean(dim=1).sum(dim=1)  # [B, slots]
        seen_by = torch.arange(slots, 0, -1, device=weights.device)  # queries: T, ..., T, ..., 1
        return received / seen_by.clamp(max=T)


COMPRESSIONS = {
    "conv": Conv1dCompression,
    "dilated_conv": DilatedConvCompression,
    "most_used": MostUsedCompression,
    "mean_pool": MeanPoolCompression,
    "max_pool": MaxPoolCompression,
}

# ---------------------------------------------------------------------- memory rule (Algorithm 1)


class MemoryUpdate(NamedTuple):
    """What `update_memory` returns: a layer's memories after the step, the memories that left
    `[B, c*n, D]`, and the slots that they became `[B, n, D]`."""

    mem: Tensor
    c_mem: Tensor
    old: Tensor
    compressed: Tensor


def update_memory(
    mem: Tensor,
    c_mem: Tensor,
    h: Tensor,
    compress: Callable[[Tensor], Tensor],
    *,
    mem_len: int,
    c_mem_len: int,
    compression_rate: int,
) -> MemoryUpdate:
    """One layer's memories after a step: Algorithm 1's old_mem, new_cm and the next m and cm.

    `h [B, T, D]` joins `mem [B, M, D]`. If more than mem_len slots are then held, the oldest leave,
    c at a time, until at most mem_len are left: n = ceil(overflow / c) times. Each c become one
    slot through `compress` and join `c_mem [B, C, D]`, of which the newest c_mem_len stay. With
    c_mem_len = 0 nothing is compressed and exactly the overflow is dropped. With mem_len = 4,
    c = 2, letters for memories and pairs in brackets for compressed slots:

        mem  c d e f   c_mem  (ab)   h  g h i
          -> 7 held, 3 too many, n = 2, so c d e f leave:  mem  g h i   c_mem  (ab) (cd) (ef)

    The arguments are not changed and nothing is detached. `compress` must take any multiple of c;
    it gets too few memories, and the functions above say so, if mem_len < c - 1.
    """
    held = torch.cat([mem, h], dim=1)  # [B, M + T, D]
    overflow = max(0, held.size(1) - mem_len)
    n = -(-overflow // compression_rate) if c_mem_len > 0 else 0
    old, mem = held[:, : n * compression_rate], held[:, max(n * compression_rate, overflow) :]
    compressed = old
    if n > 0:
        compressed = compress(old)
        c_mem = torch.cat([c_mem, compressed.to(c_mem.dtype)], dim=1)
    return MemoryUpdate(mem, c_mem[:, max(0, c_mem.size(1) - c_mem_len) :], old, compressed)


# ---------------------------------------------------------------- compression losses (section 3.1)


def attention_reconstruction_loss(
    attention: RelativeMultiHeadAttention, q: Tensor, kv: Tensor, compressed: Tensor
) -> Tensor:
    """How far attention over the compressed slots is from attention over the memories that they
    stand for (Algorithm 2), as a mean square: queries, scaled, `q [H*B, T, K]`, keys and values of
    those memories `kv [2, H*B, c*n, K]`, `compressed [B, n, D] -> []`. Only `compressed` carries a
    gradient; zero if there is no slot."""
    if kv.size(2) == 0:
        return compressed.new_zeros(())
    q, kv = q.detach(), kv.detach()
    target = attention.content(q, kv)
    return F.mse_loss(attention.content(q, attention.project(compressed)), target)


class Decompression(nn.Module):
    """g of the auto-encoding loss, a transposed convolution of kernel and stride c without bias:
    `[B, n, D] -> [B, c*n, D]`."""

    def __init__(self, d_model: int, compression_rate: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.conv = Linear(d_model, compression_rate * d_model, bias=False)

    def forward(self, compressed: Tensor) -> Tensor:
        return self.conv(compressed).unflatten(-1, (-1, self.d_model)).flatten(1, 2)


def autoencoding_loss(
    decompress: Callable[[Tensor], Tensor], old: Tensor, compressed: Tensor
) -> Tensor:
    """How far the memories read back from their compressed slots are from what they were, as a mean
    square: `old [B, c*n, D]`, `compressed [B, n, D] -> []`. `old` is held constant; zero if there
    is no slot."""
    if old.size(1) == 0:
        return old.new_zeros(())
    return F.mse_loss(decompress(compressed), old.detach())


COMPRESSION_LOSSES = "attention", "autoencoding", "none"

# ------------------------------------------------------------------------------------------ layer


class CompressiveTransformerLayer(nn.Module):
    """Attention over both memories, feed-forward, and the memory of the layer's own inputs: one
    turn of Algorithm 1's loop over layers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, D, c = config, config.d_model, config.compression_rate
        self.attention = RelativeMultiHeadAttention(D, config.n_heads, config.dropout)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        inner, outer = Linear(D, config.d_ff), Linear(config.d_ff, D)
        self.feed_forward = nn.Sequential(inner, nn.ReLU(), outer)
        self.dropout = nn.Dropout(config.dropout)
        self.compress = COMPRESSIONS[config.compression](D, c)  # f_c
        trained = next(self.compress.parameters(), None) is not None
        self.compression_loss = config.compression_loss if trained else "none"
        autoencoding = self.compression_loss == "autoencoding"
        self.decompress = Decompression(D, c) if autoencoding else None  # g

    def forward(
        self, h: Tensor, mem: Tensor, c_mem: Tensor, positions: Tensor, *, need_loss: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`h [B, T, D]`, `mem [B, M, D]`, `c_mem [B, C, D]`, `positions [S + 1, D]` (see attention)
        -> the layer above's h, the next step's mem and c_mem, and the compression loss, a scalar
        (zero if it is not needed)."""
        pre_norm = self.config.norm_first
        x = self.attention_norm(h) if pre_norm else h  # what attention reads is what memory keeps
        by_use = isinstance(self.compress, MostUsedCompression)  # needs attention's weights
        read = self.attention(x, c_mem, mem, positions, need_weights=by_use)
        if pre_norm:
            h = h + self.dropout(read.output)
            h = h + self.dropout(self.feed_forward(self.feed_forward_norm(h)))
        else:
            h = self.attention_norm(h + self.dropout(read.output))
            h = self.feed_forward_norm(h + self.dropout(self.feed_forward(h)))
        return h, *self.remember(x, mem, c_mem, read, need_loss)

    def remember(
        self, x: Tensor, mem: Tensor, c_mem: Tensor, read: Attended, need_loss: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next step's mem and c_mem, and the compression loss. No gradient passes from step to
        step, unless `bptt` asks for it, nor from the loss to anything but f_c (and g)."""
        config, compress = self.config, self.compress
        if isinstance(compress, MostUsedCompression):
            usage = compress.usage(read.weights, mem.size(1) + x.size(1))
            compress = partial(compress, usage=usage)
        if not config.bptt:
            x, mem = x.detach(), mem.detach()
        first = c_mem.size(1)  # the oldest memory's place among attention's keys
        mem, c_mem, old, compressed = update_memory(
            mem,
            c_mem,
            x,
            compress,
            mem_len=config.mem_len,
            c_mem_len=config.c_mem_len,
            compression_rate=config.compression_rate,
        )

        loss = x.new_zeros(())
        if need_loss and self.compression_loss != "none":
            if config.bptt:
                old = old.detach()
                compressed = compress(old)
            if self.decompress is not None:
                loss = autoencoding_loss(self.decompress, old, compressed)
            else:
                last = first + old.size(1)
                kv = self.attention.project(old) if read.kv is None else read.kv[:, :, first:last]
                loss = attention_reconstruction_loss(self.attention, read.q, kv, compressed)
        return mem, c_mem if config.bptt else c_mem.detach(), loss


# ------------------------------------------------------------------------------------------ model


class CompressiveTransformer(nn.Module):
    """The language model: embedding, layers, (pre-norm) a last normalisation, and logits.

    The memory is the caller's: `forward` takes one and returns the next, changing nothing in place.
    Keep it, drop it (None starts afresh), or store it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            CompressiveTransformerLayer(config) for _ in range(config.n_layers)
        )
        self.norm = nn.LayerNorm(config.d_model) if config.norm_first else nn.Identity()
        self.logits = Linear(config.d_model, config.vocab_size)

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The parameters that the language-model loss trains, and those that the compression loss
        trains. Clip their gradients apart: a joint norm lets either scale the other down."""
        compression = [
            parameter
            for layer in self.layers
            for module in (layer.compress, layer.decompress)
            if module is not None
            for parameter in module.parameters()
        ]
        theirs = set(compression)
        return [p for p in self.parameters() if p not in theirs], compression

    def initial_memory(self, batch_size: int) -> Memory:
        """Empty memories `[B, 0, D]`; they grow to mem_len and c_mem_len slots."""
        empty = self.embedding.weight.new_zeros(batch_size, 0, self.config.d_model)
        return Memory(*((empty,) * self.config.n_layers for _ in range(2)))

    def forward(
        self, tokens: Tensor, memory: Memory | None = None, *, need_loss: bool = True
    ) -> Output:
        """One segment: `tokens [B, T]` (int64 or int32) and the memory that the segment before
        returned (None: empty) -> `Output(logits [B, T, vocab_size], memory, compression_loss)`.

        T may differ from call to call. A loss that is not needed is zero, and costs nothing. Raises
        TypeError or ValueError for what does not fit, except for tokens out of range on an
        accelerator, where looking would make it wait: there the embedding's own check stops the
        program.
        """
        self._check(tokens, memory)
        memory = self.initial_memory(tokens.size(0)) if memory is None else Memory(*memory)
        h = self.dropout(self.embedding(tokens))
        S = tokens.size(1) + memory.mem[0].size(1) + memory.c_mem[0].size(1)
        dtype = torch.promote_types(h.dtype, torch.float32)  # bfloat16 cannot count to 257
        distance = torch.arange(S - 1, -2, -1, dtype=dtype, device=h.device)  # to -1: attention's
        positions = sinusoid(distance, self.config.d_model).to(h.dtype)
        recompute = self.config.recompute and torch.is_grad_enabled()
        mems, c_mems, losses = [], [], []
        for layer, mem, c_mem in zip(self.layers, *memory, strict=True):
            run = partial(checkpoint, layer, use_reentrant=False) if recompute else layer
            h, mem, c_mem, loss = run(h, mem, c_mem, positions, need_loss=need_loss)
            mems.append(mem)
            c_mems.append(c_mem)
            losses.append(loss)
        logits = self.logits(self.norm(h))
        return Output(logits, Memory(tuple(mems), tuple(c_mems)), torch.stack(losses).mean())

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

        Every token is fed once: the prompt whole (in segments, where it is longer than mem_len and
        512), then each new token, the memory carried on as in training. A model without memory is
        fed the whole text again for each token. Temperature 0 takes the likeliest token; top_k
        samples among the k likeliest. `memory` is what stood before the prompt. `stream` is called
        with each new token `[B, 1]` as it comes. Dropout is as the module's mode says: call
        `eval()` first. Raises as `forward` does.
        """
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        if not temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {top_k}")
        self._check(prompt, memory)
        remembers = self.config.mem_len + self.config.c_mem_len > 0
        tokens, length = prompt, max(self.config.mem_len, 512)
        segments = prompt.split(length, dim=1) if remembers else (prompt,)
        for _ in range(max_new_tokens):
            for segment in segments:
                logits, memory, _ = self(segment, memory, need_loss=False)
            logits = logits[:, -1]  # [B, vocab_size]
            if temperature == 0:
                new = logits.argmax(dim=-1, keepdim=True)
            else:
                logits = logits.float() / temperature
                if top_k is not None and top_k < logits.size(-1):
                    least = logits.topk(top_k).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -math.inf)
                new = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
            new = new.to(tokens.dtype)
            tokens = torch.cat([tokens, new], dim=1)
            if stream is not None:
                stream(new)
            segments = (new if remembers else tokens,)
        return tokens

    def _check(self, tokens: Tensor, memory: Memory | None) -> None:
        """Raise for tokens and memories that do not fit the model or each other."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be torch.int64 or torch.int32, got {tokens.dtype}")
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(f"tokens must be [B, T], both at least 1, got {list(tokens.shape)}")
        like, L = self.embedding.weight, self.config.n_layers
        if tokens.device != like.device:
            raise ValueError(f"tokens must have device {like.device}, got {tokens.device}")
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(x) for x in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                came = low if low < 0 else high
                raise ValueError(f"tokens must lie in [0, {self.config.vocab_size}), got {came}")
        if memory is None:
            return
        if not isinstance(memory, tuple) or len(memory) != 2:
            raise TypeError(f"memory must be a Memory(mem, c_mem) or None, got {type(memory)}")
        for name, layers in zip(Memory._fields, memory, strict=True):
            if len(layers) != L:
                raise ValueError(f"memory.{name} must have {L} layers, got {len(layers)}")
            for i, slots in enumerate(layers):
                where, shape = f"memory.{name}[{i}]", list(slots.shape)
                expected = [tokens.size(0), layers[0].size(1), like.size(1)]
                if shape != expected:
                    raise ValueError(f"{where} must be [B, slots, D] = {expected}, got {shape}")
                for what in ("dtype", "device"):
                    if getattr(slots, what) != getattr(like, what):
                        wanted, came = getattr(like, what), getattr(slots, what)
                        error = TypeError if what == "dtype" else ValueError
                        raise error(f"{where} must have {what} {wanted}, got {came}")
