"""A model of another framework, as the torch.nn.Module that the tests want."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Arrays = Sequence[Any]  # the framework's, or whatever NumPy takes for arrays
Pullback = Callable[[list[Tensor]], Arrays]  # as of jax.vjp, or of a tf.GradientTape


class Bridge(nn.Module):
    """The parameters of another framework's model, by name, as torch's. Every step hands over their
    current values, and takes the gradients back.

    What is handed over are tensors on the CPU, copies without a gradient, which other frameworks
    and NumPy take for arrays: `jnp.asarray(x)`, `tf.constant(x)`, `np.asarray(x)`.
    """

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name.replace(".", "/"), nn.Parameter(tensor(value)))

    def call(
        self, tokens: Tensor, parameters: list[Tensor], memories: list[Tensor]
    ) -> tuple[Arrays, Pullback]:
        """The step, to be written: the parameters come in the order given at first, the memories
        (and what else the state has) as they were returned. Returns `[logits, loss, *memories]`
        and the pullback: of gradients by these it makes those by `[*parameters, *memories]`."""
        raise NotImplementedError

    def forward(
        self, tokens: Tensor, memories: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits, loss, and the next memories."""
        inputs = [*self.parameters(), *memories]
        needed = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        logits, loss, *after = Call.apply(self, needed, tokens, *inputs)
        return logits, loss, after


class Call(torch.autograd.Function):
    """The step as an operation of torch's."""

    @staticmethod
    def forward(ctx: Any, model: Bridge, needed: bool, tokens: Tensor, *inputs: Tensor) -> tuple:
        count = len(list(model.parameters()))
        copies = [copied(x) for x in inputs]
        given, ctx.pullback = model.call(copied(tokens), copies[:count], copies[count:])
        outputs = tuple(tensor(x).to(tokens.device) for x in given)
        memories = outputs[2:]
        if needed and not carry_gradient(ctx.pullback, outputs):
            ctx.mark_non_differentiable(*memories)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by_outputs: Tensor) -> tuple:
        found = ctx.pullback([copied(x) for x in by_outputs])
        device = by_outputs[0].device
        return None, None, None, *(tensor(x).to(device) for x in found)


def carry_gradient(pullback: Pullback, outputs: Sequence[Tensor]) -> bool:
    """Whether the memories do: a random gradient by them comes back as anything but zeros."""
    logits, loss, *memories = outputs
    by_outputs = [torch.zeros_like(logits), torch.zeros_like(loss)]
    by_outputs += [torch.randn_like(x) for x in memories]
    found = pullback([copied(x) for x in by_outputs])
    return any(tensor(x).any() for x in found)


def copied(x: Tensor) -> Tensor:
    """The tests may change x later."""
    return x.detach().cpu().clone()


def tensor(x: Any) -> Tensor:
    """An array of another framework as a tensor of its own."""
    if isinstance(x, Tensor):
        return x.detach().clone()
    import numpy  # the other framework has brought it

    return torch.from_numpy(numpy.array(x))
