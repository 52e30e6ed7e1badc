"""Models, inputs and schedules for the tests, all valid by construction."""

from typing import Any

import torch
from adapter import Adapter, Settings, Slots, Step
from hypothesis import strategies as st
from torch import Tensor, nn

PARAMETRIC = ("conv", "dilated_conv")  # the compression functions that a loss trains
STRIDED = ("conv", "mean_pool", "max_pool")  # slot k is a function of block k alone
COMPRESSIONS = ("conv", "dilated_conv", "most_used", "mean_pool", "max_pool")


def build(adapter: Adapter, settings: Settings, seed: int = 0) -> nn.Module:
    """A model whose every parameter matters: no zero biases, no unit gains, no tiny outputs."""
    model = adapter.build(settings).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:  # biases, and gains around 1
                parameter.copy_(float(parameter.eq(1).all()) + 0.3 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.size(-1) ** 0.5)
    return model


def tokens(settings: Settings, batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(settings.vocab_size, (batch, length), generator=generator)


def slots(settings: Settings, batch: int, mem: int, c_mem: int, seed: int = 0) -> list[Slots]:
    """Random memories of these lengths for every layer."""
    generator = torch.Generator().manual_seed(seed + 2)

    def one(length: int) -> Tensor:
        return torch.randn(batch, length, settings.d_model, generator=generator)

    return [Slots(one(mem), one(c_mem)) for _ in range(settings.n_layers)]


def filled(adapter: Adapter, model: nn.Module, settings: Settings, batch: int = 2) -> Any:
    """A state with full memories."""
    full = slots(settings, batch, settings.mem_len, settings.c_mem_len)
    return adapter.replace(adapter.start(model, batch), full)


def run(adapter: Adapter, model: nn.Module, text: Tensor, schedule: list[int]) -> list[Step]:
    """Feed text in segments of these lengths, from the start."""
    state, steps = adapter.start(model, text.size(0)), []
    for segment in text.split(schedule, dim=1):
        steps.append(adapter.step(model, segment, state))
        state = steps[-1].state
    return steps


def wide_twin(adapter: Adapter, model: nn.Module, settings: Settings) -> nn.Module:
    """The same model with a memory so long that nothing leaves it. Attention in a step does not
    depend on mem_len, so that after the same step its memory holds what the model's held before
    the eviction."""
    twin = adapter.build(settings._replace(mem_len=1000)).double().eval()
    twin.load_state_dict(model.state_dict())
    return twin


@st.composite
def settings(draw: st.DrawFn, **fixed: Any) -> Settings:
    """Any settings that work; `fixed` ones are not drawn."""
    rate = draw(st.integers(1, 4))
    heads = draw(st.sampled_from([1, 2, 3]))
    drawn = Settings(
        d_model=heads * draw(st.sampled_from([4, 6])),  # of 2 features a norm would leave the sign
        n_heads=heads,
        n_layers=draw(st.integers(1, 3)),
        d_ff=draw(st.sampled_from([3, 10])),
        mem_len=draw(st.integers(0, 7)),
        c_mem_len=draw(st.integers(0, 4)),
        compression_rate=rate,
        compression=draw(st.sampled_from(COMPRESSIONS)),
        compression_loss=draw(st.sampled_from(["attention", "autoencoding", "none"])),
        norm_first=draw(st.booleans()),
    )._replace(**fixed)
    if drawn.c_mem_len > 0:
        drawn = drawn._replace(mem_len=max(drawn.mem_len, drawn.compression_rate - 1))
    return drawn


schedules = st.lists(st.integers(1, 6), min_size=1, max_size=6)
