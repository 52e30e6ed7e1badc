"""The implementation under test: an adapter with its declaration followed, and nothing assumed."""

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from torch import Tensor, nn

from .adapter import CHOICES, LAYER_WEIGHTS, MODEL_WEIGHTS, SOME, Declaration, Settings
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
        self.adapter = adapter
        self.path = path
        self.device = device
        self.declared = declaration(adapter)
        if dtype is not None:
            self.declared = replace(self.declared, dtype=dtype)
        missing = [name for name in NEEDED if not callable(getattr(adapter, name, None))]
        if missing:
            raise Unusable(f"it has no {', '.join(missing)}(); adapter.py says what is needed")
        self.dtype = getattr(torch, self.declared.dtype)
        self.tolerance = 1e-10 if self.dtype == torch.float64 else 1e-4
        self.left_out = ""  # of the check that ran last: which examples, and why

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

    def call(self, name: str, *arguments: Any) -> Any:
        """A call of the adapter."""
        try:
            return getattr(self.adapter, name)(*arguments)
        except TypeError as error:
            if error.__traceback__.tb_next is None:  # it did not come to its first line
                raise Unusable(f"{error}; adapter.py has what {name}() is called with") from None
            raise

    def build(self, settings: Settings) -> nn.Module:
        """A model whose every parameter matters: no zero biases, no unit gains, nothing tiny."""
        self.built = settings
        model = self.call("build", settings)
        if model is NotImplemented:
            not_claimed("build() gives NotImplemented")
        if not isinstance(model, nn.Module):
            raise Unusable(f"build() gives a {type(model).__name__}, expected a torch.nn.Module")
        model = model.to(self.dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() <= 1:  # biases, and gains around 1
                    center = float(parameter.eq(1).all())
                    parameter.normal_(center, std=0.3)
                else:
                    parameter.normal_(std=1.2 / parameter.size(-1) ** 0.5)
        if self.device != CPU:
            model = model.to(self.device)
        return model

    def start(self, model: nn.Module, batch: int) -> Any:
        self.rows = batch
        return self.call("start", model, batch)

    def step(self, model: nn.Module, tokens: Tensor, state: Any) -> Step:
        given = self.call("step", model, self.give(tokens), state)
        if not isinstance(given, (tuple, list)) or len(given) != 3:
            raise Unusable(f"step() gives a {described(given)}, expected logits, state and loss")
        logits, state, loss = given
        check_kind("step()", "logits", logits, Tensor, "a tensor")
        if loss is None:
            loss = 0.0
        check_kind("step()", "loss", loss, (Tensor, Real), "a tensor, a number or None")
        if not isinstance(loss, Tensor):
            loss = torch.tensor(float(loss), dtype=self.dtype)
        if loss.numel() != 1:
            raise Unusable(f"step() gives a loss of shape {list(loss.shape)}, expected []")
        return Step(self.take(logits), state, loss.cpu().reshape(()))

    def read(self, state: Any) -> list[Slots]:
        expected = "memory and compressed memory"
        given = self.call("read", state)
        if given is not None:
            given = items("read()", given, f"for each layer {expected}")
        if not given:  # before the first step it need not know its rows
            empty = torch.zeros(self.rows, 0, self.built.d_model, dtype=self.dtype)
            return [Slots(empty, empty)] * self.built.n_layers
        layers = []
        for layer in given:
            if not isinstance(layer, (tuple, list)) or len(layer) != 2:
                raise Unusable(
                    f"read() gives a {described(layer)} for a layer, expected {expected}"
                )
            for name, part in zip(Slots._fields, layer, strict=True):
                check_kind("read()", name, part, Tensor, "a tensor")
            mem, c_mem = layer
            layers.append(Slots(self.take(mem), self.take(c_mem)))
        return layers

    def compression_parameters(self, model: nn.Module) -> list[list[nn.Parameter]]:
        call = "compression_parameters()"
        layers = []
        for layer in items(call, self.call("compression_parameters", model), "a list of layers"):
            parameters = items(f"{call} of a layer", layer, "a list of parameters")
            for parameter in parameters:
                check_kind(call, "something", parameter, nn.Parameter, "an nn.Parameter")
            layers.append(parameters)
        return layers

    # ---------------------------------------------------------------------- the optional calls

    def needs(self, call: str) -> None:
        """The optional call, or this check is not claimed."""
        if not self.has(call):
            not_claimed(f"needs {call}()")

    def has(self, call: str) -> bool:
        return getattr(self.adapter, call, None) is not None

    def replace(self, state: Any, slots: Sequence[Slots]) -> Any:
        self.needs("replace")
        given = [(self.give(mem), self.give(c_mem)) for mem, c_mem in slots]
        return self.call("replace", state, given)

    def compress(self, model: nn.Module, layer: int, old: Tensor, usage: Tensor) -> Tensor:
        self.needs("compress")
        new = self.call("compress", model, layer, self.give(old), self.give(usage))
        check_kind("compress()", "slots", new, Tensor, "a tensor")
        return self.take(new)

    def weights(self, model: nn.Module, *names: str) -> dict[str, Any]:
        """What the adapter names; without these names the check is not claimed."""
        self.needs("weights")
        weights = self.call("weights", model)
        check_weights(weights, self.built)
        for layer in weights["layers"]:
            missing = [name for name in names if name not in {**weights, **layer}]
            if missing:
                not_claimed(f"weights() does not name {', '.join(missing)}")
        return weights

    # ------------------------------------------------------------------------------ composites

    def run(self, model: nn.Module, text: Tensor, schedule: Sequence[int]) -> list[Step]:
        """Feed text in segments of these lengths, from the start."""
        return list(self.stream(model, text, schedule))

    def stream(self, model: nn.Module, text: Tensor, schedule: Sequence[int]) -> Iterator[Step]:
        """The same, step by step."""
        state = self.start(model, text.size(0))
        for segment in text.split(list(schedule), dim=1):
            step = self.step(model, segment, state)
            state = step.state
            yield step

    def logits(self, model: nn.Module, text: Tensor, schedule: Sequence[int]) -> Tensor:
        with torch.no_grad():
            steps = self.run(model, text, schedule)
        return torch.cat([step.logits for step in steps], dim=1)

    def twin(self, model: nn.Module, settings: Settings) -> nn.Module | None:
        """A model of these settings with the parameters of another; None if their shapes differ, or
        there is no such model."""
        twin = self.call("build", settings)
        if twin is NotImplemented:
            return None
        twin = twin.to(self.device, self.dtype).train(model.training)
        try:
            twin.load_state_dict(model.state_dict())
        except RuntimeError:
            return None
        return twin


def not_claimed(reason: str) -> Any:
    """Leave out this example, or, outside of one, the check: the implementation does not claim what
    it tests. A check that has no example left is not claimed (see `support.check`)."""
    pytest.skip(reason)


def check_kind(call: str, what: str, value: object, kinds: Any, expected: str) -> None:
    """Raise Unusable for a part of what a call gives that is of another type."""
    if not isinstance(value, kinds):
        raise Unusable(f"{call} gives {what} that is a {described(value)}, expected {expected}")


def items(call: str, value: Any, expected: str) -> list:
    """What a call gives, if it is a list or the like."""
    if isinstance(value, (Tensor, nn.Module, str)) or not isinstance(value, Iterable):
        raise Unusable(f"{call} gives a {described(value)}, expected {expected}")
    return list(value)


def described(value: object) -> str:
    """Its type, and its length if it has one."""
    name = type(value).__name__
    if isinstance(value, (tuple, list)):
        return f"{name} of {len(value)}"
    return name


def declaration(adapter: Any) -> Declaration:
    """The adapter's declaration, checked."""
    given = getattr(adapter, "declares", None) or {}
    if not isinstance(given, Mapping):
        raise Unusable(f"declares must be a dict, got a {described(given)}")
    declares = dict(given)
    allowed = [field.name for field in fields(Declaration)]
    for name, value in declares.items():
        if name not in allowed:
            raise Unusable(f"declares[{name!r}] is unknown; there are {', '.join(allowed)}")
        check_value(name, value)
        if name in SOME:
            declares[name] = tuple(value)
    return Declaration(**declares)


def check_value(name: str, value: Any) -> None:
    """Raise Unusable for what a field of the declaration cannot be."""

    def need(ok: bool, expected: str) -> None:
        if not ok:
            raise Unusable(f"declares[{name!r}] must be {expected}, got {value!r}")

    if name in CHOICES:
        choices = ", ".join(map(repr, CHOICES[name]))
        need(value in CHOICES[name], f"one of {choices}")
    elif name in SOME:
        some = f"some of {', '.join(SOME[name])}"
        need(isinstance(value, (tuple, list)), f"a tuple of {some}, as in ({SOME[name][0]!r},)")
        need(len(value) > 0, f"a tuple of {some}, one at least")
        need(all(choice in SOME[name] for choice in value), some)
    elif name in ("known", "not_claimed"):
        need(isinstance(value, Mapping), "a dict, of a rule or the name of a test to the reason")
        for rule, reason in value.items():
            if rule not in RULES and not str(rule).startswith("test_"):
                raise Unusable(f"declares[{name!r}] names {rule!r}, no rule and no test")
            need(isinstance(reason, str) and reason != "", f"a dict with a reason for {rule}")
    elif name == "norm_eps":
        need(isinstance(value, Real) and value >= 0, "a number of at least 0")
    elif name in ("name", "version"):
        need(isinstance(value, str), "a string")
    else:
        need(isinstance(value, bool), "True or False")


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
    except (Exception, SystemExit) as error:  # the latter of a module that reads the command line
        raise_unusable("importing it", error)
    return Implementation(adapter, spec, device, dtype)


FRAMEWORKS = {"torch", "numpy", "jax", "jaxlib", "flax", "tensorflow", "keras"}
TESTING = {"hypothesis", "_pytest", "pluggy"}
STANDARD_LIBRARY = Path(importlib.__file__).parents[1]
SUITE = Path(__file__).parent


def place_of(error: BaseException) -> str:
    """Where an error was raised: the last line of the implementation or its adapter."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        file = Path(code.co_filename)
        packages = "site-packages" in file.parts
        skipped = (FRAMEWORKS | TESTING) & set(file.parts) or str(file).startswith("<frozen")
        of_python = STANDARD_LIBRARY in file.parents and not packages
        if not skipped and not of_python and file.parent != SUITE:
            places.append(f"{file}:{trace.tb_lineno}, in {code.co_name}")
        trace = trace.tb_next
    return places[-1] if places else ""


def raise_unusable(doing: str, error: BaseException) -> NoReturn:
    """Say in one line what an adapter raised, and where."""
    if isinstance(error, Unusable):
        raise error
    place = place_of(error) or "an unknown place"
    said = (str(error).splitlines() or [""])[0]
    raise Unusable(f"{doing} raised {type(error).__name__} in {place}: {said}") from error


def check_usable(impl: Implementation, settings: Settings) -> None:
    """Raise Unusable unless two steps can be made and what they give has the right form."""
    T = settings.segment
    text = torch.arange(6 * T).view(3, 2 * T) % settings.vocab_size
    call = "build()"
    try:
        model = impl.build(settings)
        if impl.build(settings) is model:
            raise Unusable("build() gives the same model again, expected a new one")
        call = "start()"
        state = impl.start(model, 3)
        call = "read() of the state before the first step"
        slots = impl.read(state)
        check_slots(settings, call, slots)
        for turn, tokens in zip(("first", "second"), text.split(T, dim=1), strict=True):
            before = copies(slots)
            call = f"the {turn} step()"
            step = impl.step(model, tokens, state)
            check_step(impl, settings, call, step)
            state = step.state
            call = f"read() after {call}"
            slots = impl.read(state)
            check_slots(settings, call, slots)
            if not any_differs(before, slots):
                why = "is the next state returned, and anything remembered (MEM-1)?"
                raise Unusable(f"{call} gives what it gave before it: {why}")
        call = "compression_parameters()"
        check_compression_parameters(impl, settings, model)
        call = "read(replace(state, slots))"
        if impl.has("replace"):
            handed = [Slots(torch.randn_like(mem), torch.randn_like(c_mem)) for mem, c_mem in slots]
            before = copies(slots)
            given = impl.replace(state, handed)
            if any_differs(before, impl.read(state)):
                raise Unusable("replace() changes the state that it is handed, expected another")
            check_replaced(call, handed, impl.read(given))
        call = "weights()"
        if impl.has("weights"):
            impl.weights(model)
    except pytest.skip.Exception as skipped:
        raise Unusable(f"{call}: {skipped.msg}, for {settings}") from None
    except Exception as error:
        raise_unusable(call, error)


def need(call: str, what: str, expected: object, got: object) -> None:
    if expected != got:
        raise Unusable(f"{call} gives {what} {got}, expected {expected}")


def check_step(impl: Implementation, settings: Settings, call: str, step: Step) -> None:
    expected = [3, settings.segment, settings.vocab_size]
    need(call, "logits of shape", expected, list(step.logits.shape))
    need(call, "logits of dtype", impl.dtype, step.logits.dtype)
    if not step.logits.isfinite().all() or not step.loss.isfinite():
        why = "as where a query sees no slot at all, itself neither (ATT-2)"
        raise Unusable(f"{call} gives logits or a loss that is not finite, {why}")
    if not step.logits.requires_grad:
        raise Unusable(f"{call} gives logits without a gradient: do as training does, no no_grad()")


def check_slots(settings: Settings, call: str, slots: list[Slots]) -> None:
    need(call, "a number of layers of", settings.n_layers, len(slots))
    for layer in slots:
        for part in layer:
            expected = [3, part.size(1), settings.d_model]
            need(call, "slots of shape", expected, list(part.shape))


def check_replaced(call: str, handed: list[Slots], read: list[Slots]) -> None:
    for i, (theirs, ours) in enumerate(zip(read, handed, strict=True)):
        for name, got, expected in zip(Slots._fields, theirs, ours, strict=True):
            if not torch.equal(got, expected):
                where = f"{name} of layer {i}"
                raise Unusable(f"{call} gives another {where} than replace() was handed")


def copies(slots: list[Slots]) -> list[Slots]:
    return [Slots(mem.clone(), c_mem.clone()) for mem, c_mem in slots]


def any_differs(some: list[Slots], others: list[Slots]) -> bool:
    for layer, other in zip(some, others, strict=True):
        for one, two in zip(layer, other, strict=True):
            if not torch.equal(one, two):
                return True
    return False


def check_compression_parameters(
    impl: Implementation, settings: Settings, model: nn.Module
) -> None:
    call = "compression_parameters()"
    theirs = impl.compression_parameters(model)
    need(call, "a number of layers of", settings.n_layers, len(theirs))
    known = {id(parameter) for parameter in model.parameters()}
    for layer in theirs:
        for parameter in layer:
            if id(parameter) not in known:
                raise Unusable(f"{call} gives a parameter that is none of the model's")


def check_weights(weights: Any, settings: Settings) -> None:
    """Raise Unusable for a name or a shape that the loops do not know (`adapter.LAYER_WEIGHTS`)."""
    call = "weights()"
    if not isinstance(weights, dict) or "layers" not in weights:
        raise Unusable(f"{call} gives a {described(weights)}, expected a dict with 'layers'")
    need(call, "a number of layers of", settings.n_layers, len(weights["layers"]))
    sizes = {
        "V": settings.vocab_size,
        "D": settings.d_model,
        "H": settings.n_heads,
        "c": settings.compression_rate,
        "2": 2,
        "3": 3,
    }
    whole = {name: value for name, value in weights.items() if name != "layers"}
    named = [(MODEL_WEIGHTS, whole)]
    named += [(LAYER_WEIGHTS, layer) for layer in weights["layers"]]
    for known, given in named:
        if not isinstance(given, dict):
            raise Unusable(f"{call} gives a {described(given)} for a layer, expected a dict")
        for name, value in given.items():
            if name not in known:
                raise Unusable(f"{call} names {name!r}; there are {', '.join(known)}")
            check_shape(name, known[name], shape_of(name, value), sizes)


def check_shape(name: str, letters: str, shape: list[int], sizes: dict[str, int]) -> None:
    """A letter whose size is not known has that of its first appearance."""
    axes = letters.split()
    fits = len(shape) == len(axes)
    for letter, size in zip(axes, shape, strict=False):
        fits &= sizes.get(letter, size) == size
    if not fits:
        known = ", ".join(str(sizes.get(letter, letter)) for letter in axes)
        got = f"weights() gives {name!r} of shape {shape}"
        raise Unusable(f"{got}, expected [{', '.join(axes)}] = [{known}]")
    sizes.update(zip(axes, shape, strict=True))


def shape_of(name: str, value: Any) -> list[int]:
    """Of a tensor or a list of tensors of one shape."""
    if isinstance(value, Tensor):
        return list(value.shape)
    if not isinstance(value, (tuple, list)) or len(value) == 0:
        raise Unusable(f"weights() gives a {described(value)} for {name!r}, expected a tensor")
    return [len(value), *shape_of(name, value[0])]
