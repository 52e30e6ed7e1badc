"""The whole step against the plain loops of oracle.py, over random settings and streams."""

import oracle
import torch
from adapter import Adapter
from hypothesis import given
from support import build, schedules, settings, tokens
from torch import Tensor


def close(found: Tensor, expected: list, shape: tuple[int, ...]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected).reshape(shape), rtol=0, atol=1e-9)


@given(settings=settings(), schedule=schedules)
def test_ATT_3_MEM_LOSS_5_every_step_equals_the_loops(adapter: Adapter, settings, schedule):
    model = build(adapter, settings)
    weights = oracle.lists(adapter.weights(model))
    text, state = tokens(settings, 2, sum(schedule)), adapter.start(model, 2)
    empty: list[list[oracle.Vector]] = [[] for _ in range(settings.n_layers)]
    memories = [(empty, empty) for _ in range(2)]
    for segment in text.split(schedule, dim=1):
        step = adapter.step(model, segment, state)
        losses = []
        for row in range(2):
            result = oracle.step(settings, weights, segment[row].tolist(), *memories[row])
            close(step.logits[row], result.logits, (segment.size(1), settings.vocab_size))
            for layer, mem, c_mem in zip(
                adapter.read(step.state), result.mem, result.c_mem, strict=True
            ):
                close(layer.mem[row], mem, (len(mem), settings.d_model))
                close(layer.c_mem[row], c_mem, (len(c_mem), settings.d_model))
            memories[row] = result.mem, result.c_mem
            losses.append(result.loss)
        close(step.loss, [sum(losses) / 2], ())
        state = step.state


@given(settings=settings(), schedule=schedules)
def test_ATT_3_attention_weights_equal_the_loops(adapter: Adapter, settings, schedule):
    """What a query may not see is exactly zero; layer by layer on the oracle's inputs."""
    model = build(adapter, settings)
    weights = oracle.lists(adapter.weights(model))
    state = adapter.start(model, 1)
    mem = c_mem = [[] for _ in range(settings.n_layers)]
    for segment in tokens(settings, 1, sum(schedule)).split(schedule, dim=1):
        h = adapter.weights(model)["embedding"][segment]
        _, state, attention = adapter.layers(model, h, state)
        result = oracle.step(settings, weights, segment[0].tolist(), mem, c_mem)
        mem, c_mem = result.mem, result.c_mem
        for found, expected in zip(attention, result.attention, strict=True):
            for i, queries in enumerate(expected):
                for t, seen in enumerate(queries):
                    close(found[0, i, t, : len(seen)], seen, (len(seen),))
                    assert found[0, i, t, len(seen) :].count_nonzero() == 0
