"""The suite as its users meet it: a copy of the folder, an adapter, and a command."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from .. import conftest, test_losses, test_memory
from ..adapter import COMPRESSIONS, LOSSES, Declaration, Settings
from ..adapters import reference
from ..implementation import Implementation, Unusable, check_usable, declaration, load
from ..report import SCHEMA, SpecReport, bluntness
from ..rules import RULES, SHARPEST_FIRST, VERSION
from ..summary import VERDICTS, badge, markdown
from ..support import Case, holds, supported, torch_random
from .fresh import FORKS, run_pytest
from .verdicts import ADAPTERS, COLUMNS, column, table

SUITE = Path(__file__).parents[1]
README = (SUITE / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
ADAPTER, JAX = BLOCKS
FOUND = (SUITE / "found.md").read_text()
SNIPPETS = dict(re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", FOUND, re.DOTALL | re.MULTILINE))

# What the adapter of README.md is for: time first, the memories in a dict, keys apart from values.
MY_MODEL = """
from types import SimpleNamespace
from torch import nn
from parts import CompressiveTransformer, Config, Memory

def swap(layers):
    return [slots.transpose(0, 1) for slots in layers]

class Compress(nn.Module):
    def __init__(self, f_c):
        super().__init__()
        self.f_c = f_c
    def forward(self, old):
        return self.f_c(old.transpose(0, 1)).transpose(0, 1)

class Model(nn.Module):
    def __init__(self, vocabulary, width, heads, layers, inner_width, memory, compressed_memory,
                 rate, dropout):
        super().__init__()
        self.inner = CompressiveTransformer(Config(
            vocab_size=vocabulary, d_model=width, n_heads=heads, n_layers=layers, d_ff=inner_width,
            mem_len=memory, c_mem_len=compressed_memory, compression_rate=rate, dropout=dropout))
    @property
    def blocks(self):
        def parts(layer):
            D, attention = self.inner.config.d_model, layer.attention
            key, value = (SimpleNamespace(weight=w) for w in attention.key_value.weight.split(D))
            return SimpleNamespace(compress=Compress(layer.compress), query=attention.query,
                                   key=key, value=value)
        return [parts(layer) for layer in self.inner.layers]
    def empty(self, rows):
        memory = self.inner.initial_memory(rows)
        return {"memory": swap(memory.mem), "compressed": swap(memory.c_mem)}
    def forward(self, tokens, state):
        memory = Memory(tuple(swap(state["memory"])), tuple(swap(state["compressed"])))
        logits, memory, loss = self.inner(tokens.transpose(0, 1), memory)[:3]
        return (logits.transpose(0, 1),
                {"memory": swap(memory.mem), "compressed": swap(memory.c_mem)}, loss)
"""


@contextmanager
def users_folder() -> Iterator[Path]:
    """A user's folder: her model, the adapter of README.md, and a copy of the suite."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(SUITE, folder / "spec_tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(reference.compressive.__file__, folder / "parts.py")
        (folder / "my_model.py").write_text(MY_MODEL)
        (folder / "my_adapter.py").write_text(ADAPTER)
        yield folder


def change(folder: Path, old: str, new: str) -> None:
    """Break the user's model."""
    parts = folder / "parts.py"
    right = parts.read_text()
    assert old in right
    parts.write_text(right.replace(old, new))


def spec(
    folder: Path, *options: str, suite: str = "spec_tests", fork: bool = FORKS
) -> SimpleNamespace:
    """Run the suite there in the quick profile; its exit status, what it said, and its report."""
    file = folder / "report.json"
    file.unlink(missing_ok=True)
    arguments = ["-W", "ignore", "-p", "no:cacheprovider", suite, "--spec-profile=quick"]
    arguments += ["--spec-report=report.json", *options]
    status, out, err = run_pytest(folder, arguments, fork)
    report = None
    if file.exists() and file.stat().st_size > 0:  # empty: what came after it was refused
        report = json.loads(file.read_text())
    return SimpleNamespace(status=status, out=out, err=err, report=report)


def verdicts(report: dict) -> dict[str, str]:
    return {rule["id"]: rule["verdict"] for rule in report["rules"] if rule["verdict"] != "NOT RUN"}


