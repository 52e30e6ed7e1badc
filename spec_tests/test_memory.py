"""MEM: what is remembered, compressed and forgotten."""

import hypothesis
import torch
from adapter import Adapter, Settings, Slots
from hypothesis import given
from hypothesis import strategies as st
from support import STRIDED, build, filled, run, schedules, settings, slots, tokens, wide_twin
from torch import Tensor


def evictions(settings: Settings, held: int) -> int:
    """How many of the slots held leave the memory (SPEC, one step): c * ceil(overflow / c), and
    exactly the overflow when there is no compressed memory."""
    if settings.c_mem_len == 0:
        return max(0, held - settings.mem_len)
    leave = 0
    while held - leave > settings.mem_len:
        leave += settings.compression_rate
    return leave


def newest(x: Tensor, n: int) -> Tensor:
    return x[:, max(0, x.size(1) - n) :]


def each_layer_of_each_step(adapter: Adapter, settings: Settings, schedule: list[int]):
    """Run a stream; for each step and layer give its number, what was held in memory before the
    eviction, and the memories before and after."""
    model = build(adapter, settings)
    twin = wide_twin(adapter, model, settings)
    text, state = tokens(settings, 2, sum(schedule)), adapter.start(model, 2)
    for segment in text.split(schedule, dim=1):
        held = adapter.read(adapter.step(twin, segment, state).state)
        before, step = adapter.read(state), adapter.step(model, segment, state)
        after, state = adapter.read(step.state), step.state
        for i in range(settings.n_layers):
            yield model, i, held[i].mem, before[i], after[i]


@given(settings=settings(), schedule=schedules)
def test_MEM_1_memory_is_the_newest_slots_oldest_first(adapter: Adapter, settings, schedule):
    for _, _, held, before, after in each_layer_of_each_step(adapter, settings, schedule):
        leave = evictions(settings, held.size(1))
        assert torch.equal(held[:, : before.mem.size(1)], before.mem)
        assert torch.equal(after.mem, held[:, leave:])


@given(settings=settings(), schedule=schedules)
def test_MEM_2_memories_never_exceed_their_lengths(adapter: Adapter, settings, schedule):
    model = build(adapter, settings)
    for step in run(adapter, model, tokens(settings, 1, sum(schedule)), schedule):
        for mem, c_mem in adapter.read(step.state):
            assert mem.size(1) <= settings.mem_len
            assert c_mem.size(1) <= settings.c_mem_len


@given(settings=settings(vocab_size=40, compression="mean_pool"))
def test_MEM_3_every_token_is_in_one_slot_or_forgotten(adapter: Adapter, settings):
    """Tokens are told apart by their stored vectors, compressed slots by being their means."""
    schedule = [1, 5, 3, 1, 6, 2, 4, 8, 1, 1]
    model = build(adapter, settings)
    twin = wide_twin(adapter, model, settings)
    alone = torch.arange(settings.vocab_size)[:, None]
    state = adapter.step(twin, alone, adapter.start(twin, settings.vocab_size)).state
    stored = adapter.read(state)[0].mem[:, 0]  # each token's slot in the first layer
    text = torch.randperm(settings.vocab_size)[None, : sum(schedule)]
    c, fed = settings.compression_rate, 0
    for T, step in zip(schedule, run(adapter, model, text, schedule), strict=True):
        fed += T
        mem, c_mem = adapter.read(step.state)[0]
        in_mem = list(range(fed - mem.size(1), fed))
        compressed = (fed - mem.size(1)) // c  # blocks since the start, forgotten ones included
        if settings.c_mem_len > 0:
            assert compressed * c + mem.size(1) == fed
            assert c_mem.size(1) == min(compressed, settings.c_mem_len)
        torch.testing.assert_close(mem[0], stored[text[0, in_mem]], rtol=0, atol=1e-12)
        blocks = stored[text[0, : compressed * c]].unflatten(0, (compressed, c)).mean(dim=1)
        kept = blocks[compressed - c_mem.size(1) :]
        torch.testing.assert_close(c_mem[0], kept, rtol=0, atol=1e-12)


@given(settings=settings(), schedule=schedules)
def test_MEM_4_c_n_memories_become_n_slots_and_only_on_overflow(
    adapter: Adapter, settings, schedule
):
    for _, _, held, before, after in each_layer_of_each_step(adapter, settings, schedule):
        leave = evictions(settings, held.size(1))
        made = leave // settings.compression_rate if settings.c_mem_len > 0 else 0
        total = before.c_mem.size(1) + made
        assert after.c_mem.size(1) == min(total, settings.c_mem_len)
        assert after.mem.size(1) == held.size(1) - leave
    model = build(adapter, settings)
    T = max(1, settings.mem_len)
    step = adapter.step(model, tokens(settings, 1, T), adapter.start(model, 1))
    if settings.mem_len > 0:
        assert step.loss == 0


@given(settings=settings(), schedule=schedules, data=st.data())
def test_MEM_5_new_slots_are_the_layers_own_compression_of_what_left(
    adapter: Adapter, settings, schedule, data
):
    """(most_used needs the attention received: the oracle compares it.)"""
    name = data.draw(st.sampled_from([*STRIDED, "dilated_conv"]), label="compression")
    settings = settings._replace(compression=name)
    for model, i, held, before, after in each_layer_of_each_step(adapter, settings, schedule):
        old = held[:, : evictions(settings, held.size(1))]
        c_mem = before.c_mem
        if settings.c_mem_len > 0:
            new = adapter.compress(model, i, old, old.new_zeros(old.shape[:2]))
            c_mem = torch.cat([c_mem, new], dim=1)
        expected = newest(c_mem, settings.c_mem_len)
        torch.testing.assert_close(after.c_mem, expected, rtol=0, atol=1e-12)


