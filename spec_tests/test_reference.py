"""What compressive.py promises beyond the rules: generation, every combination of settings, torch's
own tools, and its parts used alone."""

import copy
import io
import itertools
import math
import numbers
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

from . import oracle
from .adapter import COMPRESSIONS, Settings
from .implementation import Slots, load
from .support import Case, cases, check, filled, random_slots, tokens

reference = load("spec_tests.adapters.reference")
api = reference.adapter.module
PLAIN = Settings()
SMALL = Settings(mem_len=5)


def make(**changes) -> nn.Module:
    return reference.build(SMALL._replace(**changes))


# ---------------------------------------------------------------------------------- generation


@check(
    share=2,
    case=cases(steps=(1, 1), longest=12, zeros=True),
    new=st.integers(0, 6),
    given_memory=st.booleans(),
)
def test_generate_feeds_every_token_once(impl, case: Case, new: int, given_memory: bool):
    """Greedy generation is the loop that everyone would write with forward."""
    settings, (T,) = case
    model = impl.build(settings)
    prompt = tokens(settings, 2, T)
    start = filled(impl, model, settings, T) if given_memory else None
    found = model.generate(prompt, new, temperature=0, memory=start)
    remembers = settings.mem_len + settings.c_mem_len > 0
    expected = prompt
    feed = prompt
    memory = start
    for _ in range(new):
        step = model(feed, memory)
        best = step.logits[:, -1:].argmax(dim=-1)
        expected = torch.cat([expected, best], dim=1)
        feed, memory = (best, step.memory) if remembers else (expected, start)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("lengths", [(1, 0), (0, 1)])
def test_generate_feeds_one_token_a_step_however_little_is_remembered(lengths):
    model = make(mem_len=lengths[0], c_mem_len=lengths[1], compression_rate=1)
    prompt = tokens(SMALL, 2, 3)
    memory = None
    expected = feed = prompt
    for _ in range(4):
        step = model(feed, memory)
        memory = step.memory
        feed = step.logits[:, -1:].argmax(dim=-1)
        expected = torch.cat([expected, feed], dim=1)
    assert torch.equal(model.generate(prompt, 4, temperature=0), expected)


def test_generate_without_memory_sees_the_whole_prompt():
    model = make(n_layers=1, mem_len=0, c_mem_len=0)
    prompt = tokens(SMALL, 1, 600)
    found = model.generate(prompt, 2, temperature=0)
    for length in (600, 601):
        best = model(found[:, :length]).logits[:, -1].argmax(dim=-1)
        assert torch.equal(found[:, length], best)


def test_generate_without_memory_keeps_one_that_it_is_given():
    model = make(n_layers=1, mem_len=0, c_mem_len=0)
    given = []
    model.register_forward_pre_hook(lambda module, args: given.append(args[1]))
    slots = torch.randn(1, 3, SMALL.d_model)
    memory = (slots,), (slots,)
    model.generate(tokens(SMALL, 1, 4), 3, memory=memory)
    assert given == [memory] * 3


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({}, [512, 512, 76, 1, 1]),
        ({"mem_len": 600}, [600, 500, 1, 1]),
        ({"mem_len": 0, "c_mem_len": 0}, [1100, 1101, 1102]),
    ],
)
def test_generate_splits_a_long_prompt(settings: dict[str, int], lengths: list[int]):
    model = make(n_layers=1, **settings)
    fed = []
    model.register_forward_pre_hook(lambda module, args: fed.append(args[0].size(1)))
    model.generate(tokens(SMALL, 1, 1100), 3)
    assert fed == lengths


def test_generate_samples_from_the_softmax_at_the_temperature():
    model = make()
    prompt = tokens(SMALL, 1, 3).expand(4000, 3)
    generator = torch.Generator().manual_seed(0)
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 3), (1.0, 1), (1.0, 100)):
        sample = model.generate(
            prompt, 1, temperature=temperature, top_k=top_k, generator=generator
        )
        logits = model(prompt[:1]).logits[0, -1]
        kept = logits.topk(min(top_k or 11, 11)).indices
        expected = torch.zeros(11)
        expected[kept] = (logits[kept] / temperature).softmax(dim=0)
        found = sample[:, -1].bincount(minlength=11) / 4000
        assert (found - expected).abs().max() < 0.03
        assert found[expected == 0].count_nonzero() == 0


@pytest.mark.parametrize("tied", [11, 5])
def test_sample_keeps_exactly_k_of_equally_likely_tokens(tied: int):
    """The likelier ones, and of the tied as many as there is room for."""
    logits = torch.zeros(1, 11)
    logits[:, tied:] = 1
    likelier = set(range(tied, 11))
    generator = torch.Generator().manual_seed(0)
    for k in (1, 3, 8, 11, 12):
        found = {int(api.sample(logits, 1.0, k, generator)) for _ in range(200)}
        assert len(found) == min(k, 11)
        assert found <= likelier or found >= likelier


def test_one_candidate_is_the_likeliest_token_even_where_bfloat16_makes_ties():
    logits = torch.randn(500, 300).clamp(max=2).to(torch.bfloat16)
    highest = logits.amax(dim=-1, keepdim=True)
    assert (logits == highest).sum() > 2000
    for temperature, top_k in ((1.0, 1), (3.0, 1), (0, None), (0, 7)):
        found = api.sample(logits, temperature, top_k, None)
        assert found.shape == (500, 1)
        assert torch.equal(logits.gather(1, found), highest)


