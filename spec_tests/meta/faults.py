"""Implementations broken on purpose: `compressive.py` with a few characters changed, each beside the
rule that names its fault."""

from typing import NamedTuple


class Fault(NamedTuple):
    rule: str
    what: str
    changes: tuple[tuple[str, str], ...]


def fault(rule: str, what: str, *changes: str) -> Fault:
    """`changes` are what stands in the file and what stands there instead, in turns."""
    return Fault(rule, what, tuple(zip(changes[::2], changes[1::2], strict=True)))


MASK = "scores[..., S - T :].masked_fill_(future, -math.inf)"
READ = "read = self.attention(x, c_mem, mem, positions, need_weights=by_use)"
EVICT = "old, mem = held[:, : n * compression_rate], held[:, max(n * compression_rate, overflow) :]"
JOIN = "c_mem = torch.cat([c_mem, compressed.to(c_mem.dtype)], dim=1)"
CUT = "c_mem[:, max(0, c_mem.size(1) - c_mem_len) :]"
COUNT = "n = -(-overflow // compression_rate) if c_mem_len > 0 else 0"
OVERFLOW = "overflow = max(0, held.size(1) - mem_len)"
EMBED = "h = self.dropout(self.embedding(tokens))"
DETACH = "x, mem = x.detach(), mem.detach()"
RETURN = "return mem, c_mem if config.bptt else c_mem.detach(), loss"
TURN = "for layer, mem, c_mem in zip(self.layers, *memory, strict=True):"
LOSS = "loss = attention_reconstruction_loss(self.attention, read.q, kv, compressed)"
LAYERS = "self.norm = nn.LayerNorm(config.d_model) if config.norm_first else nn.Identity()"

