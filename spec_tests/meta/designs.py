"""A Compressive Transformer that can be built in every way that an adapter can declare: right in all
of them, each with what it declares and nothing more.

python -m spec_tests.meta.designs                                 every design
python -m spec_tests.meta.designs --designs 3-5 --examples 60     some of them, looked at harder
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..implementation import Implementation, check_usable
from ..replay import checks
from ..support import prepare, supported

# What can be declared, and what for: of each pair of these some design has both.
CHOICES = {
    "start": ("empty", "zeros"),
    "storage": ("normalised", "raw"),
    "positions": ("slots", "separate"),
    "overflow": ("round_up", "pad", "drop", "keep", "divisible"),
    "norms": (("pre",), ("post",)),
    "loss_reduction": ("mean_square", "sum_of_squares", "norm"),
    "loss_over_layers": ("mean", "sum"),
    "layout": ("batch_first", "time_first"),
    "loss_in_eval": (True, False),
    "segments": ("any", "rate", "full"),
    "mem_len": ("any", "one", "rate", "segment"),
    "c_mem_len": ("any", "one", "block"),
    "compressions": (("conv",), ("mean_pool",), ("max_pool", "most_used"), ("other",)),
    "compression_losses": (("attention",), ("none", "attention")),
    "dtype": ("float64", "float32"),
}


def pairs(design: dict) -> set[tuple]:
    return set(itertools.combinations(design.items(), 2))


def designs() -> Iterator[dict]:
    """Choices of each field, so that of each two fields each two choices come together: one design
    after the other, made of the choices that add most pairs to those before."""
    missing = set()
    for one, other in itertools.combinations(CHOICES, 2):
        for choices in itertools.product(CHOICES[one], CHOICES[other]):
            missing.add(tuple(zip((one, other), choices, strict=True)))
    while missing:
        first = min(missing, key=repr)
        design: dict = dict(first)
        for name in CHOICES:
            if name not in design:
                design[name] = max(
                    CHOICES[name],
                    key=lambda choice: added(design, name, choice, missing),  # noqa: B023
                )
        design = {name: design[name] for name in CHOICES}
        missing -= pairs(design)
        yield design


def added(design: dict, name: str, choice: Any, missing: set[tuple]) -> int:
    """How many missing pairs a design gets with one more choice."""
    count = 0
    for other in design.items():
        for pair in ((other, (name, choice)), ((name, choice), other)):
            count += pair in missing
    return count


class State(NamedTuple):
    mem: list[Tensor]  # of each layer, [B, slots, D], oldest first
    c_mem: list[Tensor]


def heads_of(x: Tensor, count: int) -> Tensor:
    """[B, N, D] -> [B, H, N, K]"""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def encoding(distance: Tensor, width: int) -> Tensor:
    i = torch.arange(0, width, 2, dtype=distance.dtype)
    angle = distance[..., None] * 10000 ** (-i / width)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Layer(nn.Module):
    def __init__(self, s: Any, design: dict) -> None:
        super().__init__()
        D = s.d_model
        self.s = s
        self.design = design
        self.norm1 = nn.LayerNorm(D)
        self.norm2 = nn.LayerNorm(D)
        self.query = nn.Linear(D, D, bias=False)
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D, bias=False)
        self.output = nn.Linear(D, D, bias=False)
        self.relative_key = nn.Linear(D, D, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(D))
        self.position_bias = nn.Parameter(torch.zeros(D))
        if design["positions"] == "separate":
            self.relative_key_of_c_mem = nn.Linear(D, D, bias=False)
        self.ff1 = nn.Linear(D, s.d_ff)
        self.ff2 = nn.Linear(s.d_ff, D)
        if s.compression in ("conv", "other"):
            self.conv = nn.Conv1d(D, D, s.compression_rate, stride=s.compression_rate)
        if s.compression == "other":
            self.gate = nn.Linear(D, D)

    def as_read(self, slots: Tensor) -> Tensor:
        if self.design["storage"] == "raw" and self.s.norm_first:
            return self.norm1(slots)
        return slots

    def attend(self, x: Tensor, mem: Tensor, c_mem: Tensor) -> tuple[Tensor, Tensor]:
        H = self.s.n_heads
        T = x.size(1)
        S = c_mem.size(1) + mem.size(1) + T
        slots = torch.cat([self.as_read(c_mem), self.as_read(mem), x], dim=1)
        q = self.query(x)
        to_content = heads_of(q + self.content_bias, H)
        to_position = heads_of(q + self.position_bias, H)
        k = heads_of(self.key(slots), H)
        v = heads_of(self.value(slots), H)
        place = torch.arange(S).to(x)
        here = place[S - T :]
        distance = here[:, None] - place
        relative = self.relative_key(encoding(distance, x.size(-1)))  # [T, S, D]
        C = c_mem.size(1)
        if self.design["positions"] == "separate":  # as if they touched the segment
            touching = distance[:, :C] - mem.size(1)
            of_c_mem = self.relative_key_of_c_mem(encoding(touching, x.size(-1)))
            relative = torch.cat([of_c_mem, relative[:, C:]], dim=1)
        r = relative.unflatten(-1, (H, -1))  # [T, S, H, K]
        scores = to_content @ k.mT + torch.einsum("bhtk,tshk->bhts", to_position, r)
        scores = scores / k.size(-1) ** 0.5
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(dim=-1)
        return self.output((weights @ v).transpose(1, 2).flatten(2)), weights

    def compress(self, old: Tensor, usage: Tensor) -> Tensor:
        c = self.s.compression_rate
        blocks = old.unflatten(1, (-1, c))
        if self.s.compression == "mean_pool":
            return blocks.mean(dim=2)
        if self.s.compression == "max_pool":
            return blocks.amax(dim=2)
        if self.s.compression == "most_used":
            n = blocks.size(1)
            ranked = usage[:, : old.size(1)].argsort(dim=1, descending=True, stable=True)
            kept = ranked[:, :n].sort(dim=1).values
            return old.take_along_dim(kept[..., None], dim=1)
        new = self.conv(old.mT).mT
        if self.s.compression == "other":
            new = new * self.gate(blocks[:, :, 0]).sigmoid()
        return new

    def evict(self, held: Tensor, usage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is compressed, its usage, and what stays."""
        c = self.s.compression_rate
        rule = self.design["overflow"]
        overflow = max(0, held.size(1) - self.s.mem_len)
        rest = overflow % c
        if self.s.c_mem_len == 0:
            return held[:, :0], usage[:, :0], held[:, overflow:]
        leave = overflow
        if rest > 0 and rule == "divisible":
            raise ValueError(f"{overflow} memories leave, which {c} does not divide")
        if rest > 0 and rule == "round_up":
            leave = overflow - rest + c
        if rule == "keep":
            leave = overflow - rest
        old = held[:, :leave]
        of_old = usage[:, :leave]
        if rest > 0 and rule == "pad":
            old = F.pad(old, (0, 0, c - rest, 0))
            of_old = F.pad(of_old, (c - rest, 0))
        if rest > 0 and rule == "drop":
            old = old[:, : leave - rest]
        return old, of_old, held[:, leave:]

    def loss(self, stored: Tensor, old: Tensor, new: Tensor) -> Tensor:
        fixed = {name: p.detach() for name, p in self.named_parameters()}

        def read(slots: Tensor) -> Tensor:
            if self.design["storage"] == "normalised" or not self.s.norm_first:
                return slots
            weight = fixed["norm1.weight"]
            return F.layer_norm(slots, weight.shape, weight, fixed["norm1.bias"])

        def attend(slots: Tensor) -> Tensor:
            H = self.s.n_heads
            q = heads_of(read(stored) @ fixed["query.weight"].T, H)
            k = heads_of(slots @ fixed["key.weight"].T, H)
            v = heads_of(slots @ fixed["value.weight"].T, H)
            return (q @ k.mT / k.size(-1) ** 0.5).softmax(dim=-1) @ v

        difference = attend(read(old)) - attend(read(new))
        if self.design["loss_reduction"] == "mean_square":
            return difference.square().mean()
        if self.design["loss_reduction"] == "norm":
            return difference.norm()
        return difference.square().sum()

    def forward(
        self, h: Tensor, mem: Tensor, c_mem: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.norm1(h) if self.s.norm_first else h
        attended, weights = self.attend(x, mem, c_mem)
        if self.s.norm_first:
            between = h + attended
            output = between + self.ff2(self.ff1(self.norm2(between)).relu())
        else:
            between = self.norm1(h + attended)
            output = self.norm2(between + self.ff2(self.ff1(between).relu()))
        stored = h if self.design["storage"] == "raw" else x
        stored = stored.detach()
        held = torch.cat([mem.detach(), stored], dim=1)
        T = x.size(1)
        received = weights[..., c_mem.size(1) :].detach().mean(dim=1).sum(dim=1)
        seen_by = torch.arange(held.size(1), 0, -1).clamp(max=T)
        old, usage, stays = self.evict(held, received / seen_by)
        loss = h.new_zeros(())
        c_mem = c_mem.detach()
        if old.size(1) > 0:
            new = self.compress(old, usage)
            asked = self.s.compression_loss == "attention" and self.s.compression in PARAMETRIC
            if asked and (self.training or self.design["loss_in_eval"]):
                loss = self.loss(stored, old, new)
            c_mem = torch.cat([c_mem, new.detach()], dim=1)
        c_mem = c_mem[:, max(0, c_mem.size(1) - self.s.c_mem_len) :]
        return output, stays, c_mem, loss


PARAMETRIC = ("conv", "other")


class Model(nn.Module):
    def __init__(self, s: Any, design: dict) -> None:
        super().__init__()
        self.s = s
        self.design = design
        self.embedding = nn.Embedding(s.vocab_size, s.d_model)
        self.layers = nn.ModuleList(Layer(s, design) for _ in range(s.n_layers))
        self.norm = nn.LayerNorm(s.d_model) if s.norm_first else nn.Identity()
        self.logits = nn.Linear(s.d_model, s.vocab_size)

    def forward(self, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor]:
        check_input(self, tokens, state)
        h = self.embedding(tokens)
        after = State([], [])
        losses = []
        for layer, mem, c_mem in zip(self.layers, *state, strict=True):
            h, mem, c_mem, loss = layer(h, mem, c_mem)
            after.mem.append(mem)
            after.c_mem.append(c_mem)
            losses.append(loss)
        total = torch.stack(losses).sum()
        if self.design["loss_over_layers"] == "mean":
            total = total / len(losses)
        return self.logits(self.norm(h)), after, total


def check_input(model: Model, tokens: Tensor, state: State) -> None:
    """What MOD-5 asks for."""
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be int64, got {tokens.dtype}")
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be [B, T], got {list(tokens.shape)}")
    if tokens.max() >= model.s.vocab_size:
        raise ValueError(f"tokens must lie below {model.s.vocab_size}, got {tokens.max()}")
    expected = [tokens.size(0), model.s.d_model]
    for slots in (*state.mem, *state.c_mem):
        found = [slots.size(0), slots.size(2)]
        if found != expected:
            raise ValueError(f"memory must have B and D {expected}, got {found}")


class Adapter:
    """A design with its declaration. It refuses what it does not declare to take, so that a check
    that assumes more fails."""

    def __init__(self, design: dict) -> None:
        self.design = design
        self.declares = {"name": "a design", **design}
        self.time_first = design["layout"] == "time_first"

    def swap(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self.time_first else x

    def build(self, s: Any) -> Model:
        design = self.design
        c = s.compression_rate
        if s.d_model % s.n_heads != 0:
            raise ValueError(f"d_model = {s.d_model} must be divisible by n_heads = {s.n_heads}")
        need(s.compression in design["compressions"], "compression")
        need(("pre" if s.norm_first else "post") in design["norms"], "norm_first")
        need(s.compression_loss in design["compression_losses"], "compression_loss")
        least = {"any": 0, "one": 1, "rate": c, "segment": s.segment}
        need(s.mem_len >= least[design["mem_len"]], "mem_len")
        if design["overflow"] == "round_up" and s.c_mem_len > 0:
            need(s.mem_len >= c - 1, "mem_len")
        if design["c_mem_len"] == "one":
            need(s.c_mem_len > 0, "c_mem_len")
        if design["c_mem_len"] == "block":
            need(s.c_mem_len >= s.mem_len // c, "c_mem_len")
        return Model(s, design)

    def start(self, model: Model, batch_size: int) -> State:
        s = model.s
        mem = 0
        c_mem = 0
        if self.design["start"] == "zeros":
            mem = s.mem_len
            c_mem = s.c_mem_len
        like = model.embedding.weight
        layers = range(s.n_layers)
        mems = [like.new_zeros(batch_size, mem, s.d_model) for _ in layers]
        return State(mems, [like.new_zeros(batch_size, c_mem, s.d_model) for _ in layers])

    def step(self, model: Model, tokens: Tensor, state: State) -> tuple[Tensor, State, Tensor]:
        tokens = tokens.transpose(0, 1) if self.time_first and tokens.dim() > 1 else tokens
        c = model.s.compression_rate
        T = tokens.size(1)
        if tokens.dim() == 2:
            need(self.design["segments"] != "rate" or T >= c, "segment")
            need(self.design["segments"] != "full" or T == model.s.segment, "segment")
        if self.design["start"] == "zeros" and self.design["overflow"] not in ("round_up", "keep"):
            for mem, c_mem in zip(*state, strict=True):
                need(mem.size(1) == model.s.mem_len, "memory")
                need(c_mem.size(1) == model.s.c_mem_len, "compressed memory")
        logits, state, loss = model(tokens, state)
        return self.swap(logits), state, loss

    def read(self, state: State) -> list[tuple[Tensor, Tensor]]:
        return [(self.swap(mem), self.swap(c_mem)) for mem, c_mem in zip(*state, strict=True)]

    def replace(self, state: State, slots: Sequence[tuple[Tensor, Tensor]]) -> State:
        mem = [self.swap(layer[0]) for layer in slots]
        return State(mem, [self.swap(layer[1]) for layer in slots])

    def compression_parameters(self, model: Model) -> list[list[nn.Parameter]]:
        named = []
        for layer in model.layers:
            parts = [getattr(layer, name) for name in ("conv", "gate") if hasattr(layer, name)]
            named.append([parameter for part in parts for parameter in part.parameters()])
        return named

    def compress(self, model: Model, layer: int, old: Tensor, usage: Tensor) -> Tensor:
        old = self.swap(old)
        need(old.size(1) > 0, "block")
        return self.swap(model.layers[layer].compress(old, self.swap(usage)))

    def weights(self, model: Model) -> dict[str, Any]:
        H = model.s.n_heads
        layers = []
        for layer in model.layers:
            named = {
                "norm1_weight": layer.norm1.weight,
                "norm1_bias": layer.norm1.bias,
                "query": layer.query.weight.T,
                "key": layer.key.weight.T,
                "value": layer.value.weight.T,
                "relative_key": layer.relative_key.weight.T,
                "content_bias": layer.content_bias.view(H, -1),
                "position_bias": layer.position_bias.view(H, -1),
                "output": layer.output.weight.T,
                "norm2_weight": layer.norm2.weight,
                "norm2_bias": layer.norm2.bias,
                "ff1_weight": layer.ff1.weight.T,
                "ff1_bias": layer.ff1.bias,
                "ff2_weight": layer.ff2.weight.T,
                "ff2_bias": layer.ff2.bias,
            }
            if hasattr(layer, "conv"):
                named["convolution"] = layer.conv.weight.permute(2, 1, 0)
                named["convolution_bias"] = layer.conv.bias
            layers.append(named)
        whole = {
            "layers": layers,
            "embedding": model.embedding.weight,
            "logits_weight": model.logits.weight.T,
            "logits_bias": model.logits.bias,
        }
        if model.s.norm_first:
            whole["norm_weight"] = model.norm.weight
            whole["norm_bias"] = model.norm.bias
        return whole


def need(ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(f"{what}: not what is declared")


def failures(design: dict) -> list[str]:
    """The checks that a design fails, and why."""
    impl = Implementation(Adapter(design), "spec_tests.meta.designs")
    before = torch.get_default_dtype()
    torch.set_default_dtype(impl.dtype)
    failed = []
    try:
        check_usable(impl, supported(impl))
        for name, check in checks().items():
            try:
                check(impl)
            except pytest.skip.Exception:
                continue
            except Exception as error:
                failed.append(f"{name}: {error!r}, with {getattr(error, 'drawn', '')}")
    finally:
        torch.set_default_dtype(before)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="All designs, which have to pass.")
    parser.add_argument("--examples", type=int, default=20, help="of each check")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--designs", default="0-99", help="first-last of them")
    args = parser.parse_args()
    prepare("quick", args.seed, torch.float64)
    quick = hypothesis.settings.get_profile("quick")
    hypothesis.settings.register_profile("some", quick, max_examples=args.examples)
    hypothesis.settings.load_profile("some")
    first, last = map(int, args.designs.split("-"))
    count = 0
    for i, design in enumerate(designs()):
        if first <= i <= last:
            failed = failures(design)
            count += len(failed) > 0
            print(i, design, *failed or ["passes"], sep="\n    ", flush=True)
    sys.exit(count > 0)


if __name__ == "__main__":
    main()