def test_generate_repeats_itself_with_the_same_generator():
    model = make()
    prompt = tokens(SMALL, 2, 3)
    first, second, other = (
        model.generate(prompt, 20, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    same = {"generator": torch.Generator().manual_seed(0), "temperature": 1.0, "top_k": None}
    assert torch.equal(first, model.generate(prompt, 20, **same))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not first.requires_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_generate_hands_each_token_out_as_it_comes(dtype):
    model = make()
    prompt = tokens(SMALL, 2, 3).to(dtype)
    seen = []
    calls = 0

    def count(*args: object) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_hook(count)
    found = model.generate(prompt, 5, stream=lambda new: seen.append((calls, new.clone())))
    assert [call for call, _ in seen] == [1, 2, 3, 4, 5]  # before the next one is computed
    assert all(new.shape == (2, 1) and new.dtype == dtype for _, new in seen)
    assert torch.equal(torch.cat([prompt, *(new for _, new in seen)], dim=1), found)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_tokens_keep_their_dtype(dtype):
    model = make()
    prompt = tokens(SMALL, 2, 3).to(dtype)
    assert model.generate(prompt, 2).dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer of at least 0, got -1"),
        (
            {"max_new_tokens": 1, "temperature": -0.5},
            "temperature must be a number of at least 0, got -0.5",
        ),
        ({"max_new_tokens": 1, "temperature": float("nan")}, "temperature must be .*, got nan"),
        (
            {"max_new_tokens": 1, "top_k": 0},
            "top_k must be None or an integer of at least 1, got 0",
        ),
    ],
)
def test_generate_refuses_what_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        make().generate(tokens(SMALL, 1, 2), **options)


def test_generate_refuses_a_wrong_prompt():
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\]"):
        make().generate(torch.zeros(3, dtype=torch.int64), 0)


def test_generate_returns_a_tensor_of_its_own():
    prompt = tokens(SMALL, 1, 2)
    for new_tokens in (0, 1):
        made = make().generate(prompt, new_tokens)
        made += 1
        assert torch.equal(made[:, :2], prompt + 1)


# ------------------------------------------------------------------------------------ wrong input


def three(batch: int = 2, d_model: int = 8) -> list[Slots]:
    """Memories of four and three slots for each layer."""
    return random_slots(reference, PLAIN._replace(d_model=d_model), batch, 4, 3)


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
def test_wrong_tokens_are_refused(bad, error, message):
    model = reference.build(PLAIN)
    with pytest.raises(error, match=message):
        model(bad)


def one_bad(change):
    """Memories that fit, but for what `change` does to the second layer's."""

    def make() -> list[Slots]:
        first, second = three()
        return [first, change(second)]

    return make


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (
            lambda: three(batch=3),
            ValueError,
            r"mem\[0\] must .*\[2, 4, 8\], got \[3, 4, 8\]",
        ),
        (lambda: three()[:1], ValueError, "mem must have 2 layers, got 1"),
        (
            lambda: three(d_model=6),
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
def test_a_memory_that_does_not_fit_is_refused(bad, error, message):
    model = reference.build(PLAIN)
    mem, c_mem = zip(*bad(), strict=True)
    with pytest.raises(error, match=message):
        model(tokens(PLAIN, 2, 3), api.Memory(mem, c_mem))


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
        ({"compression_rate": 6, "c_mem_len": 1}, "mem_len must be at least .* = 5, got 4"),
        ({"compression": "sum"}, "compression must be one of conv, .*, got 'sum'"),
        ({"compression": []}, r"compression must be one of conv, .*, got \[\]"),
        ({"compression_loss": "l2"}, "compression_loss must be one of attention, .*, got 'l2'"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be a number in \[0, 1\), got -0.1"),
        ({"dropout": "0.1"}, r"dropout must be a number in \[0, 1\), got '0.1'"),
        ({"norm_first": 1}, "norm_first must be True or False, got 1"),
        ({"bptt": None}, "bptt must be True or False, got None"),
    ],
)
def test_settings_that_cannot_work_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        reference.adapter.build(PLAIN._replace(**bad))


@pytest.mark.parametrize("fine", [{"compression_rate": 5}, {"compression_rate": 9, "c_mem_len": 0}])
def test_settings_at_the_edge_work(fine):
    settings = PLAIN._replace(**fine)
    model = reference.build(settings)
    assert reference.run(model, tokens(settings, 1, 20), [3, 8, 9])[2].logits.isfinite().all()


# ---------------------------------------------------------------------- every setting, every tool


@pytest.mark.elsewhere
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_every_combination_trains(name):
    choices = ("attention", "autoencoding", "none"), (True, False), (True, False), (0.0, 0.1)
    for loss, norm_first, bptt, dropout in itertools.product(*choices):
        torch.manual_seed(0)
        model = reference.adapter.build(
            SMALL._replace(
                compression=name,
                compression_loss=loss,
                norm_first=norm_first,
                bptt=bptt,
                dropout=dropout,
            )
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.04)
        text = tokens(SMALL, 2, 16)
        losses = []
        for _ in range(4):
            total = 0.0
            memory = None
            for segment in text.split(8, dim=1):
                step = model(segment, memory)
                memory = step.memory
                loss = F.cross_entropy(step.logits[:, :-1].mT, segment[:, 1:])
                total = total + loss + step.compression_loss
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total.item())
        assert losses[-1] < 0.9 * losses[0]


def test_dropout_drops_in_training_alone():
    model = make(dropout=0.5)
    text = tokens(SMALL, 2, 6)
    assert torch.equal(model(text).logits, model(text).logits)
    model.train()
    assert not torch.equal(model(text).logits, model(text).logits)


