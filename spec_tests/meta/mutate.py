"""Change `compressive.py` mechanically, one place at a time, and see whether the suite notices:

    python -m spec_tests.meta.mutate --jobs 2               every mutant; ends with the survivors
    python -m spec_tests.meta.mutate --lines 300-340        those of some lines

Comparisons, arithmetic, constants (one more, one less), slices, arguments, branches, and detach().
"""

import argparse
import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = (ROOT / "compressive.py").read_text()
TESTS = [f"spec_tests/test_{name}.py" for name in ("attention", "losses", "memory", "model")]
TESTS += [f"spec_tests/test_{name}.py" for name in ("compression", "golden", "reference")]

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
    if isinstance(node, ast.Call):
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
    """The line, what it becomes, and the whole file, of every mutant."""
    tree = ast.parse(SOURCE)
    whole, out = ast.unparse(tree), skipped(tree)
    statements = [n for n in ast.walk(tree) if isinstance(n, ast.stmt)]
    for node in [n for n in ast.walk(tree) if n not in out]:
        for field, new in changes(node):
            old = getattr(node, field)
            setattr(node, field, new)
            source = ast.unparse(ast.fix_missing_locations(tree))
            if source != whole:
                line = getattr(node, "lineno", 0) or getattr(old, "lineno", 0)
                holder = max(
                    (s for s in statements if s.lineno <= line <= s.end_lineno),
                    key=lambda s: s.lineno,
                )
                yield line, ast.unparse(holder).splitlines()[0], source
            setattr(node, field, old)


def killer(source: str) -> str:
    """The first test that a mutant fails; empty if it survives."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "compressive.py").write_text(source)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-cov", "--no-header"]
        command += ["-p", "no:cacheprovider", "--spec-profile", "quick", "-o", "pythonpath="]
        environment = dict(os.environ, PYTHONPATH=f"{folder}:{ROOT}", OMP_NUM_THREADS="1")
        environment["PYTHONSAFEPATH"] = "1"
        try:
            ran = subprocess.run(
                command + TESTS,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
        except subprocess.TimeoutExpired:
            return "it takes too long"
    if ran.returncode == 0:
        return ""
    failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split("::")[-1].split(" - ")[0] if failed else "the suite cannot start"


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutate compressive.py.")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--lines", default="1-9999", help="first-last line to mutate")
    args = parser.parse_args()
    first, last = map(int, args.lines.split("-"))
    chosen = [mutant for mutant in mutants() if first <= mutant[0] <= last]
    survivors = []
    with ThreadPoolExecutor(args.jobs) as pool:
        found = pool.map(killer, [source for _, _, source in chosen])
        for (line, what, _), test in zip(chosen, found, strict=True):
            print(f"{line:4} {test or 'SURVIVED':60.60} {what}", flush=True)
            if not test:
                survivors.append(f"{line:4} {what}")
    print(
        f"\n{len(chosen) - len(survivors)} of {len(chosen)} killed; survivors:",
        *survivors,
        sep="\n",
    )


if __name__ == "__main__":
    main()