def variant(folder: Path, name: str, **declares: object) -> str:
    """An adapter that is that of README.md but for what it declares."""
    source = "from my_adapter import Adapter as Before\n\nclass Adapter(Before):\n"
    source += f"    declares = {{**Before.declares, **{declares!r}}}\n"
    (folder / f"{name}.py").write_text(source)
    return f"{name}.py"


@pytest.mark.elsewhere
def test_the_adapter_of_the_readme_works_at_the_first_attempt():
    with users_folder() as folder:
        ran = spec(folder, "--impl=my_adapter.py", fork=False)
    assert ran.status == 0, ran.out
    found = verdicts(ran.report)
    assert found.keys() == RULES.keys()
    assert set(found.values()) == {"PASS"}
    assert f"rules {VERSION} of my_model: adapter my_adapter.py" in ran.out
    assert "device cpu, dtype float64" in ran.out
    assert "MUST: 28 PASS" in ran.out and "SHOULD: 2 PASS" in ran.out
    assert len(ADAPTER.splitlines()) <= 60


@pytest.mark.elsewhere
def test_a_failure_teaches_and_can_be_done_again():
    old = "old = held[:, : n * c]"
    new = "keep = held.size(1) - leaving; old = held[:, keep : keep + n * c]"
    with users_folder() as folder:
        change(folder, old, new)
        change(folder, "held[:, leaving:]", "held[:, :keep]")
        options = ("--impl", "my_adapter:Adapter", "-k", "MEM_1 and newest")
        ran = spec(folder, *options, "--spec-seed=3", "--spec-dtype=float32")
        snippet = re.search(r"again +(from .*)\n +(replay\(.*\))", ran.out)
        again = [sys.executable, "-W", "ignore", "-c", "\n".join(snippet.groups())]
        again = subprocess.run(again, cwd=folder, capture_output=True, text=True)
    assert ran.status == 1
    assert verdicts(ran.report) == {"MEM-1": "FAIL"}
    for said in (
        f"MEM-1 (MUST): {RULES['MEM-1'].sentence}",
        "expected  ",
        "entries differ, first at [",
        "case = Case(Settings(",
        "cause      the newest were evicted instead of the oldest (that is exactly what came)",
    ):
        assert said in ran.out
    assert "spec_seed=3, spec_dtype='float32')" in snippet[2]
    expected = re.search(r"expected +(\S+)", ran.out)[1]
    assert "Broken: memory in layer 0 after step" in again.stderr
    assert f"expected {expected}" in again.stderr


@pytest.mark.elsewhere
def test_what_is_declared_is_followed():
    known = {"CMP-3": "the layers share f_c", "MOD-5": "nothing is checked"}
    with users_folder() as folder:
        adapter = variant(folder, "known", known=known, not_claimed={"MEM-6": "made at once"})
        right = spec(folder, "--impl", adapter, "-k", "CMP_3 or MEM_6 or MEM_2")
        change(folder, "check_input(self, tokens, memory)", "pass")
        wrong = spec(folder, "--impl", adapter, "-k", "MOD_5")
    assert right.status == 1  # for what holds in spite of it
    wanted = {"MEM-2": "PASS", "MEM-6": "NOT CLAIMED", "CMP-3": "UNEXPECTED PASS"}
    assert verdicts(right.report) == wanted
    unexpected = r"CMP-3 +MUST +UNEXPECTED PASS +declared as known: the layers share"
    assert re.search(unexpected, right.out)
    assert re.search(r"MEM-6 +MUST +NOT CLAIMED +made at once", right.out)
    assert wrong.status == 0
    assert verdicts(wrong.report) == {"MOD-5": "KNOWN"}
    assert re.search(r"MOD-5 +SHOULD +KNOWN +nothing is checked", wrong.out)