@pytest.mark.parametrize("kind", ["RelativeMultiHeadAttention", "FasterAttention"])
@pytest.mark.parametrize("queries", [3, 5])  # fewer than a head is wide, and more
@pytest.mark.parametrize("dropout", [{}, {"dropout": 0.5}])
def test_attention_weights_drop_out_if_asked(kind: str, queries: int, dropout: dict[str, float]):
    attention = getattr(api, kind)(8, 2, **dropout)
    x = torch.randn(2, queries, 8)
    positions = reference.adapter.sinusoid(queries, 8)
    inputs = x, x[:, :0], positions
    outputs = [attention(*inputs, need_weights=True) for _ in range(2)]
    assert torch.equal(outputs[0][1], outputs[1][1])  # the weights handed out are whole
    drawn = [attention(*inputs)[0] for _ in range(2)]
    attention.eval()
    whole = attention(*inputs)[0]
    assert torch.equal(attention(*inputs)[0], whole)
    assert dropout or torch.equal(drawn[0], whole)
    assert not dropout or not torch.equal(outputs[0][0], outputs[1][0])
    assert not dropout or not torch.equal(drawn[0], drawn[1])


# ------------------------------------------------------- what is there for speed changes nothing


@pytest.fixture
def heads_at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """With how many heads the equation was called, each time."""
    heads = []
    equation = api.relative_attention

    def noted(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
        heads.append(len(q))
        return equation(q, *others)

    monkeypatch.setattr(api, "relative_attention", noted)
    return heads


def attentions(d_model: int, n_heads: int, **settings: float) -> tuple[nn.Module, nn.Module]:
    """The plain attention and the faster one, with the same random parameters."""
    plain = api.RelativeMultiHeadAttention(d_model, n_heads, **settings)
    faster = api.FasterAttention(d_model, n_heads, **settings)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.5)
    faster.load_state_dict(plain.state_dict())
    return plain, faster


def results(attention: nn.Module, x: Tensor, past: Tensor, **options: bool) -> list[Tensor]:
    """An attention's output, from a seed of its own, and its gradients."""
    S = past.size(1) + x.size(1)
    positions = api.sinusoid(torch.arange(S - 1.0, -1, -1), x.size(2))
    torch.manual_seed(7)
    output, weights = attention(x, past, positions, **options)
    assert (weights is not None) == bool(options)
    learned = [x, past, *attention.parameters()]
    return [output, *torch.autograd.grad(output.square().sum(), learned)]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slots", [0, 3, 7])
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_faster_attention_is_the_plain_one(
    dropout: float, batch: int, slots: int, heads_at_once: list[int]
):
    """For every number of queries below a head's width of 4, for that, and for more."""
    plain, faster = attentions(16, 4, dropout=dropout)
    for queries in (1, 2, 3, 4, 9):
        x = torch.randn(batch, queries, 16, requires_grad=True)
        past = torch.randn(batch, slots, 16, requires_grad=True)
        expected = results(plain, x, past)
        heads_at_once.clear()
        close(results(faster, x, past), expected)
        assert heads_at_once == ([] if queries < 4 else [4])  # the shortcut has its own equation
        close(results(faster, x, past, need_weights=True), expected)
        assert heads_at_once[-1] == 4


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("room", "groups"), [(0, [1] * 4), (1, [1] * 4), (2, [2, 2]), (3, [3, 1])])
def test_heads_taken_in_groups_are_those_taken_at_once(
    room: int, groups: list[int], batch: int, heads_at_once: list[int]
):
    plain, faster = attentions(16, 4)
    x = torch.randn(batch, 5, 16, requires_grad=True)
    past = torch.randn(batch, 5, 16, requires_grad=True)
    expected = results(plain, x, past)
    heads_at_once.clear()
    faster.SCORES_AT_ONCE = room * batch * 5 * 10 + 9  # the scores of so many heads, and a rest
    close(results(faster, x, past), expected)
    assert heads_at_once == groups


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        linear = copy.deepcopy(self.base)
        with torch.no_grad():
            linear.weight += self.up.weight @ self.down.weight
        return linear


def replace_forward(layer: nn.Linear) -> None:
    forward = layer.forward
    layer.forward = lambda x: 1.5 * forward(x)


def stretch_by_parametrisation(layer: nn.Linear) -> None:
    weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(1.5)


class Stretching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


def of_a_subclass(layer: nn.Linear) -> nn.Linear:
    linear = Stretching(layer.in_features, layer.out_features, bias=False)
    linear.weight = layer.weight
    return linear


class Stretched(Tensor):
    """A weight with a product of its own, as those of quantised or sharded layers."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not F.linear:
            return super().__torch_function__(func, types, args, kwargs)
        x, weight, bias = args
        return 1.5 * func(x, weight.as_subclass(Tensor), bias)


def stretch_weight(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Stretched))


def with_bias(layer: nn.Linear) -> nn.Linear:
    biased = nn.Linear(layer.in_features, layer.out_features)
    biased.weight = layer.weight
    return biased


def stretch_output(layer: nn.Linear, args: object, output: Tensor) -> Tensor:
    return 1.5 * output


def stretch_input(layer: nn.Linear, args: tuple[Tensor]) -> tuple[Tensor]:
    return (1.5 * args[0],)


def count(layer: nn.Linear, *gradients: object) -> None:
    layer.backwards = getattr(layer, "backwards", 0) + 1


# What makes a layer more than its weight, in place or by another layer in its place.
CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "an adapter": Adapted,
    "a forward hook": lambda layer: layer.register_forward_hook(stretch_output),
    "a forward pre-hook": lambda layer: layer.register_forward_pre_hook(stretch_input),
    "a backward hook": lambda layer: layer.register_full_backward_hook(count),
    "a backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(count),
    "a parametrisation": stretch_by_parametrisation,
    "a forward of its own": replace_forward,
    "a class of its own": of_a_subclass,
    "a weight of another kind": stretch_weight,
    "a bias": with_bias,
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that were called. No hook tells: hooks are among what is tested."""
    modules = []
    call = nn.Module.__call__

    def noted(module: nn.Module, *args: object, **options: object) -> object:
        modules.append(module)
        return call(module, *args, **options)

    monkeypatch.setattr(nn.Module, "__call__", noted)
    return modules


