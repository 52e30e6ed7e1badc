"""CMP: the compression functions."""

from collections.abc import Iterator

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from . import oracle
from .adapter import COMPRESSIONS, OTHER, Settings
from .implementation import Implementation
from .support import PARAMETRIC, STRIDED, Case, cases, check, close, holds, in_some_draw

ONE_STEP = (1, 1)


def block(impl: Implementation, settings: Settings, n: int) -> tuple[Tensor, Tensor]:
    """Memories to compress, `[2, c*n, D]`, and the attention that each received."""
    length = settings.compression_rate * n
    old = torch.randn(2, length, settings.d_model, dtype=impl.dtype)
    return old, torch.rand(2, length, dtype=impl.dtype)


def each(
    impl: Implementation, case: Case, names: tuple[str, ...]
) -> Iterator[tuple[str, nn.Module]]:
    """Of these functions those that there are, each with a model."""
    for name in names:
        if name in impl.declared.compressions:
            yield name, impl.build(case.settings._replace(compression=name))


@check(case=cases(steps=ONE_STEP), n=st.integers(0, 4))
def test_CMP_1_c_n_memories_become_n_slots(impl: Implementation, case: Case, n: int):
    if not impl.declared.compress_nothing:
        n = max(n, 1)
    for name, model in each(impl, case, (*COMPRESSIONS, OTHER)):
        old, usage = block(impl, case.settings, n)
        slots = impl.compress(model, 0, old, usage)
        expected = [2, n, case.settings.d_model]
        got = list(slots.shape)
        holds(got == expected, f"shape of {name} of {list(old.shape)}", expected, got)


@check(case=cases(steps=ONE_STEP, compression=STRIDED), n=st.integers(2, 4))
def test_CMP_2_slot_k_depends_on_block_k_alone(impl: Implementation, case: Case, n: int):
    """Row by row another memory is changed."""
    c = case.settings.compression_rate
    blocks = torch.eye(n, dtype=torch.bool).repeat_interleave(c, dim=0)  # [memory, slot]
    for name in STRIDED:
        if name not in impl.declared.compressions:
            continue
        settings = case.settings._replace(compression=name)

        def differs(settings: Settings = settings) -> Tensor:
            model = impl.build(settings)
            old, usage = block(impl, settings, n)
            rows = old[:1].repeat(c * n, 1, 1)
            others = rows.clone()
            for j in range(c * n):
                others[j, j] += 10 * torch.randn(settings.d_model, dtype=impl.dtype)
            used = usage[:1].repeat(c * n, 1)
            slots = impl.compress(model, 0, rows, used)
            moved = impl.compress(model, 0, others, used)
            later = impl.compress(model, 0, old[:, c:], usage[:, c:])
            first = impl.compress(model, 0, old, usage)
            what = f"{settings.compression}, its input moved by c = {c}"
            close(what, later, first[:, 1:], impl.tolerance)
            return (slots != moved).any(dim=-1)

        reached = in_some_draw(blocks, differs)
        for k in range(n):
            found = reached[:, k].nonzero().flatten().tolist()
            expected = list(range(c * k, c * (k + 1)))
            what = f"memories of {c * n} that reach slot {k} of {name}"
            holds(found == expected, what, expected, found)


@check(case=cases(steps=ONE_STEP, n_layers=3, d_model=24, compression=PARAMETRIC))
def test_CMP_3_layers_share_no_compression_parameter(impl: Implementation, case: Case):
    model = impl.build(case.settings)
    layers = impl.compression_parameters(model)
    holds(all(layers), "layers with compression parameters", "all", [len(x) for x in layers])
    storages = []
    for layer in layers:
        storages += [parameter.data_ptr() for parameter in layer]
    holds(len(set(storages)) == len(storages), "their parameters", "apart", "shared")


@check(case=cases(steps=ONE_STEP, n_layers=3, d_model=24, compression=PARAMETRIC))
def test_CMP_3_layers_compress_by_parameters_of_their_own(impl: Implementation, case: Case):
    """A layer's f_c moves with its own parameters and no other layer's."""
    model = impl.build(case.settings)
    old, usage = block(impl, case.settings, 2)

    def compressed() -> list[Tensor]:
        return [impl.compress(model, i, old, usage) for i in range(3)]

    before = compressed()
    for k, layer in enumerate(impl.compression_parameters(model)):
        for parameter in layer:
            parameter.mul_(1.5)
        after = compressed()
        moved = [i for i in range(3) if not torch.equal(before[i], after[i])]
        holds(moved == [k], f"layers whose f_c moves with that of layer {k}", [k], moved)
        before = after


def by_loops(
    impl: Implementation, model: nn.Module, settings: Settings, old: Tensor, usage: Tensor
) -> Tensor:
    """f_c of `[B, c*n, D]` by its definition."""
    name = settings.compression
    c = settings.compression_rate
    weights: dict = {}
    if name == DILATED:
        weights = oracle.lists(impl.weights(model, "dilated", "convolution"))["layers"][0]
    if name == "conv":
        weights = read_off(impl, model, c, settings.d_model)
    rows = []
    for one, its_usage in zip(old.tolist(), usage.tolist(), strict=True):
        rows.append(oracle.compress(name, weights, one, its_usage, c))
    return torch.tensor(rows, dtype=impl.dtype)


def read_off(impl: Implementation, model: nn.Module, c: int, D: int) -> dict:
    """The weights of a convolution, an affine map of c memories: of zeros it gives the bias, of a
    single 1 in their c * D numbers that and a row of the kernel."""
    inputs = torch.zeros(1 + c * D, c * D, dtype=impl.dtype)
    inputs[1:] = torch.eye(c * D)
    inputs = inputs.view(-1, c, D)
    slots = impl.compress(model, 0, inputs, torch.zeros(1 + c * D, c, dtype=impl.dtype))
    bias = slots[0, 0]
    kernel = (slots[1:, 0] - bias).view(c, D, D)
    return {"convolution": kernel.tolist(), "convolution_bias": bias.tolist()}


DILATED = "dilated_conv"
PLAIN = tuple(name for name in COMPRESSIONS if name != DILATED)


@check(case=cases(steps=ONE_STEP, compression=PLAIN), n=st.integers(1, 4))
def test_CMP_4_every_function_equals_its_definition_by_loops(
    impl: Implementation, case: Case, n: int
):
    equal_to_loops(impl, case, n, PLAIN)


@check(case=cases(steps=ONE_STEP, compression=DILATED), n=st.integers(1, 4))
def test_CMP_4_the_dilated_convolution_equals_its_definition_by_loops(
    impl: Implementation, case: Case, n: int
):
    equal_to_loops(impl, case, n, (DILATED,))


def equal_to_loops(impl: Implementation, case: Case, n: int, names: tuple[str, ...]) -> None:
    for name, model in each(impl, case, names):
        settings = case.settings._replace(compression=name)
        old, usage = block(impl, settings, n)
        expected = by_loops(impl, model, settings, old, usage)
        slots = impl.compress(model, 0, old, usage)
        close(f"{name} of {list(old.shape)}", slots, expected, impl.tolerance)


@check(case=cases(steps=ONE_STEP, compression="most_used"), n=st.integers(1, 3))
def test_CMP_4_of_equally_used_memories_the_older_stay(impl: Implementation, case: Case, n: int):
    model = impl.build(case.settings)
    old, usage = block(impl, case.settings, n)
    slots = impl.compress(model, 0, old, torch.ones_like(usage))
    close("most_used of equally used memories", slots, old[:, :n])
