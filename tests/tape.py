"""A CUDA graph for CPUs: the operators of a function, recorded and run again on the same tensors.

Like a graph it knows addresses alone: a number that Python computed while it was recorded stays
what it was, and a tensor that took another's place is not seen.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    # What a view or an operator in place gives lies where it lay.
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)


def record(work, stream, pool=None):
    """As engine.record; the state that work() changed is put back, since capturing runs nothing."""
    tape, changed = Tape(), {}

    class Keep(TorchDispatchMode):
        """Contents of all tensors before they are written to."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            for place, argument in enumerate(function._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                value = args[place] if place < len(args) else (kwargs or {}).get(argument.name)
                for tensor in tree_leaves(value):
                    if isinstance(tensor, torch.Tensor) and id(tensor) not in changed:
                        changed[id(tensor)] = (tensor, tensor.detach().clone())
            return function(*args, **(kwargs or {}))

    with Keep(), tape:
        work()
    with torch.no_grad():
        for tensor, content in changed.values():
            tensor.detach().copy_(content)
    return tape.replay, pool
