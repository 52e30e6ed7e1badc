"""LOSS: what the compression losses are, and whom they train."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from . import oracle
from .adapter import CHOICES, Declaration, Settings
from .implementation import Implementation, Slots, not_claimed
from .support import (
    PARAMETRIC,
    Case,
    block_of,
    cases,
    check,
    close,
    evicted,
    fit,
    holds,
    in_some_draw,
    joined,
    longer_memory,
    newest,
    overflowing,
    random_slots,
    same,
    tokens,
)

Named = dict[str, Tensor]


def training(longest: int = 5, **fixed: Any):
    """One step of at least two tokens (one slot alone would have all the attention, whatever the
    query) under which something is compressed and trained; wide enough that no ReLU of a dilated
    convolution is dead for every memory."""
    fixed = {"compression_loss": ("attention", "autoencoding"), "d_model": 24, **fixed}
    return cases((1, 1), longest, shortest=2, compression=PARAMETRIC, **fixed)


def ready(impl: Implementation, case: Case) -> tuple[nn.Module, Any, Tensor]:
    """A model in training mode, a state with full memories, and a segment to feed."""
    settings, (T,) = case
    model = impl.build(settings)
    state = overflowing(impl, model, settings, T)
    return model.train(), state, tokens(settings, 2, T)


def gradients(loss: Tensor, named: Named) -> dict[str, Tensor | None]:
    """For each parameter its gradient, None where there is none (or it was frozen)."""
    found: dict[str, Tensor | None] = dict.fromkeys(named)
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    if loss.requires_grad:
        wanted = [named[name] for name in trained]
        reached = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
        found.update(zip(trained, reached, strict=True))
    return found


def is_zero(gradient: Tensor | None) -> bool:
    return gradient is None or gradient.count_nonzero() == 0


def of_compression(impl: Implementation, model: nn.Module) -> set[str]:
    """The names of the compression parameters."""
    listed = set()
    for layer in impl.compression_parameters(model):
        listed.update(id(parameter) for parameter in layer)
    return {name for name, parameter in model.named_parameters() if id(parameter) in listed}


@check(gradients=True, case=training(), bptt=st.booleans())
def test_LOSS_1_trains_every_f_c_and_no_other_parameter(
    impl: Implementation, case: Case, bptt: bool
):
    settings = case.settings._replace(bptt=bptt and impl.declared.bptt)
    model, state, text = ready(impl, case._replace(settings=settings))
    step = impl.step(model, text, state)
    trained = of_compression(impl, model)
    holds(trained, "compression parameters", "some", "none")
    for name, gradient in gradients(step.loss, dict(model.named_parameters())).items():
        expected = "some" if name in trained else "zero or none"
        got = "zero or none" if is_zero(gradient) else "some"
        holds(got == expected, f"gradient of the compression loss on {name}", expected, got)


@check(gradients=True, case=training(), bptt=st.booleans())
def test_LOSS_1_does_not_reach_the_memories(impl: Implementation, case: Case, bptt: bool):
    settings, (T,) = case
    model = impl.build(settings._replace(bptt=bptt and impl.declared.bptt)).train()
    blocks, _ = evicted(impl.declared, settings, settings.mem_len + T)
    if not blocks:
        not_claimed("nothing is compressed")
    slots = random_slots(impl, settings, 2, settings.mem_len, settings.c_mem_len)
    inputs = {}
    for i, layer in enumerate(slots):
        for name, part in zip(Slots._fields, layer, strict=True):
            inputs[f"layer {i}'s {name}"] = part.requires_grad_()
    state = impl.replace(impl.start(model, 2), slots)
    step = impl.step(model, tokens(settings, 2, T), state)
    for name, gradient in gradients(step.loss, inputs).items():
        what = f"gradient of the compression loss on {name}"
        holds(is_zero(gradient), what, "zero or none", "some")


@check(gradients=True, case=training(longest=4))
def test_LOSS_2_leaves_the_language_model_loss_alone_in_every_step(
    impl: Implementation, case: Case
):
    lacking = language_model_gradients_that_are_missing(impl, case)
    for _ in range(2):
        if not lacking:
            return
        # A ReLU may be dead, and attention too small to see, for all tokens of one draw.
        missing = language_model_gradients_that_are_missing(impl, case)
        lacking = {key: frozen for key, frozen in lacking.items() if key in missing}
    for (name, step), frozen in lacking.items():
        cause = None
        if frozen:
            cause = "it was frozen: requires_grad is False"
        elif not is_used(impl, case, name):
            cause = "it is not used: no logits move with it"
        what = f"gradient of the language-model loss on {name} in step {step}"
        holds(False, what, "some", "zero or none", cause)


def is_used(impl: Implementation, case: Case, name: str) -> bool:
    """Whether the logits of a stream depend on a parameter, in some draw."""
    settings, (T,) = case
    count = math.ceil(settings.mem_len / T) + 3

    def differs() -> Tensor:
        model = impl.build(settings)
        text = tokens(settings, 1, count * T)
        before = impl.logits(model, text, [T] * count)
        with torch.no_grad():
            dict(model.named_parameters())[name].mul_(-1.5)
        return (impl.logits(model, text, [T] * count) != before).any().reshape(1)

    return bool(in_some_draw(torch.ones(1, dtype=torch.bool), differs))


def language_model_gradients_that_are_missing(
    impl: Implementation, case: Case
) -> dict[tuple[str, int], bool]:
    """The parameters and steps without a gradient, and whether the parameter was frozen; those that
    are there are the same with the compression loss and without."""
    settings, (T,) = case
    model = impl.build(settings).train()
    named = dict(model.named_parameters())
    trained = of_compression(impl, model)
    state = impl.start(model, 2)
    count = math.ceil(settings.mem_len / T) + 3
    text = tokens(settings, 2, count * T)
    missing = {}
    for n, segment in enumerate(text.split(T, dim=1)):
        full = all(part.size(1) > 0 for layer in impl.read(state) for part in layer)
        step = impl.step(model, segment, state)
        state = step.state
        target = segment.roll(-1, dims=1).flatten()
        loss = F.cross_entropy(step.logits.flatten(0, 1), target)
        alone = gradients(loss, named)
        joint = gradients(loss + step.loss, named)
        for name, parameter in named.items():
            what = f"gradient of the language-model loss on {name} in step {n}"
            if name in trained:
                holds(is_zero(alone[name]), what, "zero or none", "some")
            elif not is_zero(alone[name]):
                close(f"{what}, the compression loss added", joint[name], alone[name])
            elif full:  # what is there for compressed slots alone has to wait
                missing[name, n] = not parameter.requires_grad
    return missing


@check(gradients=True, case=cases((1, 1), shortest=2))
def test_LOSS_2_its_gradients_are_the_derivatives(impl: Implementation, case: Case):
    """Of one step without memory, where nothing may be held constant: along a random direction the
    gradient is the quotient of differences. First of all parameters at once."""
    if impl.dtype != torch.float64:
        not_claimed("differences need float64")
    settings, (T,) = case
    model = impl.build(settings).train()
    text = tokens(settings, 2, T)
    target = text.roll(-1, dims=1).flatten()

    def loss() -> Tensor:
        logits = impl.step(model, text, impl.start(model, 2)).logits
        return F.cross_entropy(logits.flatten(0, 1), target)

    trained = of_compression(impl, model)
    named = {name: p for name, p in model.named_parameters() if name not in trained}
    found = gradients(loss(), named)
    directions = {name: torch.randn_like(p) for name, p in named.items()}

    def derivatives(names: list[str]) -> tuple[Tensor, Tensor]:
        """Along the directions of these parameters: by the gradient, and by differences."""
        gradient = torch.zeros((), dtype=impl.dtype)
        for name in names:
            if found[name] is not None:
                gradient += (found[name] * directions[name]).sum().cpu()
        for size in (1e-6, 1e-8):  # a ReLU that turns within the one does not within the other
            steps = {named[name]: size * directions[name] for name in names}
            slope = quotient(loss, steps, size)
            if same(gradient, slope, 1e-6):
                break
        return gradient, slope

    derivative = "derivative of the language-model loss along a direction of"
    gradient, slope = derivatives(list(named))
    if same(gradient, slope, 1e-6):
        close(f"{derivative} all parameters", gradient, slope, 1e-6)
        return
    for name in named:
        gradient, slope = derivatives([name])
        close(f"{derivative} {name}", gradient, slope, 1e-6)


@torch.no_grad()
def quotient(loss: Callable[[], Tensor], steps: dict[nn.Parameter, Tensor], size: float) -> Tensor:
    """The difference of the loss a step above and a step below, over that of their places."""
    for parameter, step in steps.items():
        parameter += step
    above = loss()
    for parameter, step in steps.items():
        parameter -= 2 * step
    below = loss()
    for parameter, step in steps.items():
        parameter += step
    return (above - below) / (2 * size)


@check(
    gradients=True,
    case=training(c_mem_len=3, compression_loss=("attention", "none")),
    bptt=st.booleans(),
)
def test_LOSS_2_reaches_f_c_through_time_if_and_only_if_asked(
    impl: Implementation, case: Case, bptt: bool
):
    """The slots that a segment makes are read by the next."""
    bptt = bptt and impl.declared.bptt
    settings, (T,) = case
    model = impl.build(settings._replace(bptt=bptt)).train()
    count = math.ceil(settings.mem_len / T) + 3
    steps = impl.run(model, tokens(settings, 2, T * count), [T] * count)
    found = gradients(steps[-1].logits.square().sum(), dict(model.named_parameters()))
    expected = "some" if bptt else "none"
    for name in of_compression(impl, model):
        got = "none" if is_zero(found[name]) else "some"
        what = f"gradient of a later segment's logits on {name}, with bptt = {bptt}"
        holds(got == expected, what, expected, got)


@check(gradients=True, case=training(compression_loss="attention", compression_rate=1))
def test_LOSS_3_is_zero_for_the_identity(impl: Implementation, case: Case):
    settings, (T,) = case
    if "conv" not in impl.declared.compressions:
        not_claimed("needs a convolution to make the identity")
    settings = settings._replace(compression="conv")
    model, state, text = ready(impl, Case(settings, [T]))
    identity = torch.eye(settings.d_model)
    with torch.no_grad():
        for layer in impl.compression_parameters(model):
            for parameter in layer:
                if parameter.numel() == identity.numel():
                    parameter.copy_(identity.view(parameter.shape))
                else:
                    parameter.zero_()
    loss = impl.step(model, text, state).loss.item()
    most = impl.tolerance
    if impl.declared.loss_reduction != "norm":  # what is squared
        most = most**2
    holds(abs(loss) < most, "loss with c = 1 and f_c the identity", 0, loss)


@check(
    gradients=True,
    case=training(longest=3, n_layers=1, compression_loss="attention"),
    i=st.integers(0, 99),
)
def test_LOSS_4_depends_on_the_evicted_block_alone(impl: Implementation, case: Case, i: int):
    """One layer: in a higher one the other slots move h, and with it the loss."""
    settings, (T,) = case
    longer = settings._replace(mem_len=max(3 * settings.compression_rate, settings.mem_len))
    settings, _ = fit(impl.declared, longer, [T])
    M = settings.mem_len
    model = impl.build(settings).train()
    text = tokens(settings, 2, T)
    (slots,) = random_slots(impl, settings, 2, M, settings.c_mem_len)

    def loss(mem: Tensor, c_mem: Tensor) -> Tensor:
        state = impl.replace(impl.start(model, 2), [Slots(mem, c_mem)])
        return impl.step(model, text, state).loss.detach()

    one = loss(*slots)
    other = loss(slots.mem, slots.c_mem.flip(2))
    close("loss with other slots of compressed memory", other, one)
    i %= M
    mem = slots.mem.clone()
    mem[:, i] += torch.randn(2, settings.d_model, dtype=impl.dtype)
    other = loss(mem, slots.c_mem)
    _, leave = evicted(impl.declared, settings, M + T)
    what = f"loss once slot {i} of {M} is another, of which the oldest {leave} leave"
    if i < leave:
        holds(not torch.equal(one, other), what, "others", "the same")
    else:
        holds(torch.equal(one, other), what, one.item(), other.item())


def needed_names(impl: Implementation, settings: Settings) -> list[str]:
    """Of the weights those that the loss reads."""
    names = []
    if settings.compression_loss == "attention":
        names += ["query", "key", "value"]
        if impl.declared.storage == "raw" and settings.norm_first:
            names += ["norm1_weight", "norm1_bias"]
    if settings.compression_loss == "autoencoding":
        names += ["transposed_convolution"]
    return names


@check(gradients=True, case=training(readable=True))
def test_LOSS_5_equals_the_definition_by_loops(impl: Implementation, case: Case):
    """Of a step: the layers' losses by plain loops over what left their memories."""
    settings, (T,) = case
    model, state, text = ready(impl, case)
    layers = oracle.lists(impl.weights(model, *needed_names(impl, settings)))["layers"]
    long = longer_memory(impl, model, case)
    step = impl.step(model, text, state)
    blocks_of_layers = []
    held = joined(impl, model, settings, long, text, state, step)
    for i, slots in enumerate(held):
        blocks, _ = evicted(impl.declared, settings, slots.size(1))
        old = block_of(slots, blocks)
        unused = old.new_zeros(old.shape[:2])
        new = impl.compress(model, i, old, unused)
        blocks_of_layers.append((newest(slots, T), old, new))

    def by_loops(declared: Declaration, mistake: str = "") -> Tensor:
        squares: list[list[tuple[float, int]]] = [[], []]  # row by row, of every layer
        for weights, layer in zip(layers, blocks_of_layers, strict=True):
            for row in range(2):
                h, old, new = (part[row].tolist() for part in layer)
                found = oracle.compression_loss(declared, settings, weights, h, old, new, mistake)
                squares[row].append(found)
        return torch.tensor(oracle.reduce(declared, squares), dtype=impl.dtype)

    expected = by_loops(impl.declared)
    loss = step.loss.detach()
    tolerance = 10 * impl.tolerance
    causes = {}
    if not same(loss, expected, tolerance):
        for other, why in declared_otherwise(impl.declared):
            if other.storage == "normalised" or "norm1_weight" in layers[0]:
                causes[why] = by_loops(other)
        for mistake in oracle.MISTAKES:
            if oracle.NEEDS.get(mistake, "query") in layers[0]:
                causes[mistake] = by_loops(impl.declared, mistake)
    close("compression loss", loss, expected, tolerance, causes)


