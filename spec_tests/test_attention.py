"""ATT: what attention sees, and at which distance."""

import torch
from adapter import Adapter, Slots
from hypothesis import given
from hypothesis import strategies as st
from support import build, filled, run, schedules, settings, slots, tokens


@given(settings=settings(vocab_size=30), T=st.integers(2, 7), data=st.data())
def test_ATT_1_no_token_after_t_reaches_the_logits_at_t(adapter: Adapter, settings, T, data):
    model = build(adapter, settings)
    state = filled(adapter, model, settings)
    t = data.draw(st.integers(0, T - 2), label="t")
    text = torch.stack([torch.randperm(settings.vocab_size)[:T] for _ in range(2)])
    logits = adapter.step(model, text, state).logits

    changed = text.clone()
    changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % settings.vocab_size
    later = adapter.step(model, changed, state).logits
    assert torch.equal(logits[:, : t + 1], later[:, : t + 1])
    assert not torch.equal(logits[:, t + 1], later[:, t + 1])

    embedding = adapter.weights(model)["embedding"]
    (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embedding)
    assert gradient[text[0, t + 1 :]].count_nonzero() == 0


@given(settings=settings(vocab_size=30, mem_len=5, c_mem_len=3), T=st.integers(1, 5))
def test_ATT_2_every_slot_and_every_token_up_to_t_reaches_the_logits_at_t(
    adapter: Adapter, settings, T
):
    model = build(adapter, settings)
    memories = [
        Slots(*(part.requires_grad_() for part in layer)) for layer in slots(settings, 1, 5, 3)
    ]
    state = adapter.replace(adapter.start(model, 1), memories)
    text = torch.randperm(settings.vocab_size)[None, :T]
    logits = adapter.step(model, text, state).logits
    embedding = adapter.weights(model)["embedding"]
    read = [part for layer in memories for part in layer]
    for t in range(T):
        seed = torch.randn(settings.vocab_size)
        by_token, *by_slot = torch.autograd.grad(
            logits[0, t] @ seed, [embedding, *read], retain_graph=True
        )
        assert by_token[text[0, : t + 1]].abs().sum(dim=-1).all()
        for part in by_slot:
            assert part.abs().sum(dim=-1).all()


@given(
    settings=settings(mem_len=8, c_mem_len=8),
    held=st.integers(0, 8),
    T=st.integers(1, 5),
    data=st.data(),
)
def test_ATT_3_distance_counts_slots_whichever_memory_they_are_in(
    adapter: Adapter, settings, held, T, data
):
    """The same slots, divided otherwise between the two memories, stand at the same distances (that
    they are the right ones, the oracle and the first author's numbers show)."""
    model = build(adapter, settings)
    text = tokens(settings, 2, T)
    both = [torch.randn(2, held, settings.d_model) for _ in range(settings.n_layers)]

    def logits(c_mem: int) -> torch.Tensor:
        memories = [Slots(x[:, c_mem:], x[:, :c_mem]) for x in both]
        return adapter.step(model, text, adapter.replace(adapter.start(model, 2), memories)).logits

    c_mem = data.draw(st.integers(0, held), label="slots in compressed memory")
    torch.testing.assert_close(logits(c_mem), logits(0), rtol=0, atol=1e-11)


@given(
    settings=settings(vocab_size=30, compression="conv"),
    blocks=st.integers(1, 2),
    before=st.integers(1, 5),
)
def test_ATT_4_the_same_context_gives_the_same_logits_anywhere_in_the_stream(
    adapter: Adapter, settings, blocks, before
):
    """Two streams with one ending, which is longer than the reach: at the end nothing of what was
    before, nor of how long ago it began, is left."""
    c = settings.compression_rate
    T = c * blocks
    settings = settings._replace(mem_len=c * max(1, settings.mem_len // c))
    model = build(adapter, settings)
    reach = settings.n_layers * (settings.mem_len + c * settings.c_mem_len + T)
    length = T * -(-(reach + T) // T)
    ending = torch.randint(settings.vocab_size, (1, length))
    fill = T * -(-(settings.mem_len + c * settings.c_mem_len) // T)  # memories are full by then
    last = []
    for n in (fill, fill + T * before):
        text = torch.cat([torch.randint(settings.vocab_size, (1, n)), ending], dim=1)
        last.append(run(adapter, model, text, [T] * (text.size(1) // T))[-1].logits)
    torch.testing.assert_close(last[0], last[1], rtol=0, atol=1e-11)


@given(settings=settings(), schedule=schedules)
def test_ATT_5_while_nothing_overflows_any_split_gives_the_same_logits(
    adapter: Adapter, settings, schedule
):
    length = sum(schedule)
    settings = settings._replace(mem_len=max(length, settings.compression_rate - 1))
    model = build(adapter, settings)
    text = tokens(settings, 2, length)
    (whole,) = run(adapter, model, text, [length])
    split = run(adapter, model, text, schedule)
    logits = torch.cat([step.logits for step in split], dim=1)
    torch.testing.assert_close(logits, whole.logits, rtol=0, atol=1e-10)


@given(settings=settings(), schedule=schedules)
def test_ATT_6_rows_do_not_see_each_other(adapter: Adapter, settings, schedule):
    model = build(adapter, settings)
    text = tokens(settings, 3, sum(schedule))
    together = run(adapter, model, text, schedule)
    others = text.clone()
    others[1:] = (others[1:] + 1) % settings.vocab_size
    for step, other in zip(together, run(adapter, model, others, schedule), strict=True):
        assert torch.equal(step.logits[0], other.logits[0])
    for row in range(3):
        alone = run(adapter, model, text[row : row + 1], schedule)
        for step, single in zip(together, alone, strict=True):
            torch.testing.assert_close(step.logits[row], single.logits[0], rtol=0, atol=1e-11)
            for both, one in zip(adapter.read(step.state), adapter.read(single.state), strict=True):
                for a, b in zip(both, one, strict=True):
                    torch.testing.assert_close(a[row], b[0], rtol=0, atol=1e-11)