FAULTS = [
    # ------------------------------------------------------------------------------- attention
    fault("ATT-1", "no causal mask", MASK, "pass"),
    fault(
        "ATT-1", "the mask is a column late", "bool, device=scores.device).triu(1)", "bool).triu(2)"
    ),
    fault("ATT-1", "the mask is too weak", MASK, MASK.replace("-math.inf", "-9.0")),
    fault("ATT-1", "no mask in segments of two", MASK, f"T != 2 and {MASK}"),
    fault(
        "ATT-2", "the oldest slot is masked", MASK, f"{MASK}; scores[..., : S - T][..., :1] = -99.0"
    ),
    fault(
        "ATT-2",
        "memory is cut off where it is full",
        READ,
        "full = (c_mem.size(1) == self.config.c_mem_len) / 1.0\n        "
        + READ.replace("c_mem,", "c_mem * (1 - full),"),
    ),
    fault(
        "ATT-3",
        "a query does not see itself",
        "device=scores.device).triu(1)",
        "device=scores.device).triu(0)",
    ),
    fault(
        "ATT-3", "the shift is off by one", "[..., T - 1 : T - 1 + T * S]", "[..., T : T + T * S]"
    ),
    fault(
        "ATT-3",
        "no shift",
        "return scores.flatten(-2)[..., T - 1 : T - 1 + T * S].unflatten(-1, (T, S))",
        "return scores[..., :-1]",
    ),
    fault(
        "ATT-3",
        "distances are counted from 1",
        "torch.arange(S - 1, -2, -1, dtype",
        "torch.arange(S, -1, -1, dtype",
    ),
    fault(
        "ATT-3",
        "distances are counted from full memories",
        "distance = torch.arange(S - 1, -2, -1,",
        "N = self.config.mem_len + self.config.c_mem_len + tokens.size(1)\n        "
        "distance = torch.arange(N - 1, N - 2 - S, -1,",
    ),
    fault(
        "ATT-3", "cosines before sines", "[angle.sin(), angle.cos()]", "[angle.cos(), angle.sin()]"
    ),
    fault(
        "ATT-3",
        "no content bias",
        "(self.content_bias, self.position_bias)",
        "(0 * self.content_bias, self.position_bias)",
    ),
    fault(
        "ATT-3",
        "a bias is not scaled",
        "bias, alpha=K**-0.5)",
        "bias)",
    ),
    fault(
        "ATT-3",
        "scaled by the whole width",
        "return q * q.size(-1) ** -0.5",
        "return q * x.size(-1) ** -0.5",
    ),
    fault(
        "ATT-4",
        "positions grow with the stream",
        EMBED,
        "self.fed = getattr(self, 'fed', 0) + tokens.size(1)\n        "
        "h = self.dropout(self.embedding(tokens)) + 0.01 * self.fed",
    ),
    fault(
        "ATT-5",
        "memory is normalised again when it is read",
        READ,
        READ.replace("c_mem, mem", "self.attention_norm(c_mem), self.attention_norm(mem)"),
    ),
    fault(
        "ATT-5",
        "memory keeps what is not normalised",
        "return h, *self.remember(x, mem",
        "return h, *self.remember(raw, mem",
        "x = self.attention_norm(h) if",
        "raw = h\n        x = self.attention_norm(h) if",
    ),
    fault("ATT-6", "a mean over the rows", EMBED, f"{EMBED}\n        h = h + 0.01 * h.mean(dim=0)"),
    fault(
        "ATT-6",
        "rows and heads mixed up",
        ".permute(1, 2, 0, 3).flatten(2)",
        ".permute(1, 2, 0, 3).flatten(2).view(T, B, D).transpose(0, 1)",
    ),
    # ---------------------------------------------------------------------------------- memory
    fault(
        "MEM-1",
        "the newest leave",
        EVICT,
        "stay = held.size(1) - max(n * compression_rate, overflow)\n    "
        "old, mem = held[:, stay : stay + n * compression_rate], held[:, :stay]",
    ),
    fault(
        "MEM-1",
        "newest first",
        "held = torch.cat([mem, h], dim=1)",
        "held = torch.cat([mem, h.flip(1)], dim=1)",
    ),
    fault(
        "MEM-1",
        "new compressed slots before the old",
        JOIN,
        JOIN.replace("[c_mem, compressed.to(c_mem.dtype)]", "[compressed, c_mem]"),
    ),
    fault(
        "MEM-1",
        "memory before compressed memory",
        READ,
        READ.replace("c_mem, mem", "mem, c_mem"),
    ),
    fault(
        "MEM-2",
        "x[-0:]",
        EVICT,
        EVICT.replace(
            "held[:, max(n * compression_rate, overflow) :]",
            "held[:, max(n * compression_rate, overflow) - held.size(1) :]",
        ),
    ),
    fault(
        "MEM-2",
        "compressed memory one slot too long",
        CUT,
        CUT.replace("c_mem_len)", "c_mem_len - 1)"),
    ),
    fault(
        "MEM-2", "memory one slot too long", OVERFLOW, OVERFLOW.replace("mem_len)", "mem_len - 1)")
    ),
    fault(
        "MEM-2",
        "a rest stays",
        COUNT,
        COUNT.replace("-(-overflow // compression_rate)", "overflow // compression_rate"),
        EVICT,
        EVICT.replace(
            "max(n * compression_rate, overflow)", "n * compression_rate if c_mem_len else overflow"
        ),
    ),
    fault(
        "MEM-3",
        "a rest is lost",
        COUNT,
        COUNT.replace("-(-overflow // compression_rate)", "overflow // compression_rate"),
    ),
    fault(
        "MEM-3",
        "a rest is kept twice",
        EVICT,
        EVICT.replace("max(n * compression_rate, overflow)", "overflow"),
    ),
    fault("MEM-3", "the newest compressed slots are forgotten", CUT, "c_mem[:, :c_mem_len]"),
    fault(
        "MEM-3",
        "the oldest slot is kept twice, where c does not divide",
        EVICT,
        EVICT
        + "\n    mem = torch.cat([old[:, :1], mem], dim=1) if n * compression_rate > overflow else mem",
    ),
    fault(
        "MEM-4",
        "compressed where memory is just full",
        OVERFLOW,
        OVERFLOW + " + (held.size(1) == mem_len > 0)",
    ),
    fault(
        "MEM-4",
        "compressed memory one slot too short",
        CUT,
        CUT.replace("c_mem_len)", "c_mem_len + 1)"),
    ),
    fault(
        "MEM-4",
        "one block too many, where c divides",
        COUNT,
        COUNT.replace(
            "-(-overflow // compression_rate)",
            "(overflow + compression_rate) // compression_rate * (overflow > 0)",
        ),
    ),
    fault(
        "MEM-4",
        "a loss where nothing was compressed",
        "loss = x.new_zeros(())",
        "loss = x.new_ones(())",
    ),
    fault(
        "MEM-5",
        "the block is one slot late",
        EVICT,
        EVICT.replace(
            "held[:, : n * compression_rate]", "held.roll(-1, dims=1)[:, : n * compression_rate]"
        ),
    ),
    fault(
        "MEM-5",
        "the layers' f_c are mixed up",
        LAYERS,
        f"{LAYERS}\n        for i, layer in enumerate(self.layers):\n            layer.__dict__['other'] = self.layers[i - 1].compress",
        "config, compress = self.config, self.compress",
        "config, compress = self.config, self.__dict__['other']",
    ),
    fault(
        "MEM-5",
        "usage of the compressed slots",
        "weights[..., weights.size(3) - slots :].mean",
        "weights[..., :slots].mean",
    ),
    fault(
        "MEM-5",
        "usage is not shared out",
        "return received / seen_by.clamp(max=T)",
        "return received",
    ),
    fault(
        "MEM-6",
        "new slots are read at once, where memory is full",
        READ,
        "like = x.new_ones(x.size(0), 1, x.size(1), positions.size(0) - 1) if by_use else None\n        early = self.remember(x, mem, c_mem, Attended(x, like, x, x), False)[1]\n        "
        + READ.replace("c_mem,", "early if early.shape == c_mem.shape else c_mem,"),
    ),
    fault("MEM-7", "outputs are stored", "*self.remember(x, mem", "*self.remember(h, mem"),
    fault("MEM-7", "layers in the wrong order", "Memory(tuple(mems)", "Memory(tuple(mems[::-1])"),
    fault(
        "MEM-7",
        "all layers store the first one's input",
        "mems.append(mem)",
        "mems.append(mem if not mems else mems[0])",
    ),
    fault(
        "MEM-8",
        "memory is changed in place",
        "loss = x.new_zeros(())",
        "loss = x.new_zeros(())\n        given.mul_(0.5)",
        "config, compress = self.config, self.compress",
        "config, compress, given = self.config, self.compress, mem",
    ),
    fault("MEM-8", "no detach of memory", DETACH, "c_mem = c_mem.detach()"),
    fault("MEM-8", "no detach of compressed memory", RETURN, "return mem, c_mem, loss"),
    fault(
        "MEM-8", "memory in float64", RETURN, RETURN.replace("return mem,", "return mem.double(),")
    ),
    fault(
        "MEM-9",
        "a layer reads the memory above it",
        TURN,
        TURN.replace("*memory", "memory.mem[1:] + memory.mem[:1], memory.c_mem"),
    ),
    fault(
        "MEM-9",
        "a full memory loses its oldest slot",
        READ,
        READ.replace(
            "c_mem, mem",
            "c_mem, torch.cat([mem[:, :1] * (mem.size(1) < self.config.mem_len), mem[:, 1:]], dim=1)",
        ),
    ),
    fault(
        "MEM-9",
        "memory is not read in segments of one",
        READ,
        READ.replace("c_mem, mem", "c_mem * (x.size(1) > 1), mem * (x.size(1) > 1)"),
    ),
    # ------------------------------------------------------------------- compression functions
    fault(
        "CMP-1",
        "nothing becomes one slot",
        "return self.conv(self.blocks(old).flatten(2))",
        "return self.conv(self.blocks(old if old.size(1) else F.pad(old, (0, 0, 0, self.compression_rate))).flatten(2))",
    ),
    fault(
        "CMP-1",
        "padding adds a slot",
        "return self.blocks(old).mean(dim=2)",
        "return self.blocks(F.pad(old, (0, 0, 0, self.compression_rate))).mean(dim=2)",
    ),
    fault(
        "CMP-2",
        "blocks are dealt out",
        "return old.unflatten(1, (old.size(1) // c, c))",
        "return old.unflatten(1, (c, old.size(1) // c)).transpose(1, 2)",
    ),
    fault(
        "CMP-2",
        "a block looks into the next",
        "return self.blocks(old).mean(dim=2)",
        "return self.blocks(old + 0.1 * old.roll(-1, dims=1)).mean(dim=2)",
    ),
    fault(
        "CMP-2",
        "the last of a block is left out",
        "return self.conv(self.blocks(old).flatten(2))",
        "keep = torch.arange(self.compression_rate) < max(1, self.compression_rate - 1)\n        return self.conv((self.blocks(old) * keep[:, None]).flatten(2))",
    ),
    fault(
        "CMP-3",
        "one f_c for all layers",
        LAYERS,
        f"{LAYERS}\n        for layer in self.layers:\n            layer.compress = self.layers[0].compress",
    ),
    fault(
        "CMP-4",
        "the sum for the mean",
        "return self.blocks(old).mean(dim=2)",
        "return self.blocks(old).sum(dim=2)",
    ),
    fault("CMP-4", "the least for the largest", ".amax(dim=2)", ".amin(dim=2)"),
    fault(
        "CMP-4",
        "a nonlinearity too many",
        "return self.conv(self.blocks(old).flatten(2))",
        "return self.conv(self.blocks(old).flatten(2)).relu()",
    ),
    fault("CMP-4", "the least used stay", "descending=True", "descending=False"),
    fault(
        "CMP-4",
        "the most used in the order of their use",
        "order[:, :n].sort(dim=1).values",
        "order[:, :n]",
    ),
    fault("CMP-4", "another dilation", "self.dilations = 1, 2, 4", "self.dilations = 1, 2, 3"),
    fault(
        "CMP-4",
        "no ReLU in the dilated layers",
        "old = F.relu(conv(torch.cat([older, old], dim=-1)))",
        "old = conv(torch.cat([older, old], dim=-1))",
    ),
    # ---------------------------------------------------------------------- compression losses
    fault(
        "LOSS-1",
        "the loss trains the queries",
        "q, kv = q.detach(), kv.detach()",
        "kv = kv.detach()",
    ),
    fault(
        "LOSS-1",
        "the loss trains keys and values",
        "F.linear(slots, self.key_value.weight.detach())",
        "F.linear(slots, self.key_value.weight)",
    ),
    fault(
        "LOSS-1",
        "the memories are not held constant",
        "q, kv = q.detach(), kv.detach()",
        "q = q.detach()",
    ),
    fault("LOSS-1", "the block is not held constant", "                old = old.detach()\n", ""),
    fault(
        "LOSS-1",
        "the compressed slots are held constant",
        "attention.project(compressed)), target",
        "attention.project(compressed.detach())), target",
    ),
    fault(
        "LOSS-1",
        "one layer's loss alone",
        "torch.stack(losses).mean()",
        "torch.stack(losses[-1:]).mean()",
    ),
    fault(
        "LOSS-2",
        "keys and values are frozen",
        "self.key_value.weight.detach()",
        "self.key_value.weight.detach_()",
    ),
    fault(
        "LOSS-2",
        "back-propagation through time unasked",
        "if not config.bptt:\n            x, mem",
        "if False:\n            x, mem",
        RETURN,
        "return mem, c_mem, loss",
    ),
    fault(
        "LOSS-2", "back-propagation through time never", RETURN, "return mem, c_mem.detach(), loss"
    ),
    fault(
        "LOSS-2",
        "no gradient through the values",
        "self.dropout, self.training), v_h))",
        "self.dropout, self.training), v_h.detach()))",
        "@ w_v.mT",
        "@ w_v.detach().mT",
    ),
    fault(
        "LOSS-3",
        "dropout in the loss",
        "return torch.bmm(scores.softmax(dim=-1, dtype=scores.dtype), kv[1])",
        "return torch.bmm(F.dropout(scores.softmax(dim=-1), 0.5), kv[1])",
    ),
    fault(
        "LOSS-3",
        "compared with what stays",
        LOSS,
        LOSS.replace(" kv,", " self.attention.project(torch.cat([old, mem], dim=1)),"),
    ),
    fault(
        "LOSS-4",
        "compared with what stays, where something does",
        LOSS,
        LOSS.replace(" kv,", " self.attention.project(mem if mem.size(1) else old),"),
    ),
    fault(
        "LOSS-5",
        "no scale",
        "scores = torch.bmm(q, kv[0].mT)",
        "scores = torch.bmm(q * q.size(-1) ** 0.5, kv[0].mT)",
    ),
    fault("LOSS-5", "a sum over layers", "torch.stack(losses).mean()", "torch.stack(losses).sum()"),
    fault(
        "LOSS-5",
        "the rows mixed up",
        "target = attention.content(q, kv)",
        "target = attention.content(q, kv.flip(1))",
    ),
    fault(
        "LOSS-5",
        "the mean distance",
        "return F.mse_loss(attention.content",
        "return F.l1_loss(attention.content",
    ),
    fault(
        "LOSS-5",
        "read back in the wrong order",
        "self.conv(compressed).unflatten(-1, (-1, self.d_model)).flatten(1, 2)",
        "self.conv(compressed).unflatten(-1, (-1, self.d_model)).flip(2).flatten(1, 2)",
    ),
    fault(
        "LOSS-6",
        "half the gradient",
        "attention.project(compressed)), target",
        "attention.project((compressed + compressed.detach()) / 2)), target",
    ),
    # ------------------------------------------------------------------------------- the model
    fault(
        "MOD-1",
        "whole blocks leave although nothing is compressed",
        COUNT,
        "n = -(-overflow // compression_rate)",
        "compressed = old\n    if n > 0:",
        "compressed = old[:, :0]\n    if n > 0 and c_mem_len > 0:",
    ),
    fault(
        "MOD-1",
        "one slot is kept by a memory of length zero",
        OVERFLOW,
        "mem_len = max(mem_len, 1)\n    " + OVERFLOW,
    ),
    fault(
        "MOD-2",
        "a dropout of its own",
        "F.dropout(weights, self.dropout, self.training)",
        "F.dropout(weights, 0.1, self.training)",
    ),
    fault(
        "MOD-2",
        "no loss in evaluation mode",
        'if need_loss and self.compression_loss != "none":',
        'if need_loss and self.compression_loss != "none" and self.training:',
    ),
    fault(
        "MOD-3",
        "the model keeps state",
        EMBED,
        f"self.turn = getattr(self, 'turn', 0) + 1\n        {EMBED} * (1 + (self.turn > 3))",
    ),
    fault(
        "MOD-4",
        "the first length is kept",
        "S = tokens.size(1) + memory",
        "self.length = getattr(self, 'length', tokens.size(1))\n        S = self.length + memory",
    ),
    fault(
        "MOD-5",
        "nothing is checked",
        "self._check(tokens, memory)\n        memory = self.initial",
        "memory = self.initial",
    ),
    fault(
        "MOD-5", "tokens are not looked at", 'if tokens.device.type == "cpu" and', "if False and"
    ),
]