@given(settings=settings(compression="conv", c_mem_len=3), T=st.integers(1, 6))
def test_MEM_6_slots_are_first_read_in_the_step_after_the_one_that_made_them(
    adapter: Adapter, settings, T
):
    model = build(adapter, settings)
    state = filled(adapter, model, settings)
    text, after = tokens(settings, 2, T), tokens(settings, 2, 1, seed=1)
    step = adapter.step(model, text, state)
    following = adapter.step(model, after, step.state)
    with torch.no_grad():
        for layer in adapter.compression_parameters(model):
            for parameter in layer:
                parameter.mul_(-2)
    again = adapter.step(model, text, state)
    assert torch.equal(again.logits, step.logits)
    assert not torch.equal(adapter.step(model, after, again.state).logits, following.logits)


@given(settings=settings(n_layers=3, vocab_size=30), T=st.integers(1, 4))
def test_MEM_7_layers_remember_their_own_inputs(adapter: Adapter, settings, T):
    """A layer's parameters reach the memories of the layers above it and no others; its own memory
    holds its input, in pre-norm normalised, which the oracle shows."""
    model = build(adapter, settings._replace(mem_len=max(T, 4)))
    text, start = tokens(settings, 2, T), adapter.start(model, 2)
    before = adapter.read(adapter.step(model, text, start).state)
    assert all(not torch.equal(before[0].mem, layer.mem) for layer in before[1:])
    with torch.no_grad():
        adapter.weights(model)["layers"][1]["output"].mul_(-2)
    after = adapter.read(adapter.step(model, text, start).state)
    same = [torch.equal(a.mem, b.mem) for a, b in zip(before, after, strict=True)]
    assert same == [True, True, False]


@given(settings=settings(), T=st.integers(1, 6), dtype=st.sampled_from(["float32", "float64"]))
def test_MEM_8_memories_are_not_changed_nor_carry_a_gradient(adapter: Adapter, settings, T, dtype):
    model = build(adapter, settings).to(getattr(torch, dtype)).train()
    full = slots(settings, 2, settings.mem_len, settings.c_mem_len)
    handed = [Slots(*(part.to(getattr(torch, dtype)) for part in layer)) for layer in full]
    copies = [Slots(*(part.clone() for part in layer)) for layer in handed]
    state = adapter.replace(adapter.start(model, 2), handed)
    step = adapter.step(model, tokens(settings, 2, T), state)
    (step.logits.sum() + step.loss).backward()
    for layer, copy, returned in zip(handed, copies, adapter.read(step.state), strict=True):
        for was, is_now, new in zip(copy, layer, returned, strict=True):
            assert torch.equal(was, is_now)
            assert not new.requires_grad
            assert (new.dtype, new.device) == (was.dtype, was.device)


def simulate(settings: Settings, schedule: list[int]) -> list[set[int]]:
    """For each position of the stream the tokens that its logits depend on, by following for each
    slot of each layer the set of tokens that it carries."""
    mem: list[list[set[int]]] = [[] for _ in range(settings.n_layers)]
    c_mem: list[list[set[int]]] = [[] for _ in range(settings.n_layers)]
    reached: list[set[int]] = []
    for T in schedule:
        h = [{len(reached) + t} for t in range(T)]
        for i in range(settings.n_layers):
            x, seen = h, set().union(*c_mem[i], *mem[i])
            h = [seen.union(*x[: t + 1]) for t in range(T)]
            mem[i] = mem[i] + x
            leave = evictions(settings, len(mem[i]))
            old, mem[i] = mem[i][:leave], mem[i][leave:]
            if settings.c_mem_len > 0:
                for k in range(0, leave, settings.compression_rate):
                    c_mem[i].append(set().union(*old[k : k + settings.compression_rate]))
                c_mem[i] = c_mem[i][-settings.c_mem_len :]
        reached += h
    return reached


@given(settings=settings(), schedule=schedules, data=st.data())
@hypothesis.settings(max_examples=150)
def test_MEM_9_a_token_reaches_exactly_what_the_memories_carry_it_to(
    adapter: Adapter, settings, schedule, data
):
    """Change token i in row i of a batch: logits change where, and only where, the simulation says
    (the same row of the unchanged batch is the same arithmetic: nothing else can differ)."""
    name = data.draw(st.sampled_from(["conv", "mean_pool"]), label="compression")
    settings = settings._replace(compression=name)
    model = build(adapter, settings)
    length = sum(schedule)
    text = tokens(settings, 1, length).expand(length, length)
    changed = (text + torch.eye(length, dtype=torch.int64)) % settings.vocab_size
    with torch.no_grad():
        plain, other = (
            torch.cat([step.logits for step in run(adapter, model, x, schedule)], dim=1)
            for x in (text, changed)
        )
    differs = (plain != other).any(dim=-1)  # [changed token, position]
    reached = simulate(settings, schedule)
    expected = [[i in reached[t] for t in range(length)] for i in range(length)]
    assert differs.tolist() == expected