FEW = {"d_model": 24, "mem_len": 40}  # a head is 12 wide: the 8 tokens of a segment are few


def split_logits(model: nn.Module, text: Tensor) -> Tensor:
    """Of five segments of 8 tokens, none of which the memory forgets."""
    memory = None
    logits = []
    for segment in text.split(8, dim=1):
        step = model(segment, memory)
        memory = step.memory
        logits.append(step.logits)
    return torch.cat(logits, dim=1)


def test_the_shortcut_calls_no_layer_for_the_slots(called: list[nn.Module]):
    model = make(**FEW)
    text = tokens(SMALL, 2, 40)
    layers = [getattr(x.attention, name) for x in model.layers for name in ("key_value", "query")]
    whole = model(text).logits
    assert all(layer in called for layer in layers)
    called.clear()
    torch.testing.assert_close(split_logits(model, text), whole, rtol=0, atol=1e-10)
    assert [layer in called for layer in layers] == [False, True] * 2


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # memories need no gradient
@pytest.mark.parametrize("name", ["key_value", "relative_key"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_shortcut_steps_aside_for_a_layer_that_is_more_than_its_weight(
    change: str, name: str, called: list[nn.Module]
):
    model = make(**FEW)
    text = tokens(SMALL, 2, 40)
    attention = model.layers[1].attention
    before = model(text).logits
    other = CHANGES[change](getattr(attention, name))
    if isinstance(other, nn.Module):
        setattr(attention, name, other)
    layer = getattr(attention, name)
    called.clear()
    whole = model(text).logits
    in_one_segment = called.count(layer)
    assert in_one_segment > 0
    called.clear()
    split = split_logits(model, text)
    assert called.count(layer) == 5 * in_one_segment
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-10)
    if "backward" in change:
        split.square().sum().backward()
        assert layer.backwards >= 5
    elif (change, name) != ("a bias", "relative_key"):  # which adds the same to all of a query
        assert (whole - before).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_the_shortcut_steps_aside_for_quantised_layers(called: list[nn.Module]):
    """What they read is rounded as well, by its own range: a text's in one segment is another than
    in five, up to the error of 8 bits, but the plain attention's is the same."""
    model = make(**FEW).float()
    text = tokens(SMALL, 2, 40)
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    whole = model(text).logits
    split = split_logits(model, text)
    for layer in model.layers:
        for linear in (layer.attention.key_value, layer.attention.relative_key):
            assert type(linear) is not nn.Linear and called.count(linear) >= 6
        layer.attention.__class__ = api.RelativeMultiHeadAttention
    assert torch.equal(split_logits(model, text), split)
    assert (split - whole).std() < 0.1 * whole.std()


def test_the_compression_loss_of_an_adapted_model_is_that_of_the_merged_one():
    model = make(n_layers=2)
    for layer in model.layers:
        layer.attention.query = Adapted(layer.attention.query)
        layer.attention.key_value = Adapted(layer.attention.key_value)
    merged = copy.deepcopy(model)
    for layer in merged.layers:
        layer.attention.query = layer.attention.query.merged()
        layer.attention.key_value = layer.attention.key_value.merged()
    memory = other = None
    for segment in tokens(SMALL, 2, 24).split(6, dim=1):
        step = model(segment, memory)
        same = merged(segment, other)
        close([step.compression_losses, step.logits], [same.compression_losses, same.logits])
        memory = step.memory
        other = same.memory
    assert (step.compression_losses > 0).all()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(step.compression_loss, parameters, allow_unused=True)
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        assert parameter.requires_grad
        assert (gradient is not None) == ("compress" in name), name


# --------------------------------------------------------------- what a step hands out, and tools


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n_layers": 3, "norm_first": False},
        {"compression_loss": "autoencoding", "bptt": True},
        {"compression": "most_used"},
    ],
)
def test_losses_and_weights_of_a_step_are_those_of_its_layers(more: dict):
    model = make(**more)
    memory = None
    for segment in tokens(SMALL, 2, 24).split(6, dim=1):
        step = model(segment, memory, need_weights=True)
        before = model.initial_memory(2) if memory is None else memory
        S = before.c_mem[0].size(1) + before.mem[0].size(1) + 6
        positions = api.sinusoid(torch.arange(S - 1.0, -1, -1), 8)
        h = model.embedding(segment)
        outputs = []
        for layer, mem, c_mem in zip(model.layers, *before, strict=True):
            outputs.append(layer(h, mem, c_mem, positions, need_weights=True))
            h = outputs[-1].h
        alone = torch.stack([output.compression_loss for output in outputs])
        assert torch.equal(step.compression_losses, alone)
        assert torch.equal(step.compression_loss, alone.mean())
        weights = [output.attention_weights for output in outputs]
        assert all(map(torch.equal, step.attention_weights, weights))
        assert all(map(torch.equal, step.memory.mem, [output.mem for output in outputs]))
        assert all(map(torch.equal, step.memory.c_mem, [output.c_mem for output in outputs]))
        assert torch.equal(step.logits, model.logits(model.norm(h)))
        assert set(model(segment, memory).attention_weights) == {None}
        memory = step.memory
    assert len(set(alone.tolist())) == (1 if "most_used" in more.values() else len(model.layers))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("length", [3, 6])  # fewer tokens than a head is wide, and more
