"""`bridge.py`, with torch's own functional calls in the place of another framework."""

import shutil
from importlib.util import find_spec
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from .. import test_losses
from ..adapters import reference
from ..bridge import Bridge
from ..implementation import Implementation
from ..replay import checks
from ..report import rules_of
from .test_instrument import JAX, SUITE, spec, users_folder, verdicts
from .test_meta import changed, failure, fault, profile

hypothesis.settings.register_profile(
    "two", hypothesis.settings.get_profile("quick"), max_examples=2
)


class Model(Bridge):
    """A model of `compressive.py` as a function of arrays."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(dict(model.named_parameters()))
        self.parts = [model]  # in a list, so that it is no submodule

    def call(self, tokens: Tensor, parameters: list[Tensor], memories: list[Tensor]) -> tuple:
        (model,) = self.parts
        model.train(self.training)
        names = [name for name, _ in model.named_parameters()]

        def step(parameters: list[Tensor], memories: list[Tensor]) -> list[Tensor]:
            named = dict(zip(names, parameters, strict=True))
            memory = (memories[0::2], memories[1::2])
            output = functional_call(model, named, (tokens, memory))
            after = zip(output.memory.mem, output.memory.c_mem, strict=True)
            return [output.logits, output.compression_loss, *(x for pair in after for x in pair)]

        outputs, pullback = torch.func.vjp(step, parameters, memories)

        def pull_back(by_outputs: list[Tensor]) -> list[Tensor]:
            by_parameters, by_memories = pullback(by_outputs)
            return [*by_parameters, *by_memories]

        return outputs, pull_back


class Adapter:
    declares = {"name": "bridged", "bptt": True}

    def __init__(self, module: Any = reference.compressive) -> None:
        self.inner = reference.Adapter(module)

    def build(self, settings: Any) -> Model:
        return Model(self.inner.build(settings))

    def start(self, model: Model, batch_size: int) -> list[Tensor]:
        first = next(model.parameters())
        (inner,) = model.parts
        empty = first.new_zeros(batch_size, 0, inner.config.d_model)
        return [empty] * (2 * inner.config.n_layers)

    def step(self, model: Model, tokens: Tensor, state: list[Tensor]) -> tuple:
        logits, loss, state = model(tokens, state)
        return logits, state, loss

    def read(self, state: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(state[0::2], state[1::2], strict=True))

    def replace(self, state: list[Tensor], slots: Any) -> list[Tensor]:
        return [part for pair in slots for part in pair]

    def compression_parameters(self, model: Model) -> list[list[Tensor]]:
        (inner,) = model.parts
        layers = range(inner.config.n_layers)
        named = list(model.named_parameters())
        beginnings = [(f"layers/{i}/compress/", f"layers/{i}/decompress/") for i in layers]
        return [[x for name, x in named if name.startswith(begin)] for begin in beginnings]


@pytest.mark.elsewhere
def test_what_is_right_passes_over_the_bridge():
    with profile("two"):
        impl = Implementation(Adapter(), "bridged")
        found = {test: failure(check, impl) for test, check in checks().items()}
    failed = [f"{test}: {error}" for test, error in found.items() if error is not None]
    assert not failed, "\n".join(failed)


CROSSING = [
    ("MEM-8", "no detach of memory"),
    ("MEM-8", "no detach of compressed memory"),
    ("LOSS-1", "the loss trains the queries"),
    ("LOSS-1", "the loss trains keys and values"),
    ("LOSS-1", "the memories are not held constant"),
]


@pytest.mark.elsewhere
@pytest.mark.parametrize(("rule", "what"), CROSSING)
def test_faults_of_gradients_are_seen_across_the_bridge(rule: str, what: str):
    impl = Implementation(Adapter(changed(fault(what).changes)), what)
    of_the_rule = [check for name, check in checks().items() if rule in rules_of(name)]
    with profile("two"):
        caught = any(failure(check, impl) is not None for check in of_the_rule)
    assert caught, f"{rule} holds"


def test_a_gradient_that_does_not_come_back_is_missed():
    class Forgetful(Model):
        def call(self, *inputs: Any) -> tuple:
            outputs, pullback = super().call(*inputs)

            def pull_back(by_outputs: list[Tensor]) -> list[Tensor]:
                first, *others = pullback(by_outputs)
                return [torch.zeros_like(first), *others]

            return outputs, pull_back

    adapter = Adapter()
    adapter.build = lambda settings: Forgetful(adapter.inner.build(settings))
    check = test_losses.test_LOSS_2_leaves_the_language_model_loss_alone_in_every_step
    with profile("two"):
        error = failure(check, Implementation(adapter, "forgetful"))
    assert "gradient of the language-model loss on embedding/weight" in str(error)


@pytest.mark.elsewhere
@pytest.mark.skipif(find_spec("jax") is None, reason="jax is not installed")
def test_the_jax_adapter_of_the_readme_works():
    """Some rules; `--impl` takes it through all in a few minutes."""
    with users_folder() as folder:
        (folder / "jax_adapter.py").write_text(JAX)
        shutil.copy(SUITE / "meta" / "jax_model.py", folder / "my_jax_model.py")
        some = "MEM_8 or CMP or LOSS_1"
        ran = spec(folder, "--impl=jax_adapter.py", "-k", some)
    assert ran.status == 0, ran.out + ran.err
    assert set(verdicts(ran.report).values()) == {"PASS"}
