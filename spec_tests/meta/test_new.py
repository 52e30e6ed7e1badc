"""python -m spec_tests.new: the skeleton of an adapter."""

import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest

from ..adapter import Declaration
from ..implementation import NEEDED, Unusable, check_usable, load
from ..new import main
from ..support import fit
from .test_instrument import ADAPTER, spec, supported, users_folder

BUILD = ADAPTER[ADAPTER.index("    def build") : ADAPTER.index("    def start")]


@pytest.mark.elsewhere
def test_the_adapter_of_the_readme_begins_as_a_skeleton():
    """Its build() is all there; the suite then names the first call that is not."""
    command = [sys.executable, "-W", "ignore", "-m", "spec_tests.new", "my_model.py:Model"]
    with users_folder() as folder:
        made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        (folder / "skeleton.py").write_text(made.stdout)
        ran = spec(folder, "--impl=skeleton.py")
    assert made.stderr == ""
    assert BUILD in made.stdout
    for field in Declaration.__dataclass_fields__:
        assert f'"{field}": ' in made.stdout
    assert ran.status == 4
    assert ran.err.startswith(
        "ERROR: --impl skeleton.py: the adapter cannot be used: start() raised"
    )
    assert ran.err.strip().endswith(": start() is to be filled in")


MODEL = """
from __future__ import annotations
from dataclasses import dataclass
from torch import Tensor, nn

print("imported")

@dataclass
class Config:
    n_token: int
    hidden_dim: int
    cmem_ratio: int = 4
    act: nn.Module = nn.Sequential(nn.ReLU(), nn.ReLU())

class Model(nn.Module):
    def __init__(self, depth, /, config: Config, memory: Tensor, *rest, lr: float, seq_len=3, **more):
        super().__init__()
        self.given = depth, config, memory, lr, seq_len
"""
BUILT = """
        return Model(
            settings.n_layers,
            config=Config(
                n_token=settings.vocab_size,
                hidden_dim=settings.d_model,
                cmem_ratio=settings.compression_rate,
                # act: Sequential( (0): ReLU() (1): ReLU() ) by default; it resembles no setting
            ),
            memory=...,  # FILL IN: it resembles no setting
            lr=...,  # FILL IN: it resembles no setting
            seq_len=settings.segment,
        )
"""


def made(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the command prints."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["new", *arguments])
        patch.setattr(sys, "path", sys.path.copy())
        main()
    return capsys.readouterr().out


def test_arguments_that_resemble_settings_are_filled_in(tmp_path, monkeypatch, capsys):
    """And the module is found where it is, from another folder, too."""
    monkeypatch.chdir(tmp_path)
    Path("src").mkdir()
    Path("src/model_for_a_skeleton.py").write_text(MODEL)
    source = made(capsys, monkeypatch, "src/model_for_a_skeleton.py:Model")
    assert BUILT in source
    Path("skeleton_of_a_model.py").write_text(source)
    del sys.modules["model_for_a_skeleton"]
    monkeypatch.chdir("/")
    impl = load(str(tmp_path / "skeleton_of_a_model.py"))
    assert impl.declared == Declaration(name="model_for_a_skeleton")
    settings = fit(impl.declared, supported(impl), [4]).settings
    depth, config, memory, lr, seq_len = impl.build(settings).given
    assert (depth, memory, lr, seq_len) == (2, ..., ..., 4)
    assert (config.n_token, config.hidden_dim, config.cmem_ratio) == (11, 8, 2)
    for name in NEEDED[1:]:
        with pytest.raises(NotImplementedError, match=rf"^{name}\(\) is to be filled in$"):
            call = getattr(impl.adapter, name)
            call(*signature(call).parameters)
    with pytest.raises(Unusable, match=r"start\(\) is to be filled in"):
        check_usable(impl, settings)


def test_the_reference_is_configured(monkeypatch, capsys):
    """By a class of its own."""
    source = made(capsys, monkeypatch, "compressive:CompressiveTransformer")
    assert "from compressive import CompressiveTransformer, Config\n" in source
    for name in supported(load("spec_tests.adapters.reference"))._fields:
        assert (f"                {name}=settings.{name},\n" in source) == (name != "segment")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: model"),
        (("a.py:A", "b.py:B"), "unrecognized arguments: b.py:B"),
        (("nowhere.py:Model",), "there is no file nowhere.py"),
        (("nowhere:Model",), "importing 'nowhere' raised ModuleNotFoundError: No module named 'no"),
        (("",), "importing '' raised ValueError: Empty module name"),
        (("a-model.py:Model",), "'a-model' is no name that Python can import"),
        (("ends.py:Model",), "importing 'ends.py' raised SystemExit: 3"),
        (
            ("wrong.py:Model",),
            "importing 'wrong.py' raised SyntaxError: invalid syntax (wrong.py, ",
        ),
        (("model_of_c.py",), "'model_of_c.py' names no class or function; models: none"),
        (("model_of_c.py:x",), "'model_of_c.py:x' names no class or function; models: none"),
        (("two.py:C",), "'two.py:C' names no class or function; models: two.py:A, two.py:B"),
        (("model_of_c.py:dict",), "'model_of_c.py:dict' does not tell its arguments"),
        (("model_of_c.py:Adapter",), "'model_of_c.py:Adapter' has the name of the adapter to be"),
    ],
)
def test_bad_arguments_cost_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a-model.py").touch()
    Path("ends.py").write_text("raise SystemExit(3)")
    Path("two.py").write_text("from torch.nn import Module\nclass A(Module): 0\nclass B(A): 0\n")
    Path("wrong.py").write_text("class Model(:\n")
    Path("model_of_c.py").write_text("from builtins import dict\nx = 1\nclass Adapter: pass\n")
    with pytest.raises(SystemExit) as ended:
        made(capsys, monkeypatch, *arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"python -m spec_tests.new: {message}")
    assert said.err.count("\n") == 1