def test_attention_weights_are_those_of_the_loops(length: int, recompute: bool):
    model = make()
    model.config = replace(model.config, recompute=recompute)
    named = oracle.lists(reference.weights(model))
    memory = model(tokens(SMALL, 2, 16)).memory  # of 3 and 4 slots
    text = tokens(SMALL, 2, length)
    step = model(text, memory, need_weights=True)
    without = model(text, memory)
    assert without.attention_weights == (None, None)
    close([step.logits, *step.memory.mem], [without.logits, *without.memory.mem])
    for row in range(2):
        slots = [[part[row].tolist() for part in layers] for layers in memory]
        loops = oracle.step(reference.declared, SMALL, named, text[row].tolist(), *slots)
        for weights, expected in zip(step.attention_weights, loops.attention, strict=True):
            assert weights.shape == (2, 2, length, 3 + 4 + length)
            for t in range(length):
                seen = 3 + 4 + t + 1
                found = weights[row, :, t]
                close([found[:, :seen]], [torch.tensor([head[t] for head in expected])])
                assert not found[:, seen:].any()
                close([found.sum(dim=1)], [torch.ones(2)])


@pytest.mark.parametrize("compression_loss", ["attention", "autoencoding"])
def test_a_loss_that_is_not_needed_changes_nothing_else(compression_loss: str):
    model = make(compression_loss=compression_loss)
    text = torch.randint(5, (2, 24))
    memory = None
    for segment in text.split(6, dim=1):
        with_loss = model(segment, memory)
        without = model(segment, memory, need_loss=False)
        memory = with_loss.memory
        assert torch.equal(with_loss.logits, without.logits) and without.compression_loss == 0
        for one, other in zip(memory, without.memory, strict=True):
            assert all(map(torch.equal, one, other))
    assert with_loss.compression_loss > 0


@pytest.mark.parametrize("more", [{}, {"bptt": True, "dropout": 0.2}, {"compression": "most_used"}])
def test_recomputing_changes_nothing_but_what_is_kept(more: dict):
    text = torch.randint(5, (2, 25))
    kept = {}

    def train(recompute: bool) -> list:
        torch.manual_seed(3)
        model = make(**more).train()
        memory = None
        total = 0
        model.config = replace(model.config, recompute=recompute)
        saved = kept[recompute] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            for at in range(0, 24, 6):
                step = model(text[:, at : at + 6], memory)
                memory = step.memory
                targets = text[:, at + 1 : at + 7]
                total = total + step.compression_loss + F.cross_entropy(step.logits.mT, targets)
        total.backward()
        found = [total, *memory.mem, *memory.c_mem, *(p.grad for p in model.parameters())]
        return [x for x in found if x is not None]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))
    kept = {recompute: sum(x.numel() for x in saved) for recompute, saved in kept.items()}
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_other_dtypes_follow_float64(name, dtype):
    model = make(compression=name, compression_loss="autoencoding")
    model.requires_grad_(False)
    text = tokens(SMALL, 2, 30)
    expected = reference.run(model, text, [7, 8, 15])
    low = copy.deepcopy(model).to(dtype)
    found = reference.run(low, text, [7, 8, 15])
    bound = 0.3 if dtype == torch.bfloat16 else 1e-4
    for step, exact in zip(found, expected, strict=True):
        assert step.logits.dtype == step.loss.dtype == dtype
        error = (step.logits.double() - exact.logits).std() / exact.logits.std()
        assert error < bound
        for layer in reference.read(step.state):
            assert layer.mem.dtype == layer.c_mem.dtype == dtype


def test_autocast_keeps_memories_in_the_parameters_dtype():
    model = make().float().train()
    text = tokens(SMALL, 2, 24)
    memory = None
    for segment in text.split(8, dim=1):
        with torch.autocast("cpu", torch.bfloat16):
            step = model(segment, memory)
        memory = step.memory
        assert step.logits.dtype == torch.bfloat16
        (F.cross_entropy(step.logits.float().mT, segment) + step.compression_loss).backward()
        for layer in reference.read(memory):
            assert layer.mem.dtype == layer.c_mem.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_deepcopy_and_state_dict_after_a_step():
    model = make()
    text = tokens(SMALL, 2, 16)
    first = model(text[:, :8])
    (first.logits.sum() + first.compression_loss).backward()
    for other in (copy.deepcopy(model), make(n_layers=2)):
        other.load_state_dict(model.state_dict())
        step = other(text[:, 8:], first.memory)
        assert torch.equal(step.logits, model(text[:, 8:], first.memory).logits)


