"""The skeleton of an adapter, from the signature of a class or of a function that makes a model:

python -m spec_tests.new my_model.py:Model > my_adapter.py
"""

import argparse
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .adapter import CHOICES, SOME, Adapter, Declaration
from .implementation import NEEDED

COUNT = r"((n|num)_?)?"
LENGTH = r"(_?(len|length|size))?"
WIDTH = r"_?(dim|size|width)"
LIKE = {  # what arguments are called that are a setting
    "vocab_size": rf"{COUNT}(vocab|vocabulary|tokens?|words|embeddings){LENGTH}",
    "d_model": rf"(d|dim)(_?(model|emb|embed))?|(model|hidden|emb|embed|embedding){WIDTH}"
    "|width|n_embd",
    "n_heads": rf"{COUNT}(attention_)?heads?",
    "n_layers": rf"{COUNT}(hidden_)?(layers?|blocks)|depth",
    "d_ff": rf"(d|dim)_?(ff|ffn|inner|feed_?forward)|(ff|ffn|inner|feed_?forward|mlp|intermediate)"
    rf"{WIDTH}",
    "mem_len": rf"{COUNT}mem(ory|ories)?{LENGTH}",
    "c_mem_len": rf"{COUNT}(c|comp|compressed)_?mem(ory|ories)?{LENGTH}",
    "compression_rate": r"((c|comp|compress|compression|c?mem)_?)?(rate|ratio|factor)",
    "compression": r"compression(_?(fn|function|kind|name|type))?",
    "compression_loss": r"(compression|reconstruction)_loss(_(fn|kind|name|type))?",
    "norm_first": r"norm_first|pre_?l?norm|normali[sz]e_before",
    "dropout": r"(.+_)?p?drop(out)?(_.+)?",
    "bptt": r"bptt",
    "segment": rf"((max_)?(seq|sequence|segment|block|chunk|tgt){LENGTH})|n_ctx",
}
PLAIN = (inspect.Parameter.empty, int, float, str, bool)
UNNAMED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Refused(Exception):
    """What was asked for cannot be done, for a reason that fits on a line."""


class Found(NamedTuple):
    """A class or function, and from where it is imported."""

    call: Callable
    module: str
    name: str


