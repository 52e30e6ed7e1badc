"""The implementation under test: an adapter with its declaration followed, and nothing assumed."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from torch import Tensor, nn

from .adapter import CHOICES, SOME, Declaration, Settings
from .rules import RULES

CPU = torch.device("cpu")
NEEDED = ("build", "start", "step", "read", "compression_parameters")


class Unusable(Exception):
    """The adapter itself does not work, so that no rule can be tested."""


class Slots(NamedTuple):
    """A layer's memories, each `[B, slots, D]`, oldest first."""

    mem: Tensor
    c_mem: Tensor


class Step(NamedTuple):
    """What one step gives: `logits [B, T, V]`, the next state, and the loss, a scalar."""

    logits: Tensor
    state: Any
    loss: Tensor


class Implementation:
    """An adapter as the tests use it: batch first, its models in float64 with random parameters.

    Its models live on `device`, and what they are given is moved there; what they give is moved
    back, so that examples are drawn and results compared in one place, whatever the device."""

    def __init__(
        self, adapter: Any, path: str, device: torch.device = CPU, dtype: str | None = None
    ) -> None:
        self.adapter, self.path = adapter, path
        self.device = device
        self.declared = declaration(adapter)
        if dtype is not None:
            self.declared = replace(self.declared, dtype=dtype)
        missing = [name for name in NEEDED if not callable(getattr(adapter, name, None))]
        if missing:
            raise Unusable(f"it has no {', '.join(missing)}(); adapter.py says what is needed")
        self.dtype = getattr(torch, self.declared.dtype)
        self.tolerance = 1e-10 if self.dtype == torch.float64 else 1e-4

    # ------------------------------------------------------------------------ the needed calls

    def swap(self, x: Tensor) -> Tensor:
        """From its layout to batch first, and back."""
        if self.declared.layout == "time_first" and x.dim() > 1:
            return x.transpose(0, 1)
        return x

    def give(self, x: Tensor) -> Tensor:
        """To its layout and device."""
        return self.swap(x).to(self.device)

    def take(self, x: Tensor) -> Tensor:
        """From its layout and device."""
        return self.swap(x).cpu()

    def build(self, settings: Settings) -> nn.Module:
        """A model whose every parameter matters: no zero biases, no unit gains, nothing tiny."""
        model = self.adapter.build(settings).to(self.dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() <= 1:  # biases, and gains around 1
                    center = float(parameter.eq(1).all())
                    parameter.normal_(center, std=0.3)
                else:
                    parameter.normal_(std=1.2 / parameter.size(-1) ** 0.5)
        return model.to(self.device)

    def start(self, model: nn.Module, batch: int) -> Any:
        return self.adapter.start(model, batch)

    def step(self, model: nn.Module, tokens: Tensor, state: Any) -> Step:
        logits, state, loss = self.adapter.step(model, self.give(tokens), state)
        if loss is None:
            loss = torch.zeros((), dtype=self.dtype)
        return Step(self.take(logits), state, self.take(loss).reshape(()))

    def read(self, state: Any) -> list[Slots]:
        return [Slots(self.take(mem), self.take(c_mem)) for mem, c_mem in self.adapter.read(state)]

    def compression_parameters(self, model: nn.Module) -> list[list[nn.Parameter]]:
        return [list(layer) for layer in self.adapter.compression_parameters(model)]

    # ---------------------------------------------------------------------- the optional calls

    def needs(self, call: str) -> Any:
        """The optional call, or this check is not claimed."""
        found = getattr(self.adapter, call, None)
        return found or not_claimed(f"needs {call}()")

    def replace(self, state: Any, slots: Sequence[Slots]) -> Any:
        replace = self.needs("replace")
        return replace(state, [(self.give(mem), self.give(c_mem)) for mem, c_mem in slots])

    def compress(self, model: nn.Module, layer: int, old: Tensor, usage: Tensor) -> Tensor:
        compress = self.needs("compress")
        new = compress(model, layer, self.give(old), self.give(usage))
        return self.take(new)

    def weights(self, model: nn.Module) -> dict[str, Any]:
        return self.needs("weights")(model)

    # ------------------------------------------------------------------------------ composites

    def run(self, model: nn.Module, text: Tensor, schedule: Sequence[int]) -> list[Step]:
        """Feed text in segments of these lengths, from the start."""
        state = self.start(model, text.size(0))
        steps = []
        for segment in text.split(list(schedule), dim=1):
            step = self.step(model, segment, state)
            state = step.state
            steps.append(step)
        return steps

    def logits(self, model: nn.Module, text: Tensor, schedule: Sequence[int]) -> Tensor:
        with torch.no_grad():
            steps = self.run(model, text, schedule)
        return torch.cat([step.logits for step in steps], dim=1)

    def twin(self, model: nn.Module, settings: Settings) -> nn.Module | None:
        """A model of these settings with the parameters of another; None if their shapes differ."""
        twin = self.adapter.build(settings).to(self.device, self.dtype).train(model.training)
        try:
            twin.load_state_dict(model.state_dict())
        except RuntimeError:
            return None
        return twin


def not_claimed(reason: str) -> Any:
    """End the check: the implementation does not claim what it tests."""
    pytest.skip(reason)


def declaration(adapter: Any) -> Declaration:
    """The adapter's declaration, checked."""
    declares = dict(getattr(adapter, "declares", None) or {})
    allowed = [field.name for field in fields(Declaration)]
    for name, value in declares.items():
        if name not in allowed:
            raise Unusable(f"declares[{name!r}] is unknown; there are {', '.join(allowed)}")
        if name in CHOICES and value not in CHOICES[name]:
            choices = ", ".join(map(repr, CHOICES[name]))
            raise Unusable(f"declares[{name!r}] must be one of {choices}, got {value!r}")
        if name in SOME and not set(value) <= set(SOME[name]):
            choices = ", ".join(SOME[name])
            raise Unusable(f"declares[{name!r}] must be some of {choices}, got {value!r}")
        if name in ("known", "not_claimed"):
            for rule in value:
                if rule not in RULES and not rule.startswith("test_"):
                    raise Unusable(f"declares[{name!r}] names {rule!r}, no rule and no test")
    return Declaration(**declares)


def load(spec: str, device: torch.device = CPU, dtype: str | None = None) -> Implementation:
    """The implementation that `--impl` names: `path/to/file.py`, `module.path`, either with
    `:Name` behind it if its adapter is not called Adapter. A dtype overrides the declared one."""
    place, _, name = spec.partition(":")
    name = name or "Adapter"
    path = Path(place)
    if path.suffix == ".py" and not path.is_file():
        raise Unusable(f"there is no file {path}")
    try:
        if path.suffix == ".py":
            found = importlib.util.spec_from_file_location(f"adapter_{path.stem}", path)
            module = importlib.util.module_from_spec(found)
            sys.path.append(str(path.parent.resolve()))  # for what stands beside it
            sys.modules[found.name] = module
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        if not hasattr(module, name):
            raise Unusable(f"{place} has no {name}")
        adapter = getattr(module, name)
        if isinstance(adapter, type):
            adapter = adapter()
    except ModuleNotFoundError as error:
        raise Unusable(f"it needs {error.name}, which is not installed") from None
    except Exception as error:
        raise_unusable("importing it", error)
    return Implementation(adapter, spec, device, dtype)


def raise_unusable(doing: str, error: Exception) -> NoReturn:
    """Say in one line what an adapter raised, and where."""
    if isinstance(error, Unusable):
        raise error
    where = error.__traceback__
    while where.tb_next is not None:
        where = where.tb_next
    place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}"
    raise Unusable(f"{doing} raised {type(error).__name__} in {place}: {error}") from error