@pytest.mark.elsewhere
@pytest.mark.parametrize(("name", "starts"), [("conv", True), ("most_used", False)])
def test_torch_compile_changes_nothing(name: str, starts: bool):
    """Of a first step, which begins without memory, and of one with memories that are full."""
    model = make(n_layers=1, mem_len=3, compression=name).train()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    memory = None if starts else model(tokens(SMALL, 2, 8)).memory
    text = tokens(SMALL, 2, 8)
    step = model(text, memory)
    same = compiled(text, memory)
    gradients = []
    for network, output in ((model, step), (compiled, same)):
        (output.logits.square().sum() + output.compression_loss).backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    expected = [step.logits, step.compression_loss]
    found = [same.logits, same.compression_loss]
    for memory, other in zip(step.memory, same.memory, strict=True):
        expected += memory
        found += other
    for one, other in zip(found + gradients[1], expected + gradients[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_step_never_waits_for_the_device(name):
    """On the meta device there are shapes and no values: whoever asks for one raises."""
    model = make(n_layers=1, compression=name).to("meta")
    memory = None
    for _ in range(2):  # both make slots, and the second reads some
        step = model(torch.zeros(2, 9, dtype=torch.int64, device="meta"), memory)
        (step.logits.sum() + step.compression_loss).backward()
        memory = step.memory
    assert step.logits.shape == (2, 9, 11) and memory.c_mem[0].size(1) == 3


# ------------------------------------------------------------------------------- parts used alone


def test_a_memory_of_bptt_is_detached_by_its_own_method():
    model = make(bptt=True)
    memory = reference.run(model, tokens(SMALL, 2, 16), [8, 8])[1].state
    assert all(slots.requires_grad for layers in memory for slots in layers)
    detached = memory.detach()
    for layers, others in zip(memory, detached, strict=True):
        for slots, other in zip(layers, others, strict=True):
            assert torch.equal(slots, other) and not other.requires_grad


def test_a_longer_memory_than_the_settings_name_shrinks_at_once():
    model = make(mem_len=3, c_mem_len=2)
    full = [Slots(torch.randn(1, 9, 8), torch.randn(1, 9, 8)) for _ in range(2)]
    step = reference.step(model, tokens(SMALL, 1, 1), reference.replace(None, full))
    for before, after in zip(full, reference.read(step.state), strict=True):
        assert (after.mem.size(1), after.c_mem.size(1)) == (2, 2)
        assert torch.equal(after.mem[:, :1], before.mem[:, -1:])


def test_update_memory_shows_the_example_of_its_docstring():
    letters = [
        torch.tensor([[[float(ord(x))]] for x in word]).view(1, -1, 1)
        for word in ("cdef", "a", "ghi")
    ]
    pool = api.MeanPoolCompression(1, 2)
    lengths = {"mem_len": 4, "c_mem_len": 9, "compression_rate": 2}
    update = api.update_memory(*letters, pool, api.Config(**lengths))
    assert [chr(int(x)) for x in update.mem.flatten()] == ["g", "h", "i"]
    assert [chr(int(x)) for x in update.old.flatten()] == ["c", "d", "e", "f"]
    assert update.compressed.flatten().tolist() == [ord("c") + 0.5, ord("e") + 0.5]
    assert update.c_mem.flatten().tolist() == [ord("a"), ord("c") + 0.5, ord("e") + 0.5]
    update = api.update_memory(*letters, pool, api.Config(**lengths | {"c_mem_len": 0}))
    assert [chr(int(x)) for x in update.mem.flatten()] == ["f", "g", "h", "i"]
    assert all(part.size(1) == 0 for part in update[1:])


def test_usage_is_the_mean_attention_of_those_that_saw_a_slot():
    weights = torch.ones(2, 3, 4, 6).tril(2) * torch.tensor([1.0, 2.0, 6.0])[:, None, None]
    assert torch.equal(api.MostUsedCompression.usage(weights, 5), torch.full((2, 5), 3.0))


def test_most_used_asks_for_attention_only_where_memories_leave(monkeypatch):
    """Attention that returns its weights takes no shortcut."""
    model = make(compression="most_used", mem_len=4)
    asked = []

    def forward(self, *args: object, original=api.FasterAttention.forward):
        asked.append(args[-1])
        return original(self, *args)

    monkeypatch.setattr(api.FasterAttention, "forward", forward)
    memory = None
    for length in (3, 1, 1):
        memory = model(tokens(SMALL, 2, length), memory).memory
    layers = len(model.layers)
    assert asked == 2 * layers * [False] + layers * [True]


def test_parts_refuse_what_does_not_fit():
    conv = api.Conv1dCompression(8, 3)
    used = api.MostUsedCompression(8, 3)
    for shape in ([2, 7, 8], [2, 6, 7], [6, 8]):
        with pytest.raises(ValueError, match=r"old must be \[B, a multiple of 3, 8\], got"):
            conv(torch.zeros(shape))
    for shape in ([2, 5], [3, 6], [2, 6, 1]):
        with pytest.raises(ValueError, match=r"usage must be \[2, 6 or more\], got"):
            used(torch.zeros(2, 6, 8), torch.zeros(shape))
    model = make()
    text = tokens(SMALL, 2, 3)
    mem, c_mem = model(text).memory
    for memory in ([mem, c_mem, c_mem], (mem,), mem[0]):
        with pytest.raises(TypeError, match=r"memory must be a Memory\(mem, c_mem\) or None, got"):
            model(text, memory)
    with pytest.raises(FrozenInstanceError):
        model.config.mem_len = 3


def test_parameter_groups_part_the_model_from_its_compression_functions():
    model = make(compression_loss="autoencoding")
    language_model, compression = ({id(p) for p in group} for group in model.parameter_groups())
    for name, parameter in model.named_parameters():
        compresses = "compress" in name  # compress.conv, decompress
        assert (id(parameter) in compression) == compresses
        assert (id(parameter) in language_model) != compresses


def test_there_is_no_loss_where_nothing_is_trained():
    for settings in [{"compression": x} for x in COMPRESSIONS[2:]] + [{"c_mem_len": 0}]:
        for step in reference.run(make(**settings).train(), tokens(SMALL, 2, 20), [9, 11]):
            assert step.loss == 0 and not step.loss.requires_grad


def test_losses_alone_train_the_compressed_slots_alone():
    attention = api.RelativeMultiHeadAttention(8, 2).double()
    decompress = torch.nn.Linear(8, 16, bias=False).double()
    h, old, new = (torch.randn(2, n, 8, requires_grad=True) for n in (3, 4, 2))
    api.attention_reconstruction_loss(attention, h, old, new).backward()
    assert h.grad is None and old.grad is None and new.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in attention.parameters())
    assert api.attention_reconstruction_loss(attention, h, old[:, :1], new[:, :1]) > 0
    api.autoencoding_loss(decompress, old, new).backward()
    assert old.grad is None and decompress.weight.grad.abs().sum() > 0


def filled_memory(model: api.CompressiveTransformer) -> api.Memory:
    return model(tokens(SMALL, 2, 40)).memory


def test_a_memory_is_saved_and_loaded_by_the_defaults_of_torch():
    memory = filled_memory(make())
    file = io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    loaded = torch.load(file)
    assert type(loaded) is api.Memory
    for one, other in zip(sum(memory, ()), sum(loaded, ()), strict=True):
        assert torch.equal(one, other)


def test_a_memory_owns_its_storage():
    for slots in sum(filled_memory(make()), ()):
        assert slots.untyped_storage().nbytes() == slots.nbytes


def test_the_rows_of_a_memory_can_be_chosen():
    model = make()
    memory = filled_memory(model)
    swapped = memory.map(lambda slots: slots[[1, 0, 1]])
    assert type(swapped) is api.Memory
    text = tokens(SMALL, 3, 5)
    logits = model(text, swapped).logits
    same = model(text[[1, 0]], memory).logits
    assert torch.allclose(logits[[1, 0]], same)


def test_a_memory_may_be_of_lists():
    model = make()
    memory = filled_memory(model)
    text = tokens(SMALL, 2, 5)
    as_lists = [list(layers) for layers in memory]
    assert torch.equal(model(text, as_lists).logits, model(text, memory).logits)


def test_a_memory_keeps_its_dtype_where_autocast_gives_another():
    slots = torch.zeros(1, 3, 8, dtype=torch.bfloat16)
    new = torch.ones(1, 6, 8)
    config = api.Config(mem_len=4, c_mem_len=2, compression_rate=2)
    update = api.update_memory(slots, slots, new, api.MeanPoolCompression(8, 2), config)
    assert update.mem.dtype == update.c_mem.dtype == torch.bfloat16


class Three:
    """An integer that is not Python's, as NumPy's are."""

    def __int__(self) -> int:
        return 3

    def __ge__(self, other: int) -> bool:
        return 3 >= other


numbers.Integral.register(Three)


class Text(str):
    """A string that is not Python's, as NumPy's are."""


def test_settings_may_be_numbers_and_strings_of_other_kinds():
    other = Text("max_pool")
    config = api.Config(
        n_layers=Three(), c_mem_len=Three(), dropout=Fraction(1, 4), compression=other
    )
    assert type(config.n_layers) is type(config.c_mem_len) is int
    assert type(config.compression) is str
    assert config == api.Config(n_layers=3, c_mem_len=3, dropout=0.25, compression="max_pool")


def test_a_temperature_may_be_a_number_of_another_kind():
    model = make().eval()
    prompt = tokens(SMALL, 2, 3)
    written = []
    for temperature in (0.5, Fraction(1, 2)):
        generator = torch.Generator().manual_seed(0)
        text = model.generate(prompt, 9, temperature=temperature, generator=generator)
        written.append(text)
    assert torch.equal(*written)


def test_the_loss_trains_f_c_alone_where_a_layer_is_wrapped_too():
    model = make()
    wrapped = copy.deepcopy(model)
    for layer in wrapped.layers:
        layer.attention.key_value.register_forward_hook(lambda *args: None)
    text = tokens(SMALL, 2, 8)
    for one in (model, wrapped):
        one(text).compression_loss.backward()
    of_compression = {id(p) for p in wrapped.parameter_groups()[1]}
    for expected, found in zip(model.parameters(), wrapped.parameters(), strict=True):
        if id(found) in of_compression:
            close([found.grad], [expected.grad])
        else:
            assert found.grad is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_forward_mode_sees_what_the_loss_holds_constant_as_constant():
    model = make()
    text = tokens(SMALL, 2, 8)
    parameters = dict(model.named_parameters())
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (text,)).compression_loss

    _, found = torch.func.jvp(loss, (parameters,), (tangents,))
    gradients = torch.func.grad(loss)(parameters)
    expected = sum((gradients[name] * tangents[name]).sum() for name in parameters)
    close([found], [expected])


