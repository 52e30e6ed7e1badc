"""LOSS: what the compression losses are, and whom they train."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from adapter import Adapter, Settings, Slots
from hypothesis import given
from hypothesis import strategies as st
from support import PARAMETRIC, build, filled, run, settings, slots, tokens
from torch import Tensor, nn


@st.composite
def training(draw: st.DrawFn, **fixed) -> Settings:
    """Settings under which something is compressed and trained; wide enough that no ReLU of the
    dilated convolution is dead for every memory."""
    drawn = {
        "compression": draw(st.sampled_from(PARAMETRIC)),
        "compression_loss": draw(st.sampled_from(["attention", "autoencoding"])),
    }
    return draw(settings(**{"c_mem_len": 3, "d_model": 12, **drawn, **fixed}))


def language_model_loss(logits: Tensor, text: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), text.roll(-1, dims=1).flatten())


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor | None]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return dict(zip(named, found, strict=True))


def is_zero(gradient: Tensor | None) -> bool:
    return gradient is None or gradient.count_nonzero() == 0


def of_compression(adapter: Adapter, model: nn.Module) -> set[str]:
    listed = {id(p) for layer in adapter.compression_parameters(model) for p in layer}
    return {name for name, p in model.named_parameters() if id(p) in listed}


@given(settings=training(), bptt=st.booleans(), T=st.integers(2, 5))
def test_LOSS_1_trains_every_f_c_and_nothing_else(adapter: Adapter, settings, bptt, T):
    settings = settings._replace(bptt=bptt)
    model = build(adapter, settings)
    full = slots(settings, 2, settings.mem_len, 3)
    handed = [Slots(*(part.requires_grad_() for part in layer)) for layer in full]
    step = adapter.step(
        model, tokens(settings, 2, T), adapter.replace(adapter.start(model, 2), handed)
    )
    inputs = [part for layer in handed for part in layer]
    to_inputs = torch.autograd.grad(step.loss, inputs, retain_graph=True, allow_unused=True)
    assert all(is_zero(gradient) for gradient in to_inputs)
    trained = of_compression(adapter, model)
    assert trained
    for name, gradient in gradients(step.loss, model).items():
        assert is_zero(gradient) == (name not in trained), name


@given(settings=training(), T=st.integers(2, 5))
def test_LOSS_2_leaves_the_language_model_loss_alone_in_every_step(adapter: Adapter, settings, T):
    model = build(adapter, settings)
    text = tokens(settings, 2, 4 * T)
    trained = of_compression(adapter, model)
    for step, segment in zip(run(adapter, model, text, [T] * 4), text.split(T, 1), strict=True):
        loss = language_model_loss(step.logits, segment)
        alone, joint = gradients(loss, model), gradients(loss + step.loss, model)
        for name in alone:
            if name in trained:
                assert is_zero(alone[name]), name
            else:
                assert not is_zero(alone[name]), name
                torch.testing.assert_close(joint[name], alone[name], rtol=0, atol=0)


@given(settings=training())
def test_LOSS_2_reaches_f_c_through_time_if_and_only_if_asked(adapter: Adapter, settings):
    """The slots that the second segment makes are read by the third."""
    for bptt in (False, True):
        model = build(adapter, settings._replace(bptt=bptt))
        steps = run(adapter, model, tokens(settings, 2, 24), [8, 8, 8])
        found = gradients(steps[2].logits.square().sum(), model)
        decoders = {name for name in found if "decompress" in name}
        for name in of_compression(adapter, model) - decoders:
            assert is_zero(found[name]) != bptt, name


@given(settings=training(compression_loss="attention"), n=st.integers(1, 5), T=st.integers(1, 4))
def test_LOSS_3_is_zero_for_the_identity(adapter: Adapter, settings, n, T):
    settings = settings._replace(compression="conv", compression_rate=1)
    model = build(adapter, settings)
    with torch.no_grad():
        adapter.weights(model)["layers"][0]["convolution"].copy_(torch.eye(settings.d_model))
    h, old = torch.randn(2, T, settings.d_model), torch.randn(2, n, settings.d_model)
    assert adapter.loss(model, 0, h, old) == 0
    assert adapter.loss(model, 0, h, old[:, :0]) == 0


@given(settings=training(n_layers=1), T=st.integers(1, 3), data=st.data())
def test_LOSS_4_depends_on_the_evicted_block_alone(adapter: Adapter, settings, T, data):
    """One layer: in a higher one the other slots move h, and with it the loss."""
    c = settings.compression_rate
    settings = settings._replace(mem_len=3 * c)
    model = build(adapter, settings)
    text, full = tokens(settings, 2, T), slots(settings, 2, 3 * c, 3)
    leave = c * -(-T // c)

    def loss(mem: Tensor, c_mem: Tensor) -> Tensor:
        state = adapter.replace(adapter.start(model, 2), [Slots(mem, c_mem)])
        return adapter.step(model, text, state).loss

    (mem, c_mem) = full[0]
    i = data.draw(st.integers(0, 3 * c - 1), label="changed slot of memory")
    changed = mem.clone()
    changed[:, i] += torch.randn(2, settings.d_model)
    assert loss(mem, c_mem) > 0
    assert torch.equal(loss(mem, c_mem), loss(mem, c_mem.flip(2)))
    assert torch.equal(loss(mem, c_mem), loss(changed, c_mem)) == (i >= leave)


@given(settings=training(), n=st.integers(1, 3), T=st.integers(1, 4))
def test_LOSS_5_equals_the_algorithm_by_loops(adapter: Adapter, settings, n, T):
    model = build(adapter, settings)
    h = torch.randn(2, T, settings.d_model)
    old = torch.randn(2, settings.compression_rate * n, settings.d_model)
    weights = oracle.lists(adapter.weights(model))["layers"][0]
    name, c = settings.compression_loss, settings.compression_rate
    rows = []
    for x, block in zip(h.tolist(), old.tolist(), strict=True):
        new = oracle.compress(settings.compression, weights, block, [], c)
        rows.append(oracle.compression_loss(name, weights, x, block, new))
    found = adapter.loss(model, 0, h, old).item()
    assert found == pytest.approx(sum(rows) / 2, rel=1e-10, abs=1e-12)


@given(settings=training(), T=st.integers(2, 5))
def test_LOSS_6_falls_with_a_small_step_of_f_c_against_its_gradient(adapter: Adapter, settings, T):
    model = build(adapter, settings)
    state, text = filled(adapter, model, settings), tokens(settings, 2, T)
    before = adapter.step(model, text, state).loss
    before.backward()
    with torch.no_grad():
        moved = [p for layer in adapter.compression_parameters(model) for p in layer]
        steepness = sum(p.grad.square().sum() for p in moved)
        for parameter in moved:
            parameter -= 1e-5 * parameter.grad / steepness.sqrt()
    after = adapter.step(model, text, state).loss
    fall = (before - after) / (1e-5 * steepness.sqrt())  # 1 on a straight slope
    assert 0.9 < fall < 1.1


@pytest.mark.parametrize("name", ["most_used", "mean_pool", "max_pool"])
@pytest.mark.parametrize("loss", ["attention", "autoencoding", "none"])
def test_LOSS_is_zero_where_there_is_nothing_to_train(adapter: Adapter, name, loss):
    settings = Settings(compression=name, compression_loss=loss)
    model = build(adapter, settings)
    assert not any(adapter.compression_parameters(model))
    assert run(adapter, model, tokens(settings, 2, 16), [8, 8])[1].loss == 0