@pytest.mark.elsewhere
def test_what_is_not_claimed_is_no_failure_of_a_check_of_several_rules():
    """A compressed slot counts as two positions."""
    with users_folder() as folder:
        positions = "positions = sinusoid(distance"
        change(folder, positions, f"distance[: c_mem[0].size(1)] *= 2\n        {positions}")
        adapter = variant(folder, "twice", not_claimed={"ATT-3": "slots count twice"})
        of_both = ("-k", "ATT_3_MEM_1")
        claimed = spec(folder, "--impl=my_adapter.py", *of_both)
        not_claimed = spec(folder, "--impl", adapter, *of_both)
    assert claimed.status == 1
    assert verdicts(claimed.report) == {"ATT-3": "FAIL", "MEM-1": "NOT CLAIMED"}
    assert not_claimed.status == 0
    assert verdicts(not_claimed.report) == {"ATT-3": "NOT CLAIMED", "MEM-1": "NOT CLAIMED"}
    assert re.search(r"ATT-3 +MUST +NOT CLAIMED +slots count twice", not_claimed.out)


def test_the_sharpest_failure_is_told_first():
    """Every rule has its place; a check of several rules stands behind those of one."""
    assert sorted(SHARPEST_FIRST) == sorted(RULES)
    names = ["test_ATT_3_MEM_5_LOSS_5_loops", "test_ATT_4_stream", "test_MEM_8_x", "test_MEM_1_x"]
    told = ["test_MEM_8_x", "test_MEM_1_x", "test_ATT_4_stream", "test_ATT_3_MEM_5_LOSS_5_loops"]
    assert sorted(names, key=bluntness) == told


def test_a_test_that_does_not_exist_is_not_declared():
    adapter = Wrong(declares={"known": {"test_MEM_1_memory": "misspelt"}})
    with pytest.raises(Unusable, match="names 'test_MEM_1_memory', no rule and no test"):
        conftest.check_names(Implementation(adapter, "wrong"))
    for name in ("MEM-1", "test_MEM_1_memory_is_the_newest_slots_oldest_first"):
        adapter = Wrong(declares={"not_claimed": {name: "why"}})
        conftest.check_names(Implementation(adapter, "right"))


def test_what_is_known_of_a_test_hides_no_other_failure_of_its_rule():
    """A rule with two checks, of which one is declared as known."""
    adapter = Wrong(declares={"known": {"test_CMP_1_one": "the one"}})
    config = SimpleNamespace(option=SimpleNamespace(spec_profile="quick", spec_seed=0))
    report = SpecReport(config, Implementation(adapter, "wrong"))
    for outcomes, verdict in (
        (("failed", "passed"), ("KNOWN", "the one")),
        (("failed", "failed"), ("FAIL", "other")),
        (("passed", "failed"), ("FAIL", "other")),
        (("passed", "passed"), ("UNEXPECTED PASS", "declared as known: the one")),
        (("skipped", "skipped"), ("NOT CLAIMED", "  raised     one;   raised     other")),
    ):
        report.checks["CMP-1"] = [
            {"name": f"test_CMP_1_{name}", "outcome": outcome, "message": f"  raised     {name}"}
            for name, outcome in zip(("one", "other"), outcomes, strict=True)
        ]
        assert report.verdict("CMP-1") == verdict


@pytest.mark.elsewhere
def test_the_files_are_as_documented_from_whatever_folder_it_is_run():
    """With the suite in a copy of its own, all paths given."""
    with users_folder() as folder:
        other = folder / "other"
        other.mkdir()
        options = ("--impl", "../my_adapter.py", "-k", "CMP_3 or MOD_3", "--spec-dtype=float32")
        options += ("--spec-markdown=summary.md", "--spec-badge=badge.json")
        ran = spec(other, *options, suite="../spec_tests")
        summary = (other / "summary.md").read_text()
        shield = json.loads((other / "badge.json").read_text())
    report = ran.report
    assert summary == markdown(report)
    assert shield == badge(report)
    assert report["implementation"]["dtype"] == "float32"
    assert report["rules_version"] == VERSION
    assert report["schema"] == SCHEMA == 1
    documented = README[README.index("| `schema` | 1 |") :].split("\n\n")[0]
    names = set(re.findall(r"`(\w+)`", documented))
    assert report.keys() | report["implementation"].keys() <= names
    assert report["exit_status"] == ran.status == 0
    for rule in report["rules"]:
        assert rule.keys() <= names and rule["verdict"] in VERDICTS
        assert RULES[rule["id"]].level == rule["level"]
        for check in rule["checks"]:
            assert check.keys() <= names
            assert check["outcome"] in ("passed", "failed", "skipped")
    assert report["totals"]["MUST"] == {**dict.fromkeys(VERDICTS, 0), "PASS": 2, "NOT RUN": 26}


