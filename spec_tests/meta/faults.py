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
PAST = "past = torch.cat([c_mem, mem], dim=1)"  # what attention reads
REMEMBER = "update_memory(mem, c_mem, x, compress, self.config)"
OLD = "old = held[:, : n * c]"
LEAVING = "leaving = n * c"
STAYS = "held[:, leaving:]"
JOIN = "c_mem = torch.cat([c_mem, compressed.to(c_mem.dtype)], dim=1)"
CUT = "c_mem[:, max(0, c_mem.size(1) - config.c_mem_len) :]"
COUNT = "n = -(-overflow // c)"
OVERFLOW = "overflow = max(0, held.size(1) - config.mem_len)"
AFTER_EMBEDDING = "        S = c_mem[0].size(1)"
DETACH = "held = held.detach()"
DETACH_NEW = "next_c_mem = next_c_mem.detach()"
RETURN = "return LayerOutput(h, update.mem, "
MEMS = "mem = tuple(output.mem for output in outputs)"
TURN = "for layer, m, cm in zip(self.layers, mem, c_mem, strict=True):"
NO_LOSS = "loss = x.new_zeros(())"
LOSS = "return attention_reconstruction_loss(self.attention, x, old, compressed)"
QUERIES = "q = attention.heads(attention.query(h)).detach()"
TARGET = "target = attend(q, attention.key_value(old)).detach()"
CALLED = "F.linear(compressed, key_value.weight.detach())"
MEAN = "Memory(next_mem, next_c_mem), losses.mean()"
LAYERS = "self.norm = nn.LayerNorm(config.d_model) if config.norm_first else nn.Identity()"