def test_a_frozen_weight_of_its_own_kind_is_called_as_it_is():
    """As quantised ones are, which need what they have beside their numbers."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.weight.scale)

    model = make()
    text = tokens(SMALL, 2, 8)
    expected = model(text).compression_losses
    for layer in model.layers:
        weight = layer.attention.key_value.weight
        scaled = Scaled(weight.size(1), weight.size(0), bias=False)
        scaled.weight = nn.Parameter(weight.detach() / 2, requires_grad=False)
        scaled.weight.scale = 2
        layer.attention.key_value = scaled
    found = model(text).compression_losses
    assert (found > 0).all()
    close([found], [expected])


@pytest.mark.parametrize("wrapped", [False, True])
def test_no_parameter_is_exchanged_while_another_thread_may_read_it(monkeypatch, wrapped: bool):
    """A server runs one model in several threads. What the loss holds constant is no other tensor
    in the module: two threads would restore each other's. (With a wrapped layer: no gradients.)"""
    model = make()
    if wrapped:
        for layer in model.layers:
            layer.attention.key_value.register_forward_hook(lambda *args: None)
    calls = 0

    def linear(*args: object, original=torch.nn.functional.linear) -> torch.Tensor:
        nonlocal calls
        calls += 1
        assert all(p.requires_grad for p in model.parameters())
        return original(*args)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    with torch.set_grad_enabled(not wrapped):
        losses = model(tokens(SMALL, 2, 8)).compression_losses
    assert calls > 0 and (losses > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": None}, "max_new_tokens must be an integer of at least 0, got None"),
        ({"max_new_tokens": 1, "top_k": 2.0}, "top_k must be None or an integer .*, got 2.0"),
        ({"max_new_tokens": 1, "temperature": "hot"}, "temperature must be a number .*, got 'hot'"),
        ({"max_new_tokens": 1, "temperature": "1"}, "temperature must be a number .*, got '1'"),
        ({"max_new_tokens": 1, "temperature": math.nan}, "temperature must be a .*, got nan"),
    ],
)
def test_generate_names_an_argument_of_the_wrong_kind(options, message):
    with pytest.raises(ValueError, match=message):
        make().generate(tokens(SMALL, 1, 3), **options)