@pytest.mark.elsewhere
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--impl: name your adapter (there is no compressive.py here)"),
        (
            ("--impl=nowhere.py",),
            "--impl nowhere.py: the adapter cannot be used: there is no file nowhere.py",
        ),
        (
            ("--impl=my_adapter.py", "--spec-markdown=nowhere/summary.md"),
            "--spec-markdown nowhere/summary.md: No such file or directory",
        ),
    ],
)
def test_what_cannot_be_used_costs_one_message(options: tuple[str, ...], message: str):
    with users_folder() as folder:
        ran = spec(folder, *options)
    assert ran.status == 4 and ran.report is None
    assert ran.err.strip() == f"ERROR: {message}"


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("spec_seed", -5, "-5: expected a number from 0 to 4294967295"),
        ("spec_seed", 2**32, "4294967296: expected a number from 0 to 4294967295"),
        ("spec_device", "meta", "meta: .*cannot be called on meta tensors"),
        ("spec_device", "nowhere", "nowhere: Expected one of cpu, cuda, .*: nowhere"),
        ("spec_device", "", "'': Device string must not be empty"),
        pytest.param(
            *("spec_device", "cuda", "cuda: .*(CUDA|NVIDIA).*"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device"),
        ),
    ],
)
def test_an_option_that_cannot_be_followed_is_refused(name: str, value: object, why: str):
    option = SimpleNamespace(impl="my_adapter.py", spec_seed=0, spec_device="cpu", spec_dtype=None)
    setattr(option, name, value)
    with pytest.raises(pytest.UsageError, match=rf"^--{name.replace('_', '-')} {why}$"):
        conftest.pytest_configure(SimpleNamespace(option=option))