def declared_otherwise(declared: Declaration) -> Iterator[tuple[Declaration, str]]:
    """Each other way to take the loss of the same slots, and what to declare for it."""
    for reduction in CHOICES["loss_reduction"]:
        for over_layers in CHOICES["loss_over_layers"]:
            ways = {"loss_reduction": reduction, "loss_over_layers": over_layers}
            said = ", ".join(f"{name} {way!r}" for name, way in ways.items())
            yield replace(declared, **ways), f"it is that of {said}"
    if declared.storage == "normalised":
        yield (
            replace(declared, storage="raw"),
            "h and the slots are normalised (again) for the loss",
        )
    else:
        yield replace(declared, storage="normalised"), "h and the slots are compared raw"


@check(gradients=True, case=training())
def test_LOSS_6_falls_with_a_small_step_of_f_c_against_its_gradient(
    impl: Implementation, case: Case
):
    model, state, text = ready(impl, case)
    moved = []
    for layer in impl.compression_parameters(model):
        moved += layer
    holds(moved, "compression parameters", "some", "none")
    before = impl.step(model, text, state).loss
    holds(before.requires_grad, "gradient of the compression loss", "some", "none")
    found = torch.autograd.grad(before, moved, allow_unused=True, materialize_grads=True)
    squares = sum(gradient.square().sum().item() for gradient in found)
    steepness = max(math.sqrt(squares), 1e-30)
    size = 1e-5 if impl.dtype == torch.float64 else 1e-2
    with torch.no_grad():
        for parameter, gradient in zip(moved, found, strict=True):
            parameter -= size * gradient / steepness
    after = impl.step(model, text, state).loss
    fall = (before - after).item() / (size * steepness)
    holds(0.9 < fall < 1.1, "its fall, over that of a straight slope", "0.9 to 1.1", fall)


@check(gradients=True, case=cases((3, 6), compression=("most_used", "mean_pool", "max_pool")))
def test_LOSS_1_trains_nothing_where_there_is_nothing_to_train(impl: Implementation, case: Case):
    settings, schedule = case
    model = impl.build(settings).train()
    named = dict(model.named_parameters())
    listed = impl.compression_parameters(model)
    count = sum(len(layer) for layer in listed)
    holds(count == 0, f"parameters of {settings.compression}", "none", count)
    for n, step in enumerate(impl.run(model, tokens(settings, 2, sum(schedule)), schedule)):
        for name, gradient in gradients(step.loss, named).items():
            what = f"gradient of the compression loss on {name} in step {n}"
            holds(is_zero(gradient), what, "zero or none", "some")
