"""CMP: the compression functions."""

import oracle
import pytest
import torch
from adapter import Adapter
from hypothesis import given
from hypothesis import strategies as st
from support import COMPRESSIONS, STRIDED, build, settings


def block(settings, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memories to compress, `[2, c*n, D]`, and the attention that each received."""
    length = settings.compression_rate * n
    return torch.randn(2, length, settings.d_model), torch.rand(2, length)


@pytest.mark.parametrize("name", COMPRESSIONS)
@given(settings=settings(), n=st.integers(0, 4))
def test_CMP_1_c_n_memories_become_n_slots(adapter: Adapter, settings, name, n):
    model = build(adapter, settings._replace(compression=name))
    slots = adapter.compress(model, 0, *block(settings, n))
    assert slots.shape == (2, n, settings.d_model)


@pytest.mark.parametrize("name", STRIDED)
@given(settings=settings(), n=st.integers(2, 4), data=st.data())
def test_CMP_2_slot_k_depends_on_block_k_alone(adapter: Adapter, settings, name, n, data):
    model = build(adapter, settings._replace(compression=name))
    c, k = settings.compression_rate, data.draw(st.integers(0, n - 1), label="k")
    old, usage = block(settings, n)
    old.requires_grad_()
    slots = adapter.compress(model, 0, old, usage)
    (gradient,) = torch.autograd.grad((slots[:, k] * torch.randn(slots[:, k].shape)).sum(), old)
    inside = gradient[:, c * k : c * (k + 1)]
    assert gradient.count_nonzero() == inside.count_nonzero()
    some = inside.flatten(1) if name == "max_pool" else inside.flatten(0, 1)  # one memory may win
    assert some.abs().sum(dim=-1).all()
    moved = adapter.compress(model, 0, old[:, c:], usage[:, c:])
    torch.testing.assert_close(moved, slots[:, 1:], rtol=0, atol=1e-12)


@given(settings=settings(n_layers=3, d_model=12), name=st.sampled_from(["conv", "dilated_conv"]))
def test_CMP_3_layers_share_no_compression_parameter(adapter: Adapter, settings, name):
    model = build(adapter, settings._replace(compression=name))
    layers = adapter.compression_parameters(model)
    assert len(layers) == 3 and all(layers)
    storages = [parameter.data_ptr() for layer in layers for parameter in layer]
    assert len(set(storages)) == len(storages)
    old, usage = block(settings, 2)
    one, two, three = (adapter.compress(model, i, old, usage) for i in range(3))
    assert not torch.allclose(one, two) and not torch.allclose(two, three)


@pytest.mark.parametrize("name", COMPRESSIONS)
@given(settings=settings(), n=st.integers(1, 4))
def test_CMP_4_every_function_equals_its_definition_by_loops(adapter: Adapter, settings, name, n):
    model = build(adapter, settings._replace(compression=name))
    old, usage = block(settings, n)
    weights = oracle.lists(adapter.weights(model))["layers"][0]
    slots = adapter.compress(model, 0, old, usage)
    for row in range(2):
        expected = oracle.compress(
            name, weights, old[row].tolist(), usage[row].tolist(), settings.compression_rate
        )
        torch.testing.assert_close(slots[row], torch.tensor(expected), rtol=0, atol=1e-12)


@given(settings=settings(compression="most_used"), n=st.integers(1, 3))
def test_CMP_4_of_equally_used_memories_the_older_stay(adapter: Adapter, settings, n):
    model = build(adapter, settings)
    old, usage = block(settings, n)
    slots = adapter.compress(model, 0, old, torch.ones_like(usage))
    assert torch.equal(slots, old[:, :n])