@pytest.mark.parametrize("option", conftest.OUTPUTS)
@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("nowhere/file", "nowhere/file: No such file or directory"),
        ("folder", "folder: Is a directory"),
        ("", "'': No such file or directory"),
        ("file/file", "file/file: Not a directory"),
        ("x" * 300, "x+: File name too long"),
        ("folder/../badge", "folder/../badge: --other has the same file"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(
    option: str, path: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    monkeypatch.setattr(conftest, "OUTPUTS", {"other": "", option: ""})
    chosen = SimpleNamespace(**{"other": "badge", option: path})
    with pytest.raises(pytest.UsageError, match=rf"^--{option.replace('_', '-')} {why}$"):
        conftest.opened(chosen)


def test_a_failure_is_done_again_with_the_options_that_it_came_with():
    given = {"spec_seed": 3, "spec_device": "cuda", "spec_dtype": "float32"}
    for options in (given, {"spec_seed": 0, "spec_device": "cpu", "spec_dtype": None}):
        config = SimpleNamespace(option=SimpleNamespace(**options))
        report = SpecReport(config, Implementation(RIGHT, "right"))
        assert report.other_options() == (given if options is given else {})


def test_every_option_is_documented():
    names = []
    group = SimpleNamespace(addoption=lambda name, **_: names.append(name))
    conftest.pytest_addoption(SimpleNamespace(getgroup=lambda *_: group))
    table = README[README.index("| option |") :].split("\n\n")[0]
    assert set(re.findall(r"`(--[\w-]+)", table)) == set(names)


def test_the_version_of_the_rules_is_the_newest_of_the_change_list():
    """Every rule came with one of them."""
    changes = README[README.index("## Versions of the rules") :].split("\n## ")[0]
    lines = re.findall(r"^- (\d+\.\d+): (.*)$", changes, re.MULTILINE)
    assert lines[0][0] == VERSION
    came = []
    for first, last in re.findall(r"([A-Z]+-\d+) to (\d+)", " ".join(line[1] for line in lines)):
        kind, number = first.split("-")
        came += [f"{kind}-{n}" for n in range(int(number), int(last) + 1)]
    assert sorted(came) == sorted(RULES)


def test_the_table_of_the_readme_is_of_these_rules():
    columns = json.loads(COLUMNS.read_text())
    assert set(columns) == set(ADAPTERS)
    assert table([columns[adapter] for adapter in ADAPTERS]) in README
    for adapter in columns.values():
        assert adapter["rules"].partition(".")[0] == VERSION.partition(".")[0]
        assert adapter["verdicts"].keys() == RULES.keys()


def test_a_column_of_the_table_is_a_report():
    made = column(report_of("FAIL", "NOT CLAIMED"))
    rows = table([made]).splitlines()
    assert rows[0] == "|  |  | a_model |"
    assert f"| rules |  | {VERSION} |" in rows
    first, second = list(RULES)[:2]
    assert any(row.startswith(f"| {first} |") and row.endswith("| FAIL |") for row in rows)
    assert any(row.startswith(f"| {second} |") and row.endswith("| – |") for row in rows)


def report_of(*others: str, reason: str = "") -> dict:
    """Of rules that pass, but for the first ones, which have these verdicts."""
    listed = []
    for (rule, (sentence, _, level)), verdict in zip_longest(RULES.items(), others):
        check = {"name": f"test_{rule}", "outcome": "passed", "message": ""}
        if verdict in ("FAIL", "KNOWN"):
            check |= {"outcome": "failed", "message": f"what is wrong with {rule}"}
        one = {"id": rule, "level": level, "sentence": sentence, "checks": [check]}
        listed.append(one | {"verdict": verdict or "PASS", "reason": reason if verdict else ""})
    about = {
        "name": "a_model",
        "version": "1.2",
        "device": "cpu",
        "dtype": "float64",
        "profile": "default",
    }
    return {"rules_version": VERSION, "implementation": about, "rules": listed}


@pytest.mark.parametrize(
    ("others", "message", "colour"),
    [
        ((), "30/30", "brightgreen"),
        (("NOT CLAIMED",), "29/30, 1 not claimed", "green"),
        (("NOT CLAIMED", "KNOWN"), "28/30, 1 known, 1 not claimed", "yellow"),
        (("KNOWN", "NOT RUN"), "28/30, 1 known, 1 not run", "lightgrey"),
        (("NOT RUN", "UNEXPECTED PASS"), "28/30, 1 unexpected pass, 1 not run", "red"),
        (("KNOWN", "NOT RUN", "FAIL"), "27/30, 1 fail, 1 known, 1 not run", "red"),
    ],
)
def test_a_badge_is_what_shields_io_asks_for(others: tuple[str, ...], message: str, colour: str):
    assert badge(report_of(*others)) == {
        "schemaVersion": 1,
        "label": f"compressive-transformer rules {VERSION}",
        "message": message,
        "color": colour,
    }


def test_markdown_has_a_line_for_every_rule_that_was_run_and_every_failure_once():
    said = markdown(report_of("NOT RUN", "FAIL", "KNOWN", reason="a | <b>\nof it"))
    lines = said.splitlines()
    title = f"### compressive-transformer rules {VERSION}: 27/30, 1 fail, 1 known, 1 not run"
    assert lines[:3] == [title, "", "a_model 1.2: device cpu, dtype float64, profile default"]
    assert "ATT-1" not in said
    assert "| ATT-2 | MUST | FAIL | a \\| &lt;b&gt; of it |" in lines
    assert f"| MOD-5 | SHOULD | PASS | {RULES['MOD-5'].sentence} |" in lines
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(RULES) - 1
    assert all(line.replace("\\|", "").count("|") == 5 for line in table)
    assert said.count("what is wrong with ATT-2") == 1
    assert "```text\nwhat is wrong with ATT-2\n```" in said
    assert "what is wrong with ATT-3" not in said


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import a_package_of_nobody", "it needs a_package_of_nobody, which is not installed"),
        ("def adapter(:", "importing it raised SyntaxError"),
        ("import sys; sys.exit('usage: a model')", "importing it raised SystemExit"),
        (
            "class Adapter:\n    def __init__(self):\n        None.x",
            r"AttributeError in .*:3, in __init__: ",
        ),
        ("class Other: pass", "adapter_.*.py has no Adapter"),
    ],
)
def test_an_adapter_that_cannot_be_imported_is_refused(tmp_path: Path, source: str, message: str):
    path = tmp_path / f"adapter_{abs(hash(source))}.py"
    path.write_text(source)
    with pytest.raises(Unusable, match=message):
        load(str(path))


