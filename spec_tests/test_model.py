"""MOD: the model as a whole."""

import io

import pytest
import torch
from adapter import Adapter, Settings, Slots
from hypothesis import given
from hypothesis import strategies as st
from support import build, run, schedules, settings, slots, tokens


@given(settings=settings(c_mem_len=0), schedule=schedules)
def test_MOD_1_without_compressed_memory_it_is_transformer_xl(adapter: Adapter, settings, schedule):
    """Its memory is the newest mem_len inputs, whatever the compression; each segment's logits are
    those of a model that compresses, handed that memory and nothing compressed."""
    model = build(adapter, settings)
    wider = settings._replace(mem_len=settings.mem_len + 3, c_mem_len=2)
    compressing = adapter.build(wider).double().eval()
    compressing.load_state_dict(model.state_dict())
    text, state, fed = tokens(settings, 2, sum(schedule)), adapter.start(model, 2), 0
    for segment in text.split(schedule, dim=1):
        expected = adapter.step(compressing, segment, state).logits
        step = adapter.step(model, segment, state)
        assert torch.equal(step.logits, expected)
        assert step.loss == 0
        state, fed = step.state, fed + segment.size(1)
        for mem, c_mem in adapter.read(state):
            assert (mem.size(1), c_mem.size(1)) == (min(fed, settings.mem_len), 0)


@given(settings=settings(mem_len=0, c_mem_len=0), schedule=schedules)
def test_MOD_1_without_memory_it_is_a_causal_transformer(adapter: Adapter, settings, schedule):
    model = build(adapter, settings)
    text = tokens(settings, 2, sum(schedule))
    steps = run(adapter, model, text, schedule)
    for segment, step in zip(text.split(schedule, dim=1), steps, strict=True):
        fresh = adapter.step(model, segment, adapter.start(model, 2))
        assert torch.equal(step.logits, fresh.logits)


@given(settings=settings(), schedule=schedules)
def test_MOD_2_training_and_evaluation_mode_agree(adapter: Adapter, settings, schedule):
    model, text = build(adapter, settings), tokens(settings, 2, sum(schedule))
    evaluated = run(adapter, model, text, schedule)
    again = run(adapter, model, text, schedule)
    model.train()
    trained = run(adapter, model, text, schedule)
    for one, two, three in zip(evaluated, again, trained, strict=True):
        for other in (two, three):
            assert torch.equal(one.logits, other.logits)
            assert torch.equal(one.loss, other.loss)
            for a, b in zip(adapter.read(one.state), adapter.read(other.state), strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@given(settings=settings(), T=st.integers(1, 6))
def test_MOD_3_a_saved_and_loaded_state_continues(adapter: Adapter, settings, T):
    model, text = build(adapter, settings), tokens(settings, 2, 5 * T)
    steps = run(adapter, model, text, [T] * 5)
    file = io.BytesIO()
    torch.save((model.state_dict(), steps[2].state), file)
    file.seek(0)
    parameters, state = torch.load(file, weights_only=False)
    other = build(adapter, settings, seed=1)
    other.load_state_dict(parameters)
    for i in (3, 4):
        step = adapter.step(other, text[:, i * T : (i + 1) * T], state)
        assert torch.equal(step.logits, steps[i].logits)
        state = step.state


@given(settings=settings(), schedule=schedules)
def test_MOD_4_a_segment_may_have_any_length_after_any_other(adapter: Adapter, settings, schedule):
    """A step of a length not seen before is that of a new model of the same parameters."""
    model, text = build(adapter, settings), tokens(settings, 2, sum(schedule))
    state = adapter.start(model, 2)
    for segment in text.split(schedule, dim=1):
        fresh = build(adapter, settings)
        step = adapter.step(model, segment, state)
        assert step.logits.shape == (*segment.shape, settings.vocab_size)
        assert torch.equal(step.logits, adapter.step(fresh, segment, state).logits)
        state = step.state


SMALL = Settings()


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, "tokens must be .*int64 or .*int32, got torch.float"),
        (torch.zeros(3, dtype=torch.long), ValueError, r"tokens must be \[B, T\].*got \[3\]"),
        (torch.zeros(2, 0, dtype=torch.long), ValueError, r"tokens .* got \[2, 0\]"),
        (torch.zeros(0, 2, dtype=torch.long), ValueError, r"tokens .* got \[0, 2\]"),
        (torch.tensor([[3, 11], [0, 1]]), ValueError, r"tokens must lie in \[0, 11\), got 11"),
        (
            torch.zeros(2, 3, dtype=torch.int64, device="meta"),
            ValueError,
            "tokens must have device cpu, got meta",
        ),
        (torch.tensor([[3, -1], [0, 1]]), ValueError, r"tokens must lie in \[0, 11\), got -1"),
    ],
)
def test_MOD_5_wrong_tokens_are_refused(adapter: Adapter, bad, error, message):
    model = build(adapter, SMALL)
    with pytest.raises(error, match=message):
        adapter.step(model, bad, adapter.start(model, 2))


