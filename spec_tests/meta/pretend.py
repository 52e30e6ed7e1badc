"""A second device for machines without one: tensors on the "meta" device that have numbers after
all, on the CPU. As on any other, what is there cannot be computed with what is not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
CPU = torch.device("cpu")

aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)


class There(Tensor):
    """A tensor on the other device; its numbers are `here`."""

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        return Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )

    def __init__(self, here: Tensor) -> None:
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, call: Any, types: Any, args: tuple, kwargs: dict | None = None):
        return run(call, args, kwargs or {})

    def tolist(self) -> list:
        return self.here.tolist()

    def data_ptr(self) -> int:
        return self.here.data_ptr()


class Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, call: Any, types: Any, args: tuple, kwargs: dict | None = None):
        return run(call, args, kwargs or {})


def run(call: Any, args: tuple, kwargs: dict) -> Any:
    """Do on the CPU what is to be done there or here."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    here = [x for x in tensors if not isinstance(x, There) and x.dim() > 0]
    mixed = here and call not in MOVES + INDEXED
    if there and (mixed or writes_here(call, args)):
        raise RuntimeError(f"{call} of tensors on {DEVICE} and {CPU}")
    if call == aten.copy_.default:
        stays = isinstance(args[0], There)
    elif "device" in kwargs and kwargs["device"] is not None:
        stays = kwargs["device"] == DEVICE
    else:
        stays = bool(there)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": CPU}
    numbers, options = tree_map_only(There, lambda x: x.here, (args, kwargs))
    found = call(*numbers, **options)
    if not stays:
        return found
    return return_and_correct_aliasing(call, args, kwargs, tree_map_only(Tensor, There, found))


def writes_here(call: Any, args: tuple) -> bool:
    """Whether the call changes a tensor that is here, if only one number, as `+=` does."""
    if call in MOVES:
        return False
    for x, argument in zip(args, call._schema.arguments, strict=False):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(x, Tensor) and not isinstance(x, There):
            return True
    return False


@contextmanager
def pretended() -> Iterator[torch.device]:
    """The other device, while it is there."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # There's cannot be refilled
    try:
        with Pretend():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