class Wrong(reference.Adapter):
    """The reference with one call replaced."""

    def __init__(self, **calls: object) -> None:
        super().__init__()
        vars(self).update(calls)


def one_step(model, tokens, state):
    if state.mem[0].size(1):
        raise KeyError("second")
    return RIGHT.step(model, tokens, state)


def in_place(state, slots):
    for (mem, c_mem), (other_mem, other_c_mem) in zip(zip(*state, strict=True), slots, strict=True):
        mem.copy_(other_mem)
        c_mem.copy_(other_c_mem)
    return state


RIGHT = reference.Adapter()
ONCE = RIGHT.build(Settings())


def test_a_shape_is_checked_where_the_first_settings_had_no_such_weight():
    def weights(model: torch.nn.Module) -> dict:
        named = RIGHT.weights(model)
        for layer in named["layers"]:
            if "transposed_convolution" in layer:
                layer["transposed_convolution"] = layer["transposed_convolution"][None]
        return named

    declares = {"compression_losses": ("attention", "autoencoding")}
    impl = Implementation(Wrong(weights=weights, declares=declares), "wrong")
    check_usable(impl, supported(impl))
    with pytest.raises(Unusable, match="gives 'transposed_convolution' of shape .*, expected "):
        test_losses.test_LOSS_5_equals_the_definition_by_loops(impl)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ({"build": None}, r"it has no build\(\)"),
        ({"build": lambda s: 3}, r"build\(\) gives a int, expected a torch.nn.Module"),
        ({"build": lambda s: 1 / 0}, r"build\(\) raised ZeroDivisionError in .*test_instrument.py"),
        (
            {"build": lambda s: NotImplemented},
            r"build\(\) gives NotImplemented, as for Settings\(.*\) and settings near it",
        ),
        (
            {"step": lambda m, x, s: (m(x, s)[0].mT, *m(x, s)[1:3])},
            r"the first step\(\) gives logits of shape \[3, 11, 4\], expected \[3, 4, 11\]",
        ),
        (
            {"step": lambda m, x, s: (m(x, s)[0] / 0, *m(x, s)[1:3])},
            r"the first step\(\) gives logits or a loss that is not finite, as where a query sees",
        ),
        ({"step": one_step}, r"the second step\(\) raised KeyError in .*test_instrument.py"),
        (
            {"read": lambda s: RIGHT.read(s)[:1]},
            r"read\(\) of the state before the first step gives a number of layers of 1, expected 2",
        ),
        (
            {"read": lambda s: [(a.mT, b.mT) for a, b in RIGHT.read(s)]},
            r"read\(\) of the state before the first step gives slots of shape \[3, 8, 0\], expected \[3, 8, 8\]",
        ),
        (
            {"step": lambda m, x, s: (m(x, s)[0], s, 0.0)},
            r"read\(\) after the first step\(\) gives what it gave before it: is the next state ret",
        ),
        (
            {"step": lambda m, x, s: m(x, s)[:2]},
            r"step\(\) gives a tuple of 2, expected logits, state and loss",
        ),
        (
            {"step": lambda m, x, s: (*m(x, s)[:2], torch.zeros(2))},
            r"step\(\) gives a loss of shape \[2\], expected \[\]",
        ),
        (
            {"read": lambda s: [mem for mem, _ in RIGHT.read(s)]},
            r"read\(\) gives a Tensor for a layer, expected memory and compressed memory",
        ),
        (
            {"weights": lambda m: {"layers": [{"queries": torch.zeros(8, 8)}] * 2}},
            r"weights\(\) names 'queries'; there are norm1_weight, ",
        ),
        (
            {"weights": lambda m: {"layers": [{"ff1_weight": torch.zeros(12, 8)}] * 2}},
            r"weights\(\) gives 'ff1_weight' of shape \[12, 8\], expected \[D, F\] = \[8, F\]",
        ),
        (
            {"weights": lambda m: {"layers": [{"convolution": torch.zeros(16, 8)}] * 2}},
            r"'convolution' of shape \[16, 8\], expected \[c, D, D\] = \[2, 8, 8\]",
        ),
        ({"weights": lambda m: [{}, {}]}, r"weights\(\) gives a list of 2, expected a dict"),
        (
            {"compression_parameters": lambda m: [[torch.zeros(1)]] * 2},
            "gives something that is a Tensor, expected an nn.Parameter",
        ),
        (
            {"compression_parameters": lambda m: [[nn.Parameter(torch.zeros(1))]] * 2},
            "gives a parameter that is none of the model's",
        ),
        (
            {"compression_parameters": lambda m: list(m.layers[0].compress.parameters()) * 2},
            r"of a layer gives a Parameter, expected a list of parameters",
        ),
        ({"compression_parameters": lambda m: None}, "gives a NoneType, expected a list of layers"),
        ({"compression_parameters": lambda m: m}, r"gives a \w+Transformer, expected a list of la"),
        (
            {"compression_parameters": lambda: []},
            r"takes 0 positional .*; adapter.py has what comp",
        ),
        ({"replace": lambda s, x: s}, "gives another mem of layer 0 than replace.. was handed"),
        ({"replace": in_place}, "changes the state that it is handed, expected another"),
        ({"build": lambda s: ONCE}, "gives the same model again, expected a new one"),
        (
            {"step": torch.no_grad()(lambda m, x, s: m(x, s)[:3])},
            "gives logits without a gradient: do as training does",
        ),
        (
            {"step": lambda m, x, s: (m(x, s)[0], 0.0, m(x, s)[1])},
            r"step\(\) gives loss that is a Memory of 2, expected a tensor, a number or None",
        ),
        (
            {"step": lambda m, x, s: (m(x, s)[0].tolist(), *m(x, s)[1:3])},
            r"step\(\) gives logits that is a list of 3, expected a tensor",
        ),
        (
            {"step": lambda m, x, s: (*m(x, s)[:2], math.nan)},
            "gives logits or a loss that is not finite",
        ),
        (
            {"read": lambda s: torch.zeros(2, 2, 3, 1, 8)},
            r"read\(\) gives a Tensor, expected for each",
        ),
        (
            {"read": lambda s: [(m, None) for m in s[0]]},
            r"gives c_mem that is a NoneType, expected a",
        ),
        (
            {"weights": lambda m: {"layers": [None] * 2}},
            "gives a NoneType for a layer, expected a d",
        ),
        (
            {"weights": lambda m: {"layers": [{"query": m.layers[0].attention.query}] * 2}},
            r"weights\(\) gives a Linear for 'query', expected a tensor",
        ),
        (
            {"weights": lambda m: {"layers": [{"dilated": []}] * 2}},
            "gives a list of 0 for 'dilated'",
        ),
        ({"declares": ["name"]}, "declares must be a dict, got a list of 1"),
        ({"declares": {"compressions": ("conv", ["x"])}}, "'compressions'. must be some of conv, "),
        ({"declares": {"norm_eps": "small"}}, "'norm_eps'. must be a number of at least 0, got 's"),
        (
            {"declares": {"layout": "sideways"}},
            "must be one of 'batch_first', 'time_first', got 's",
        ),
        ({"declares": {"colour": "red"}}, "declares.'colour'. is unknown; there are name, version"),
        ({"declares": {"known": {"ATT-9": "why"}}}, "names 'ATT-9', no rule and no test"),
        ({"declares": {"compressions": ("sum",)}}, "declares.'compressions'. must be some of conv"),
        (
            {"declares": {"compressions": "conv"}},
            r"must be a tuple of some of conv, .*, as in \('conv',\), got 'conv'",
        ),
        ({"declares": {"norms": "pre"}}, r"must be a tuple of some of pre, post, as in \('pre',\)"),
        (
            {"declares": {"norms": ()}},
            r"must be a tuple of some of pre, post, one at least, got \(\)",
        ),
        ({"declares": {"loss_in_eval": "no"}}, "'loss_in_eval'. must be True or False, got 'no'"),
        (
            {"declares": {"known": ["ATT-1"]}},
            "must be a dict, of a rule or the name of a test to the",
        ),
        ({"declares": {"known": {"ATT-1": ""}}}, "must be a dict with a reason for ATT-1"),
        ({"declares": {"version": 3}}, "must be a string, got 3"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_said(calls: dict, message: str):
    with pytest.raises(Unusable, match=message):
        impl = Implementation(Wrong(**calls), "wrong")
        check_usable(impl, supported(impl))


def test_every_declaration_is_documented():
    table = README[README.index("| field of `declares` |") :].split("\n\n")[0]
    documented = re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines()))
    assert set(documented) - {"declares"} == set(Declaration.__dataclass_fields__)
    assert declaration(SimpleNamespace(declares={})) == Declaration()