FAULTS = [
    # ------------------------------------------------------------------------------- attention
    fault("ATT-1", "no causal mask", MASK, "pass"),
    fault(
        "ATT-1", "the mask is a column late", "bool, device=scores.device).triu(1)", "bool).triu(2)"
    ),
    fault("ATT-1", "the mask is too weak", MASK, MASK.replace("-math.inf", "-9.0")),
    fault("ATT-1", "no mask in segments of two", MASK, f"T != 2 and {MASK}"),
    fault("ATT-1", "no mask before there is a memory", MASK, f"S > T and {MASK}"),
    fault(
        "ATT-2", "the oldest slot is masked", MASK, f"{MASK}; scores[..., : S - T][..., :1] = -99.0"
    ),
    fault(
        "ATT-2",
        "a query does not see itself",
        "device=scores.device).triu(1)",
        "device=scores.device).triu(0)",
    ),
    fault(
        "ATT-2",
        "memory is cut off where it is full",
        PAST,
        "full = (c_mem.size(1) == self.config.c_mem_len) / 1.0\n        "
        + PAST.replace("c_mem,", "c_mem * (1 - full),"),
    ),
    fault(
        "ATT-3",
        "few queries do not read what is remembered",
        "weights, slots)",
        "weights[..., -T:], x)",
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
        "torch.arange(S - 1, -1, -1, dtype",
        "torch.arange(S, 0, -1, dtype",
    ),
    fault(
        "ATT-3",
        "distances are counted from full memories",
        "distance = torch.arange(S - 1, -1, -1,",
        "N = self.config.mem_len + self.config.c_mem_len + tokens.size(1)\n        "
        "distance = torch.arange(N - 1, N - 1 - S, -1,",
    ),
    fault(
        "ATT-3", "cosines before sines", "[angle.sin(), angle.cos()]", "[angle.cos(), angle.sin()]"
    ),
    fault(
        "ATT-3",
        "no content bias",
        "(q + content_bias[:, None, None])",
        "(q + 0 * content_bias[:, None, None])",
        "(q + self.content_bias[:, None, None])",
        "(q + 0 * self.content_bias[:, None, None])",
    ),
    fault(
        "ATT-3",
        "no position bias for few queries",
        "(q + self.position_bias[:, None, None])",
        "(q + 0 * self.position_bias[:, None, None])",
    ),
    fault(
        "ATT-3",
        "no position bias but for few queries",
        "(q + position_bias[:, None, None])",
        "(q + 0 * position_bias[:, None, None])",
    ),
    fault(
        "ATT-3",
        "a bias is not scaled",
        "scale * (q + content_bias[:, None, None])",
        "scale * q + content_bias[:, None, None]",
        "scale * (q + self.content_bias[:, None, None])",
        "scale * q + self.content_bias[:, None, None]",
    ),
    fault(
        "ATT-3",
        "scaled by the whole width",
        "scale = q.size(-1) ** -0.5",
        "scale = (q.size(0) * q.size(-1)) ** -0.5",
        "scale = K**-0.5",
        "scale = x.size(2) ** -0.5",
    ),
    fault(
        "ATT-4",
        "positions grow with the stream",
        AFTER_EMBEDDING,
        "        self.fed = getattr(self, 'fed', 0) + tokens.size(1)\n"
        "        h = h + 0.01 * self.fed\n" + AFTER_EMBEDDING,
    ),
    fault(
        "ATT-5",
        "memory is normalised again when it is read",
        PAST,
        PAST.replace("c_mem, mem", "self.attention_norm(c_mem), self.attention_norm(mem)"),
    ),
    fault(
        "ATT-5",
        "memory keeps what is not normalised",
        REMEMBER,
        REMEMBER.replace(" x,", " raw,"),
        "# What attention reads is what memory keeps.",
        "raw = h",
    ),
    fault(
        "ATT-6",
        "a mean over the rows",
        AFTER_EMBEDDING,
        "        h = h + 0.01 * h.mean(dim=0)\n" + AFTER_EMBEDDING,
    ),
    fault(
        "ATT-6",
        "rows and heads mixed up",
        "read.movedim(0, 2).flatten(2)",
        "read.movedim(0, 2).reshape(read.size(2), read.size(1), -1).transpose(0, 1)",
    ),
    # ---------------------------------------------------------------------------------- memory
    fault(
        "MEM-1",
        "the newest leave",
        OLD,
        "stay = held.size(1) - leaving\n    old = held[:, stay : stay + n * c]",
        STAYS,
        "held[:, :stay]",
    ),
    fault(
        "MEM-1",
        "newest first",
        "h.to(mem.dtype)]",
        "h.to(mem.dtype).flip(1)]",
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
        PAST,
        PAST.replace("c_mem, mem", "mem, c_mem"),
    ),
    fault(
        "MEM-2",
        "x[-0:]",
        STAYS,
        "held[:, leaving - held.size(1) :]",
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
    fault("MEM-2", "nothing ever leaves memory", OVERFLOW, "overflow = 0"),
    fault(
        "MEM-2",
        "a rest stays",
        COUNT,
        "n = overflow // c",
    ),
    fault(
        "MEM-3",
        "a rest is lost",
        COUNT,
        "n = overflow // c",
        LEAVING,
        "leaving = overflow",
    ),
    fault(
        "MEM-3",
        "a rest is kept twice",
        LEAVING,
        "leaving = overflow",
    ),
    fault(
        "MEM-3",
        "the newest compressed slots are forgotten",
        CUT,
        "c_mem[:, : config.c_mem_len]",
    ),
    fault(
        "MEM-3",
        "the oldest slot is kept twice, where c does not divide",
        STAYS,
        "torch.cat([old[:, : min(1, leaving - overflow)], held[:, leaving:]], dim=1)",
    ),
    fault(
        "MEM-4",
        "memory one slot too short",
        OVERFLOW,
        OVERFLOW.replace("config.mem_len", "max(0, config.mem_len - 1)"),
    ),
    fault("MEM-4", "nothing is remembered", RETURN, RETURN.replace("update.mem", "mem[:, :0]")),
    fault(
        "MEM-4",
        "compressed where memory is just full",
        OVERFLOW,
        OVERFLOW + " + (held.size(1) == config.mem_len > 0)",
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
        "n = (overflow + c) // c * (overflow > 0)",
    ),
    fault(
        "MEM-4",
        "a loss where nothing was compressed",
        NO_LOSS,
        f"{NO_LOSS} + (update.old.size(1) == 0)",
    ),
    fault(
        "MEM-4",
        "a loss where there is none",
        NO_LOSS,
        f'{NO_LOSS} + (self.loss_kind == "none")',
    ),
    fault(
        "MEM-5",
        "the block is one slot late",
        OLD,
        OLD.replace("held", "held.roll(-1, dims=1)"),
    ),
    fault(
        "MEM-5",
        "the layers' f_c are mixed up",
        LAYERS,
        f"{LAYERS}\n        for i, layer in enumerate(self.layers):\n            layer.__dict__['other'] = self.layers[i - 1].compress",
        "compress = self.compress\n",
        "compress = self.__dict__['other']\n",
    ),
    fault(
        "MEM-5",
        "usage of the compressed slots",
        "weights[..., -slots:].mean",
        "weights[..., :slots].mean",
    ),
    fault(
        "MEM-5",
        "usage is not shared out",
        "return received / seen_by",
        "return received",
    ),
    fault(
        "MEM-6",
        "new slots are read at once, where memory is full",
        PAST,
        "compress = self.compress\n        if need_usage:\n            like = x.new_ones(x.size(0), 1, x.size(1), positions.size(0))\n            compress = partial(compress, usage=compress.usage(like, mem.size(1) + x.size(1)))\n        early = update_memory(mem, c_mem, x, compress, self.config).c_mem\n        "
        + PAST.replace("c_mem,", "early if early.shape == c_mem.shape else c_mem,"),
    ),
    fault("MEM-7", "outputs are stored", REMEMBER, REMEMBER.replace(" x,", " h,")),
    fault(
        "MEM-7",
        "all layers read the first one's memory",
        TURN,
        TURN.replace(" mem,", " mem[:1] * len(mem),"),
    ),
    fault("MEM-7", "memories rotate", TURN, TURN.replace(" mem,", " mem[1:] + mem[:1],")),
    fault("MEM-7", "layers in the wrong order", MEMS, MEMS.replace("outputs)", "outputs[::-1])")),
    fault(
        "MEM-7",
        "all layers store the first one's input",
        MEMS,
        MEMS.replace("output.mem", "outputs[0].mem"),
    ),
    fault(
        "MEM-8",
        "memory is changed in place",
        RETURN,
        "mem.data.mul_(0.5)\n        " + RETURN,
    ),
    fault("MEM-8", "no detach of memory", DETACH, "pass"),
    fault("MEM-8", "no detach of compressed memory", DETACH_NEW, "pass"),
    fault(
        "MEM-8", "memory in float64", RETURN, RETURN.replace("update.mem", "update.mem.double()")
    ),
    fault(
        "MEM-9",
        "a layer reads the memory above it",
        TURN,
        TURN.replace(" mem,", " mem[1:] + mem[:1],"),
    ),
    fault(
        "MEM-9",
        "a full memory loses its oldest slot",
        PAST,
        PAST.replace("mem]", "mem[:, :1] * (mem.size(1) < self.config.mem_len), mem[:, 1:]]"),
    ),
    fault(
        "MEM-9",
        "memory is not read in segments of one",
        PAST,
        PAST.replace("c_mem, mem", "c_mem * (x.size(1) > 1), mem * (x.size(1) > 1)"),
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
        "most_used_first[:, :n].sort(dim=1).values",
        "most_used_first[:, :n]",
    ),
    fault("CMP-4", "another dilation", "DILATIONS = (1, 2, 4)", "DILATIONS = (1, 2, 3)"),
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
        QUERIES,
        QUERIES.replace(".detach()", ""),
    ),
    fault(
        "LOSS-1",
        "the loss trains keys and values",
        CALLED,
        CALLED.replace(".detach()", ""),
    ),
    fault(
        "LOSS-1",
        "the memories are not held constant",
        TARGET,
        TARGET.replace(".detach()", ""),
    ),
    fault("LOSS-1", "the block is not held constant", "old = old.detach()", "pass"),
    fault(
        "LOSS-1",
        "the compressed slots are held constant",
        CALLED,
        CALLED.replace("compressed", "compressed.detach()"),
    ),
    fault(
        "LOSS-1",
        "one layer's loss alone",
        MEAN,
        MEAN.replace("losses", "losses[-1:]"),
    ),
    fault(
        "LOSS-2",
        "keys and values are frozen",
        CALLED,
        CALLED.replace("detach", "detach_"),
    ),
    fault(
        "LOSS-2",
        "back-propagation through time unasked",
        "if not config.bptt:",
        "if False:",
    ),
    fault(
        "LOSS-2",
        "back-propagation through time never",
        "if not config.bptt:  # no gradient comes",
        "if True:  # no gradient comes",
    ),
    fault(
        "LOSS-2",
        "a parameter is not used",
        LAYERS,
        f"{LAYERS}\n        self.unused = nn.Parameter(torch.zeros(3))",
    ),
    fault(
        "LOSS-2",
        "no gradient through the values",
        "return dropout(weights) @ v, weights",
        "return dropout(weights) @ v.detach(), weights",
        "slots_read, w_v)",
        "slots_read, w_v.detach())",
    ),
    fault(
        "LOSS-3",
        "dropout in the loss",
        "return scores.softmax(dim=-1, dtype=scores.dtype) @ v",
        "return F.dropout(scores.softmax(dim=-1), 0.5) @ v",
    ),
    fault(
        "LOSS-3",
        "compared with what stays",
        LOSS,
        LOSS.replace(" old,", " torch.cat([old, update.mem], dim=1),"),
    ),
    fault(
        "LOSS-4",
        "compared with what stays, where something does",
        LOSS,
        LOSS.replace(" old,", " update.mem if update.mem.size(1) else old,"),
    ),
    fault(
        "LOSS-5",
        "no scale",
        "scores = (q.size(-1) ** -0.5 * q) @ k.mT",
        "scores = q @ k.mT",
    ),
    fault("LOSS-5", "a sum over layers", MEAN, MEAN.replace("mean", "sum")),
    fault(
        "LOSS-5",
        "the rows mixed up",
        TARGET,
        TARGET.replace("(old)", "(old.flip(0))"),
    ),
    fault(
        "LOSS-5",
        "the mean distance",
        "return F.mse_loss(attend(",
        "return F.l1_loss(attend(",
    ),
    fault(
        "LOSS-5",
        "read back in the wrong order",
        "decompress(compressed).reshape(old.shape)",
        "decompress(compressed).unflatten(-1, (-1, old.size(2))).flip(2).reshape(old.shape)",
    ),
    fault(
        "LOSS-6",
        "half the gradient",
        CALLED,
        CALLED.replace("compressed", "(compressed + compressed.detach()) / 2"),
    ),
    # ------------------------------------------------------------------------------- the model
    fault(
        "MOD-1",
        "whole blocks leave although nothing is compressed",
        "leaving = overflow",
        "leaving = -(-overflow // c) * c",
    ),
    fault(
        "MOD-1",
        "one slot is kept by a memory of length zero",
        OVERFLOW,
        OVERFLOW.replace("config.mem_len", "max(config.mem_len, 1)"),
    ),
    fault(
        "MOD-2",
        "a dropout of its own",
        "self.dropout = nn.Dropout(dropout)  # of the weights",
        "self.dropout = nn.Dropout(max(dropout, 0.1))",
    ),
    fault(
        "MOD-2",
        "other logits without gradients",
        "logits = self.logits(self.norm(h))",
        "logits = self.logits(self.norm(h)) * (1 + torch.is_grad_enabled())",
    ),
    fault(
        "MOD-2",
        "no loss in evaluation mode",
        "if need_loss and",
        "if need_loss and self.training and",
    ),
    fault(
        "MOD-3",
        "the model keeps state",
        AFTER_EMBEDDING,
        "        self.turn = getattr(self, 'turn', 0) + 1\n"
        "        h = h * (1 + (self.turn > 3))\n" + AFTER_EMBEDDING,
    ),
    fault(
        "MOD-4",
        "a segment of one token never enters memory",
        REMEMBER,
        REMEMBER.replace(" x,", " x[:, : x.size(1) * (x.size(1) > 1)],"),
    ),
    fault(
        "MOD-4",
        "the first length is kept",
        "mem[0].size(1) + tokens.size(1)\n",
        "mem[0].size(1) + self.length\n",
        AFTER_EMBEDDING,
        "        self.length = getattr(self, 'length', tokens.size(1))\n" + AFTER_EMBEDDING,
    ),
    fault(
        "MOD-5",
        "nothing is checked",
        "check_input(self, tokens, memory)\n        if memory is None",
        "if memory is None",
    ),
    fault(
        "MOD-5", "tokens out of range are torch's business", "except IndexError", "except KeyError"
    ),
]
