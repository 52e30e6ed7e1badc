"""Right implementations of another design: `compressive.py`, changed as a whole, with what it then
has to declare."""

from typing import Any

from torch import Tensor

from ..adapters import reference

READ = "read = self.attention(x, c_mem, mem, positions, need_weights=by_use)"
UPDATE = "overflow = max(0, held.size(1) - mem_len)"
OLD = "    old, mem = held[:, : n * compression_rate], held[:, max(n * compression_rate, overflow) :]\n"
ASKS = "if self.c_mem_len > 0:"
LOSS = "loss = attention_reconstruction_loss(self.attention, read.q, kv, compressed)"

# name -> what the adapter declares, what it has not, and what stands instead of what
VARIANTS = {
    "post-norm alone": ({"norms": ("post",)}, (), ()),
    "memories of zeros, full from the start": (
        {"start": "zeros"},
        (),
        (
            (
                "empty = self.embedding.weight.new_zeros(batch_size, 0, self.config.d_model)\n"
                "        return Memory(*((empty,) * self.config.n_layers for _ in range(2)))",
                "lengths = self.config.mem_len, self.config.c_mem_len\n"
                "        zeros = self.embedding.weight.new_zeros\n"
                "        empty = [zeros(batch_size, n, self.config.d_model) for n in lengths]\n"
                "        return Memory(*((x,) * self.config.n_layers for x in empty))",
            ),
        ),
    ),
    "memories stored raw and normalised when they are read": (
        {"storage": "raw", "norms": ("pre",)},
        (),
        (
            (
                "x = self.attention_norm(h) if pre_norm",
                "raw, x = h, self.attention_norm(h) if pre_norm",
            ),
            (
                READ,
                READ.replace("c_mem, mem", "self.attention_norm(c_mem), self.attention_norm(mem)"),
            ),
            ("*self.remember(x, mem", "*self.remember(raw, mem"),
            (
                LOSS,
                "norm = self.attention_norm\n                "
                "w, b = norm.weight.detach(), norm.bias.detach()\n                "
                "old, compressed = (F.layer_norm(y, w.shape, w, b) for y in (old, compressed))\n"
                "                if read.kv is None:\n"
                "                    kv = self.attention.project(old)\n                " + LOSS,
            ),
        ),
    ),
    "keys of its own for compressed memory": (
        {"positions": "separate", "bptt": False},
        ("weights",),
        (
            (
                "self.output = Linear(d_model, d_model, bias=False)",
                "self.output = Linear(d_model, d_model, bias=False)\n"
                "        self.other = nn.Linear(d_model, 2 * d_model, bias=False)",
            ),
            (
                "[self.key_value(part) for part in slots]",
                "[self.other(slots[0]), *map(self.key_value, slots[1:])]",
            ),
            ("self.attend_to_slots if T < K else self.attend_to_keys", "self.attend_to_keys"),
        ),
    ),
    "what c does not divide is filled up with zeros": (
        {"overflow": "pad"},
        ("weights",),
        (
            (ASKS, "if False:"),
            (
                OLD,
                "    old, mem = held[:, :overflow], held[:, overflow:]\n"
                "    old = F.pad(old, (0, 0, n * compression_rate - overflow, 0)) if n > 0 else old[:, :0]\n",
            ),
            (LOSS, f"kv = self.attention.project(old)\n                {LOSS}"),
            (
                "compress = partial(compress, usage=usage)",
                "over = -max(0, usage.size(1) - config.mem_len) % config.compression_rate\n"
                "            compress = partial(compress, usage=F.pad(usage, (over, 0)))",
            ),
        ),
    ),
    "what c does not divide is dropped": (
        {"overflow": "drop"},
        ("weights",),
        (
            (ASKS, "if False:"),
            ("n = -(-overflow // compression_rate) if", "n = overflow // compression_rate if"),
        ),
    ),
    "time first, a sum over layers, no loss in evaluation mode": (
        {"layout": "time_first", "loss_over_layers": "sum", "loss_in_eval": False},
        (),
        (
            ("torch.stack(losses).mean()", "torch.stack(losses).sum()"),
            ('!= "none":', '!= "none" and self.training:'),
        ),
    ),
}


def swap(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


class TimeFirst(reference.Adapter):
    """The reference with time before rows in all that it takes and gives."""

    def step(self, model: Any, tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        logits, state, loss = model(swap(tokens), state)
        return swap(logits), state, loss

    def read(self, state: Any) -> list:
        return [tuple(map(swap, layer)) for layer in super().read(state)]

    def replace(self, state: Any, slots: Any) -> Any:
        return super().replace(state, [tuple(map(swap, layer)) for layer in slots])

    def compress(self, model: Any, layer: int, old: Tensor, usage: Tensor) -> Tensor:
        return swap(super().compress(model, layer, swap(old), swap(usage)))
