"""Right implementations of another design: `compressive.py`, changed as a whole, with what it then
has to declare."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters import reference
from .faults import COUNT, LEAVING, LOSS, OLD, PAST, REMEMBER

SOURCE = Path(reference.compressive.__file__).read_text()
FOR_SPEED = SOURCE[SOURCE.index("class FasterAttention(") : SOURCE.index("class Compression(")]
ASKS = "if config.c_mem_len > 0:"

# name -> what the adapter declares, what it has not, and what stands instead of what
VARIANTS = {
    "post-norm alone": ({"norms": ("post",)}, (), ()),
    "memories of zeros, full from the start": (
        {"start": "zeros"},
        (),
        (
            (
                "empty = self.embedding.weight.new_zeros(batch_size, 0, self.config.d_model)\n"
                "        layers = (empty,) * self.config.n_layers\n"
                "        return Memory(mem=layers, c_mem=layers)",
                "config = self.config\n"
                "        zeros = self.embedding.weight.new_zeros\n"
                "        mem = zeros(batch_size, config.mem_len, config.d_model)\n"
                "        c_mem = zeros(batch_size, config.c_mem_len, config.d_model)\n"
                "        return Memory((mem,) * config.n_layers, (c_mem,) * config.n_layers)",
            ),
        ),
    ),
    "memories stored raw and normalised when they are read": (
        {"storage": "raw", "norms": ("pre",)},
        (),
        (
            ("# What attention reads is what memory keeps.", "raw = h"),
            (
                PAST,
                PAST.replace("c_mem, mem", "self.attention_norm(c_mem), self.attention_norm(mem)"),
            ),
            (REMEMBER, REMEMBER.replace(" x,", " raw,")),
            (
                LOSS,
                "weight = self.attention_norm.weight.detach()\n"
                "        bias = self.attention_norm.bias.detach()\n"
                "        old = F.layer_norm(old, weight.shape, weight, bias)\n"
                "        compressed = F.layer_norm(compressed, weight.shape, weight, bias)\n"
                "        " + LOSS,
            ),
        ),
    ),
    "sines and cosines in turn, another epsilon, tied embedding, layers share all but f_c": (
        {"sinusoid": "alternating", "norm_eps": 1e-6},
        (),
        (
            (
                "return torch.cat([angle.sin(), angle.cos()], dim=-1)",
                "return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)",
            ),
            ("nn.LayerNorm(D)", "nn.LayerNorm(D, eps=1e-6)"),
            ("nn.LayerNorm(config.d_model)", "nn.LayerNorm(config.d_model, eps=1e-6)"),
            (
                "self.logits = nn.Linear(config.d_model, config.vocab_size)",
                "self.logits = nn.Linear(config.d_model, config.vocab_size)\n"
                "        self.logits.weight = self.embedding.weight\n"
                "        for layer in self.layers:\n"
                "            layer.attention = self.layers[0].attention\n"
                "            layer.attention_norm = self.layers[0].attention_norm\n"
                "            layer.feed_forward = self.layers[0].feed_forward\n"
                "            layer.feed_forward_norm = self.layers[0].feed_forward_norm",
            ),
        ),
    ),
    "keys of its own for compressed memory": (
        {"positions": "separate", "bptt": False},
        ("weights",),
        (
            (
                "self.output = nn.Linear(D, D, bias=False)",
                "self.output = nn.Linear(D, D, bias=False)\n"
                "        self.other = nn.Linear(D, 2 * D, bias=False)",
            ),
            (PAST, "self.attention.compressed = c_mem.size(1)\n        " + PAST),
            (
                "kv_past = self.heads(self.key_value(past))",
                "c_mem, mem = past.split([self.compressed, past.size(1) - self.compressed], dim=1)\n"
                "        kv_past = torch.cat([self.other(c_mem), self.key_value(mem)], dim=1)\n"
                "        kv_past = self.heads(kv_past)",
            ),
            ("if few and is_plain_linear(self.key_value)", "if False"),
        ),
    ),
    "what c does not divide is filled up with zeros": (
        {"overflow": "pad"},
        ("weights",),
        (
            (ASKS, "if False:"),
            (LEAVING, "leaving = overflow"),
            (
                OLD,
                "old = held[:, :0]\n"
                "    if n > 0:\n"
                "        missing = n * c - overflow\n"
                "        old = F.pad(held[:, :overflow], (0, 0, missing, 0))",
            ),
            (
                "compress = partial(compress, usage=usage)",
                "overflow = max(0, usage.size(1) - self.config.mem_len)\n"
                "            missing = -overflow % self.config.compression_rate\n"
                "            compress = partial(compress, usage=F.pad(usage, (missing, 0)))",
            ),
        ),
    ),
    "what c does not divide is dropped": (
        {"overflow": "drop"},
        ("weights",),
        (
            (ASKS, "if False:"),
            (COUNT, "n = overflow // c"),
            (LEAVING, "leaving = overflow"),
        ),
    ),
    "time first, a sum over layers, no loss in evaluation mode": (
        {"layout": "time_first", "loss_over_layers": "sum", "loss_in_eval": False},
        (),
        (
            ("losses.mean()", "losses.sum()"),
            (
                "if need_loss and",
                "if need_loss and self.training and",
            ),
        ),
    ),
    "the plain attention alone, without what is there for speed": (
        {},
        (),
        (
            (FOR_SPEED, ""),
            ("self.attention = FasterAttention(", "self.attention = RelativeMultiHeadAttention("),
        ),
    ),
}


def swap(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


class TimeFirst(reference.Adapter):
    """The reference with time before rows in all that it takes and gives."""

    def step(self, model: Any, tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        logits, state, loss = super().step(model, swap(tokens), state)
        return swap(logits), state, loss

    def read(self, state: Any) -> list:
        return [tuple(map(swap, layer)) for layer in super().read(state)]

    def replace(self, state: Any, slots: Any) -> Any:
        return super().replace(state, [tuple(map(swap, layer)) for layer in slots])

    def compress(self, model: Any, layer: int, old: Tensor, usage: Tensor) -> Tensor:
        return swap(super().compress(model, layer, swap(old), swap(usage)))