def find(spec: str) -> Found:
    """What `path/to/file.py:Name` or `module.path:Name` names."""
    place, _, name = spec.partition(":")
    path = Path(place)
    module_name = place
    if path.suffix == ".py":
        if not path.is_file():
            raise Refused(f"there is no file {path}")
        module_name = path.stem
        if not module_name.isidentifier():
            raise Refused(f"{module_name!r} is no name that Python can import")
        sys.path.insert(0, str(path.parent.resolve()))
    try:
        with redirect_stdout(sys.stderr):  # what it prints is no part of the adapter
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise Refused(f"importing {place!r} raised {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if inspect.isclass(found) or inspect.isfunction(found):
        return Found(found, module_name, name)
    models = []
    for its_name, value in vars(module).items():
        is_model = isinstance(value, type) and issubclass(value, nn.Module)
        if is_model and value.__module__ == module.__name__:
            models.append(f"{place}:{its_name}")
    raise Refused(f"{spec!r} names no class or function; models: {', '.join(models) or 'none'}")


def signature(call: Callable) -> inspect.Signature:
    """With its annotations evaluated, if they can be."""
    try:
        return inspect.signature(call, eval_str=True)
    except (NameError, AttributeError, SyntaxError):
        return inspect.signature(call)


def setting(parameter: inspect.Parameter) -> str | None:
    """The setting that an argument resembles."""
    if isinstance(parameter.annotation, type) and parameter.annotation not in PLAIN:
        return None
    for name, pattern in LIKE.items():
        if re.fullmatch(pattern, parameter.name.lower()):
            return name
    return None


def is_of_settings(kind: Any) -> bool:
    """Whether it is a class, a configuration say, with arguments that resemble settings."""
    if not isinstance(kind, type) or kind in PLAIN or "." in kind.__qualname__:
        return False
    try:
        parameters = signature(kind).parameters.values()
    except (TypeError, ValueError):  # a class of C
        return False
    return any(setting(parameter) for parameter in parameters)


def construction(found: Found, used: list[Found]) -> Iterator[str]:
    """The lines of a call with what resembles a setting filled in; `used` gathers what is called,
    to be imported."""
    used.append(found)
    yield f"{found.name}("
    for parameter in signature(found.call).parameters.values():
        if parameter.kind in UNNAMED:
            continue
        name = f"{parameter.name}="
        if parameter.kind == inspect.Parameter.POSITIONAL_ONLY:
            name = ""
        kind = parameter.annotation
        like = setting(parameter)
        if like is not None:
            yield f"    {name}settings.{like},"
        elif is_of_settings(kind) and kind not in [one.call for one in used]:
            part = Found(kind, kind.__module__, kind.__name__)
            first, *rest = construction(part, used)
            yield f"    {name}{first}"
            for line in rest[:-1]:
                yield f"    {line}"
            yield "    ),"
        elif parameter.default is inspect.Parameter.empty:
            yield f"    {name}...,  # FILL IN: it resembles no setting"
        else:
            default = " ".join(repr(parameter.default).split())
            yield f"    # {parameter.name}: {default} by default; it resembles no setting"
    yield ")"


def imports(used: list[Found], folder: Path) -> Iterator[str]:
    if folder != Path():
        yield "import sys"
        yield "from pathlib import Path"
        yield ""
        yield f'sys.path.append(str(Path(__file__).parent / "{folder.as_posix()}"))'
        yield ""
    names: dict[str, list[str]] = {}
    for found in used:
        names.setdefault(found.module, []).append(found.name)
    for module in sorted(names):
        yield f"from {module} import {', '.join(sorted(names[module]))}"


def declarations(name: str) -> Iterator[str]:
    yield f'"name": "{name}",'
    for field in fields(Declaration):
        if field.name == "name":
            continue
        default = getattr(Declaration(), field.name)
        line = f"# {field.name!r}: {default!r},"
        if field.name in CHOICES:
            others = [choice for choice in CHOICES[field.name] if choice != default]
            line += f"  # or {', '.join(map(repr, others))}"
        elif field.name in SOME:
            line += "  # or fewer"
        elif isinstance(default, bool):
            line += f"  # or {not default}"
        elif isinstance(default, dict):
            line += "  # rule or test: why"
        yield line.replace("'", '"')


def method(name: str) -> Iterator[str]:
    """One of the adapter's, to be filled in."""
    call = getattr(Adapter, name)
    yield f"def {name}({', '.join(inspect.signature(call).parameters)}):"
    for line in inspect.getdoc(call).splitlines():
        yield f"    # {line}".rstrip()
    yield f'    raise NotImplementedError("{name}() is to be filled in")'


def block(lines: Iterator[str], depth: int, comment: bool = False) -> str:
    text = "\n".join(lines)
    if comment:
        text = textwrap.indent(text, "# ", lambda line: True)
    return textwrap.indent(text, "    " * depth)


def skeleton(spec: str) -> str:
    """The source of an adapter of what `spec` names."""
    found = find(spec)
    if found.name == "Adapter":
        raise Refused(f"{spec!r} has the name of the adapter to be; give it another")
    used: list[Found] = []
    try:
        built = list(construction(found, used))
    except (TypeError, ValueError):
        raise Refused(f"{spec!r} does not tell its arguments") from None
    built[0] = f"return {built[0]}"
    needed = [name for name in NEEDED if name != "build"]
    optional = [name for name in vars(Adapter) if inspect.isfunction(vars(Adapter)[name])]
    optional = [name for name in optional if name not in NEEDED and not name.startswith("_")]
    parts = [
        f'"""The adapter of {found.module}.{found.name}: see spec_tests/README.md."""',
        "",
        *imports(used, Path(spec.partition(":")[0]).parent),
        "",
        "",
        "class Adapter:",
        "    # Uncomment what differs in this implementation.",
        "    declares = {",
        block(declarations(found.module), depth=2),
        "    }",
        "",
        "    def build(self, settings):",
        block(built, depth=2),
    ]
    for name in needed:
        parts += ["", block(method(name), depth=1)]
    parts += ["", "    # Optional: with these more rules can be tested."]
    for name in optional:
        parts += ["", block(method(name), depth=1, comment=True)]
    return "\n".join(parts) + "\n"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def main() -> None:
    parser = Parser("python -m spec_tests.new", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("model", help="path/to/file.py:Class or module.path:Class")
    args = parser.parse_args()
    try:
        source = skeleton(args.model)
    except Refused as error:
        parser.error(" ".join(str(error).split()))
    print(source, end="")


if __name__ == "__main__":
    main()
