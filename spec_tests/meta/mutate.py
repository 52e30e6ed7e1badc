"""Change `compressive.py` mechanically, one place at a time, and see whether the suite notices:

    python -m spec_tests.meta.mutate --jobs 2               every mutant; ends with the survivors
    python -m spec_tests.meta.mutate --lines 300-340        those of some lines

Comparisons, arithmetic, constants (one more, one less), slices, arguments, branches, and detach().
"""

import argparse
import ast
import contextlib
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import hypothesis  # noqa: F401  (with torch and pytest the slow part of a start: see killer)
import pytest
import torch
import torch.distributed.tensor  # noqa: F401  (torch.testing imports it at the first comparison)

torch.set_num_threads(1)  # before the fork: threads do not survive it

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "compressive.py").read_text()
TESTS = ["golden", "attention", "memory", "losses", "compression", "model", "reference"]

COMPARISONS = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}


def changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    """What a node's fields can be changed to."""
    match node:
        case ast.Compare(ops=[operator]):
            yield from (("ops", [new()]) for new in COMPARISONS.get(type(operator), []))
        case ast.BinOp(op=operator) if type(operator) in ARITHMETIC:
            yield "op", ARITHMETIC[type(operator)]()
        case ast.UnaryOp():
            yield "op", ast.UAdd()
        case ast.BoolOp(op=operator):
            yield "op", ast.Or() if isinstance(operator, ast.And) else ast.And()
        case ast.Constant(value=bool(value)):
            yield "value", not value
        case ast.Constant(value=int(value) | float(value)):
            yield from (("value", value + 1), ("value", value - 1))
        case ast.If(test=test) | ast.IfExp(test=test):
            yield "test", ast.UnaryOp(ast.Not(), test)
        case ast.Attribute(attr="detach"):
            yield "attr", "clone"
        case ast.Tuple(elts=[_, _, *_], ctx=ast.Load()) | ast.List(elts=[_, _, *_]):
            yield "elts", [node.elts[1], node.elts[0], *node.elts[2:]]
    if isinstance(node, ast.Slice):
        for end in ("lower", "upper"):
            if (there := getattr(node, end)) is not None:
                yield end, None
                yield end, ast.BinOp(there, ast.Add(), ast.Constant(1))
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") not in ("max", "min"):
        for i in range(len(node.args) - 1):
            a, b = node.args[i : i + 2]
            yield "args", [*node.args[:i], b, a, *node.args[i + 2 :]]


def skipped(tree: ast.Module) -> set[ast.AST]:
    """Annotations, and the defaults of Config: taste, and no behaviour."""
    roots = [getattr(node, "annotation", None) for node in ast.walk(tree)]
    roots += [getattr(node, "returns", None) for node in ast.walk(tree)]
    roots += [node.value for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    return {node for root in roots if root is not None for node in ast.walk(root)}


def mutants() -> Iterator[tuple[int, str, str]]:
    """The line, the changed statement's first line, and the whole file, of every mutant."""
    tree = ast.parse(SOURCE)
    whole = ast.unparse(tree)
    out = skipped(tree)
    holder = {}  # of every node the smallest statement around it: outer ones are walked first
    for statement in (node for node in ast.walk(tree) if isinstance(node, ast.stmt)):
        holder.update(dict.fromkeys(ast.walk(statement), statement))
    for node in [node for node in ast.walk(tree) if node not in out]:
        for field, new in changes(node):
            old = getattr(node, field)
            setattr(node, field, new)
            source = ast.unparse(ast.fix_missing_locations(tree))
            if source != whole:
                line = getattr(node, "lineno", holder[node].lineno)
                yield line, headline(holder[node]), source
            setattr(node, field, old)


def headline(statement: ast.stmt) -> str:
    """Its first line; a function's is that with its arguments."""
    lines = ast.unparse(statement).splitlines()
    return next(line for line in lines if not line.startswith("@"))


class First:
    """A pytest plugin that keeps the name of the first test that fails, and lets those come first
    that kill most mutants a second."""

    name = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def turn(item: pytest.Item) -> int:
            quick = any(word in item.name for word in ("refused", "MOD_5", "golden", "loops"))
            slow = any(word in item.name for word in ("combination", "compile", "empty_folder"))
            return slow - quick

        items.sort(key=turn)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.split("::")[-1]


def killer(source: str) -> str:
    """The first test that a mutant fails; empty if it survives. Runs in a fork of a process that
    has imported torch, but neither `compressive` nor a test."""

    def too_long(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(300)
    first = First()
    module = sys.modules["compressive"] = ModuleType("compressive")
    module.__spec__ = ModuleSpec("compressive", None)
    module.__file__ = str(ROOT / "compressive.py")
    arguments = ["-x", "-q", "--no-cov", "-p", "no:cacheprovider", "--spec-profile", "quick"]
    arguments += [str(ROOT / f"spec_tests/test_{name}.py") for name in TESTS]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(source, "compressive.py", "exec"), module.__dict__)
            status = pytest.main(arguments, plugins=[first])
    except TimeoutError:
        return "it takes too long"
    except Exception as error:
        return f"it cannot be imported: {error!r}"
    return first.name or ("" if status == 0 else "the suite cannot start")


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutate compressive.py.")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--lines", default="1-9999", help="first-last line to mutate")
    args = parser.parse_args()
    os.chdir(ROOT)
    first, last = map(int, args.lines.split("-"))
    chosen = [mutant for mutant in mutants() if first <= mutant[0] <= last]
    survivors = []
    fork = multiprocessing.get_context("fork")
    with fork.Pool(args.jobs, maxtasksperchild=1) as pool:
        found = pool.imap(killer, [source for _, _, source in chosen], chunksize=1)
        for (line, what, _), test in zip(chosen, found, strict=True):
            print(f"{line:4} {test or 'SURVIVED':60.60} {what}", flush=True)
            if not test:
                survivors.append(f"{line:4} {what}")
    killed = len(chosen) - len(survivors)
    print(f"\n{killed} of {len(chosen)} killed; survivors:", *survivors, sep="\n")


if __name__ == "__main__":
    main()