def one_bad(change):
    """Memories that fit, but for what `change` does to the second layer's."""

    def make() -> list[Slots]:
        first, second = slots(SMALL, 2, 4, 3)
        return [first, change(second)]

    return make


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (
            lambda: slots(SMALL, 3, 4, 3),
            ValueError,
            r"mem\[0\] must .*\[2, 4, 8\], got \[3, 4, 8\]",
        ),
        (lambda: slots(SMALL, 2, 4, 3)[:1], ValueError, "mem must have 2 layers, got 1"),
        (
            lambda: slots(SMALL._replace(d_model=6), 2, 4, 3),
            ValueError,
            r"mem\[0\] must .*\[2, 4, 8\], got \[2, 4, 6\]",
        ),
        (
            one_bad(lambda layer: Slots(layer.mem[:, 1:], layer.c_mem)),
            ValueError,
            r"mem\[1\] must .*\[2, 4, 8\], got \[2, 3, 8\]",
        ),
        (
            one_bad(lambda layer: Slots(layer.mem, layer.c_mem[0])),
            ValueError,
            r"c_mem\[1\] must .*\[2, 3, 8\], got \[3, 8\]",
        ),
        (
            one_bad(lambda layer: Slots(layer.mem, layer.c_mem.float())),
            TypeError,
            r"c_mem\[1\] must have dtype torch.float64, got torch.float32",
        ),
        (
            one_bad(lambda layer: Slots(layer.mem.to("meta"), layer.c_mem)),
            ValueError,
            r"mem\[1\] must have device cpu, got meta",
        ),
    ],
)
def test_MOD_5_a_memory_that_does_not_fit_is_refused(adapter: Adapter, bad, error, message):
    model = build(adapter, SMALL)
    state = adapter.replace(adapter.start(model, 2), bad())
    with pytest.raises(error, match=message):
        adapter.step(model, tokens(SMALL, 2, 3), state)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"d_model": 9}, "d_model must be divisible by n_heads = 2, got 9"),
        ({"d_model": 9, "n_heads": 3}, "d_model must be even .*, got 9"),
        ({"d_model": 8.0}, "d_model must be an integer of at least 1, got 8.0"),
        ({"vocab_size": 0}, "vocab_size must be .*, got 0"),
        ({"n_heads": 0}, "n_heads must be .*, got 0"),
        ({"n_layers": 0}, "n_layers must be .*, got 0"),
        ({"d_ff": -1}, "d_ff must be .*, got -1"),
        ({"compression_rate": 0}, "compression_rate must be .*, got 0"),
        ({"mem_len": -1}, "mem_len must be an integer of at least 0, got -1"),
        ({"mem_len": True}, "mem_len must be an integer of at least 0, got True"),
        ({"c_mem_len": -1}, "c_mem_len must be an integer of at least 0, got -1"),
        ({"compression_rate": 6}, "mem_len must be at least compression_rate - 1 = 5, got 4"),
        ({"compression": "sum"}, "compression must be one of conv, .*, got 'sum'"),
        ({"compression_loss": "l2"}, "compression_loss must be one of attention, .*, got 'l2'"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be a number in \[0, 1\), got -0.1"),
        ({"dropout": "0.1"}, r"dropout must be a number in \[0, 1\), got '0.1'"),
        ({"norm_first": 1}, "norm_first must be True or False, got 1"),
        ({"bptt": None}, "bptt must be True or False, got None"),
    ],
)
def test_MOD_5_settings_that_cannot_work_are_refused(adapter: Adapter, bad, message):
    with pytest.raises(ValueError, match=message):
        adapter.build(SMALL._replace(**bad))


@pytest.mark.parametrize("fine", [{"compression_rate": 5}, {"compression_rate": 9, "c_mem_len": 0}])
def test_MOD_5_settings_at_the_edge_work(adapter: Adapter, fine):
    settings = SMALL._replace(**fine)
    model = build(adapter, settings)
    assert run(adapter, model, tokens(settings, 1, 20), [3, 8, 9])[2].logits.isfinite().all()
