"""A stand-in for a CUDA graph."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Replay:
    """Records operations on the CPU as a CUDA graph records kernels, and repeats them on the same memory."""

    def __init__(self):
        self.calls = []

    def warm_up(self, work):
        return work()

    def record(self, work):
        calls = self.calls

        class Recording(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                output = function(*args, **(kwargs or {}))
                calls.append((function, args, kwargs or {}, output))
                return output

        with Recording():
            return work()

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, output in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():  # views and in-place ones are up to date
                    old.copy_(new)