def check_usable(impl: Implementation, settings: Settings) -> None:
    """Raise Unusable unless two steps can be made and what they give has the right form."""
    L = settings.n_layers
    D = settings.d_model
    T = settings.segment
    tokens = torch.arange(3 * T).view(3, T) % settings.vocab_size

    def need(call: str, what: str, expected: object, got: object) -> None:
        if expected != got:
            raise Unusable(f"{call} gives {what} {got}, expected {expected}")

    call = "build()"
    try:
        model = impl.build(settings)
        if not isinstance(model, nn.Module):
            raise Unusable(f"build() gives a {type(model).__name__}, expected a torch.nn.Module")
        call = "start()"
        state = impl.start(model, 3)
        for turn in ("first", "second"):
            call = f"the {turn} step()"
            logits, state, loss = impl.step(model, tokens, state)
            need(call, "logits of shape", [3, T, settings.vocab_size], list(logits.shape))
            need(call, "logits of dtype", impl.dtype, logits.dtype)
            if not logits.isfinite().all():
                raise Unusable(f"{call} gives logits that are not finite")
            need(call, "a loss of shape", [], list(loss.shape))
            call = f"read() after the {turn} step"
            slots = impl.read(state)
            need(call, "a number of layers of", L, len(slots))
            for layer in slots:
                for part in layer:
                    need(call, "slots of shape", [3, part.size(1), D], list(part.shape))
        call = "compression_parameters()"
        theirs = impl.compression_parameters(model)
        need(call, "a number of layers of", L, len(theirs))
        known = {id(parameter) for parameter in model.parameters()}
        for layer in theirs:
            for parameter in layer:
                if id(parameter) not in known:
                    raise Unusable(f"{call} gives something that is no parameter of the model")
        if getattr(impl.adapter, "replace", None):  # as `needs` asks
            call = "read(replace(state, slots))"
            handed = [Slots(torch.randn_like(mem), torch.randn_like(c_mem)) for mem, c_mem in slots]
            read = impl.read(impl.replace(state, handed))
            for layer, again in zip(handed, read, strict=True):
                for one, other in zip(layer, again, strict=True):
                    need(call, "the slots handed to it:", True, torch.equal(one, other))
    except Exception as error:
        raise_unusable(call, error)