def test_what_is_no_tensor_is_refused():
    model = make()
    for bad in ([[1, 2]], None, 3):
        with pytest.raises(TypeError, match=f"tokens must be a tensor, got {type(bad)}"):
            model(bad)
    with pytest.raises(TypeError, match=r"memory.mem\[0\] must be a tensor, got"):
        model(tokens(SMALL, 1, 2), api.Memory((None, None), (None, None)))
    for bad in (None, 1, torch.tensor(1.0)):
        with pytest.raises(TypeError, match=r"memory.c_mem must be a tuple of tensors, got"):
            model(tokens(SMALL, 1, 2), (model.initial_memory(1).mem, bad))


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 1e-46, 5e-324])
def test_the_limit_of_temperature_is_greedy(temperature):
    model = make().eval()
    prompt = tokens(SMALL, 2, 3)
    greedy = model.generate(prompt, 20, temperature=0)
    assert torch.equal(model.generate(prompt, 20, temperature=temperature), greedy)


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_no_text(temperature):
    model = make()
    with torch.no_grad():
        model.logits.bias[1] = math.nan
    with pytest.raises(ValueError, match="the logits are not finite"):
        model.generate(tokens(SMALL, 1, 3), 1, temperature=temperature)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {}, {"top_k": 5}, {"temperature": math.inf}]
)
def test_a_token_can_be_ruled_out(settings: dict[str, float]):
    model = make()
    with torch.no_grad():
        model.logits.bias[1:] = -math.inf
    found = model.generate(tokens(SMALL, 2, 3), 4, **settings)
    assert (found[:, 3:] == 0).all()


def test_generate_warns_where_dropout_would_change_the_text():
    prompt = tokens(SMALL, 1, 3)
    model = make(dropout=0.5)
    with pytest.warns(UserWarning, match="call eval") as warned:
        model.train().generate(prompt, 1)
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval().generate(prompt, 1)
        make().train().generate(prompt, 1)


def test_gradients_of_each_row_come_by_vmap():
    model = make()
    text = tokens(SMALL, 3, 5)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict, row: torch.Tensor) -> torch.Tensor:
        output = functional_call(model, parameters, (row[None],))
        return F.cross_entropy(output.logits[0, :-1], row[1:])

    of_rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, text)
    alone = torch.func.grad(loss)(parameters, text[1])
    for name in parameters:
        assert torch.allclose(of_rows[name][1], alone[name], atol=1e-6)


def test_shapes_can_be_had_from_fake_tensors():
    with FakeTensorMode():
        model = api.CompressiveTransformer(api.Config(vocab_size=9))
        output = model(torch.zeros(2, 100, dtype=torch.int64))
    assert output.logits.shape == (2, 100, 9)
    assert output.memory.mem[0].shape == (2, 64, 128)


# By hand: torch's own would take seconds to be imported, and to import what the file needs not.
OPTIMIZER = """
class optimizer:
    def step():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
    def zero_grad():
        model.zero_grad()
""".splitlines()


@pytest.mark.elsewhere
def test_the_file_trains_alone_in_an_empty_folder():
    """With the loop that its docstring shows."""
    lines = api.__doc__.splitlines()
    first = next(i for i, line in enumerate(lines) if "model = CompressiveTransformer" in line)
    loop = [line[4:] for line in lines[first:] if line.startswith("    ")]
    loop = loop[: next(i for i, line in enumerate(loop) if "zero_grad" in line) + 1]
    script = "\n".join(
        [
            "import torch, torch.nn.functional as F",
            "from torch import nn",
            "from compressive import CompressiveTransformer, Config",
            "segments = [torch.randint(256, (2, 2, 100)).unbind() for _ in range(3)]",
            loop[0],
            *OPTIMIZER,
            *loop[1:],
            "assert memory.c_mem[0].size(1) > 0 and output.compression_loss > 0",
        ]
    )
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.append('.')\n{script}"]
    with TemporaryDirectory() as folder:
        shutil.copy(api.__file__, folder)
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