def cases_drawn(impl: Implementation, monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """By a check that draws from all settings; they are looked at, and no more."""
    drawn = []

    def look_at(impl: Implementation, case: Case) -> None:
        drawn.append(case)
        holds(True, "a case", "one", "one")

    monkeypatch.setattr(test_memory, "never_too_long", look_at)
    test_memory.test_MEM_2_memories_never_exceed_their_lengths(impl)
    return drawn


def test_a_seed_gives_other_examples_and_the_same_ones_again(monkeypatch):
    impl = load("spec_tests.adapters.reference")
    first = cases_drawn(impl, monkeypatch)
    assert len(first) > 10
    assert cases_drawn(impl, monkeypatch) == first
    monkeypatch.setattr(torch_random, "shift", 1)
    assert cases_drawn(impl, monkeypatch) != first


def test_few_shapes_are_drawn_where_each_is_compiled_and_every_way(monkeypatch):
    impl = Implementation(Wrong(declares={"compiled": True}), "compiled")
    drawn = cases_drawn(impl, monkeypatch)
    shapes = set()
    for settings, schedule in drawn:
        size = settings._replace(compression="", compression_loss="", norm_first=False)
        shapes.add((size, *schedule))
    assert len(shapes) == 2 * 2  # sizes, schedules
    for name, offered in (("compression", COMPRESSIONS), ("compression_loss", LOSSES)):
        assert {getattr(settings, name) for settings, _ in drawn} == set(offered)
    assert {settings.norm_first for settings, _ in drawn} == {True, False}


PACKAGES = {
    "labml": "labml_nn",
    "lucidrains": "compressive_transformer_pytorch",
    "Sonnet": "tensorflow",
    "vilmarzti": "transformers",
}


@pytest.mark.parametrize("whose", SNIPPETS)
def test_what_is_said_of_another_implementation_is_so(whose: str):
    """Each print stands beside what it prints."""
    package = PACKAGES.get(re.match(r"\w+", whose)[0])
    if package is not None and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    repository = re.search(r"/(\S+) at", whose)
    if repository and not Path(os.environ.get("THIRDPARTY", "nowhere"), repository[1]).is_dir():
        pytest.skip(f"THIRDPARTY names no folder with {repository[1]}")
    snippet = SNIPPETS[whose]
    said = re.findall(r"^ *print\(.*\)  # (.*)$", snippet, re.MULTILINE)
    command = [sys.executable, "-W", "ignore", "-c", snippet]
    ran = subprocess.run(command, cwd=SUITE.parent, capture_output=True, text=True)
    assert ran.stdout.splitlines() == said != [], ran.stderr


def test_every_other_implementation_is_explained():
    columns = json.loads(COLUMNS.read_text())
    for adapter in set(ADAPTERS) - {"reference"}:
        about = columns[adapter]
        (section,) = [part for part in FOUND.split("\n## ")[1:] if about["name"] in part[:60]]
        assert about["version"] in section.partition("\n")[0]
        assert section.count("```python\n") == 1
        for rule, verdict in about["verdicts"].items():
            if verdict == "FAIL" and rule != "MOD-5":
                assert rule in section, f"{adapter}: nothing is said of {rule}"
