"""The numbers that the first author's own code gives (golden/README.md), reproduced to 1e-5."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .adapter import Settings
from .adapters.reference import Adapter

GOLDEN = json.loads((Path(__file__).parent / "golden" / "first_author.json").read_text())
SIZES = GOLDEN["sizes"]
SETTINGS = Settings(
    d_model=SIZES["heads"] * SIZES["head_width"],
    n_heads=SIZES["heads"],
    n_layers=SIZES["layers"],
    d_ff=SIZES["ff_width"],
    mem_len=SIZES["memory"],
    c_mem_len=0,
    compression_rate=SIZES["compression_rate"],
)

adapter = Adapter()


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def load(views: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Write the first author's parameters into a layer."""
    with torch.no_grad():
        for name, view in views.items():
            if name in numbers:
                view.copy_(torch.tensor(numbers[name]))


@pytest.mark.parametrize("norm", ["pre_norm", "post_norm"])
def test_three_steps_of_a_transformer_xl(norm: str):
    tower = GOLDEN[norm]
    model = adapter.build(SETTINGS._replace(norm_first=norm == "pre_norm")).double()
    for views, numbers in zip(adapter.weights(model)["layers"], tower["layers"], strict=True):
        assert views.keys() - numbers.keys() == {"convolution"}  # not in use: no compressed memory
        load(views, numbers)
        with torch.no_grad():  # they scale the queries before adding the biases, we after
            for name in ("content_bias", "position_bias"):
                views[name].mul_(SIZES["head_width"] ** 0.5)
    memory = [(torch.tensor(m), torch.tensor(m)[:, :0]) for m in tower["initial_memory"]]
    state = adapter.replace(adapter.start(model, SIZES["batch"]), memory)
    for step in tower["steps"]:
        h, state, attention = adapter.layers(model, torch.tensor(step["input"]), state)
        close(h, step["output"])
        for layer, expected in zip(adapter.read(state), step["memory"], strict=True):
            close(layer[0], expected)
        for weights, expected in zip(attention, step["attention"], strict=True):
            close(weights, expected)


@pytest.mark.parametrize("name", ["attention", "autoencoding"])
def test_compression_losses_and_their_gradients(name: str):
    numbers = GOLDEN[f"{name}_loss"]
    settings = SETTINGS._replace(c_mem_len=4, compression_loss=name)
    model = adapter.build(settings).double()
    views = adapter.weights(model)["layers"][0]
    load(views, numbers)
    h = torch.tensor(numbers["hidden"])
    old = torch.tensor(numbers["evicted"])
    close(adapter.compress(model, 0, old, old.new_zeros(old.shape[:2])), numbers["compressed"])
    loss = adapter.loss(model, 0, h, old)
    close(loss, numbers["loss"])
    before = {name: view.clone() for name, view in views.items() if name in numbers}
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    for kernel in ("convolution", "transposed_convolution"):
        if kernel in numbers:
            close(before.pop(kernel) - views[kernel], numbers[f"gradient_{kernel}"])
    for name, unchanged in before.items():
        assert torch.equal(views[name], unchanged), name


def test_relative_shift():
    numbers = GOLDEN["rel_shift"]
    close(adapter.relative_shift(torch.tensor(numbers["input"])), numbers["output"])


def test_sinusoid():
    numbers = GOLDEN["sinusoid"]
    close(adapter.sinusoid(numbers["length"], numbers["width"]), numbers["output"])
