"""Which bytes live while tensors are made and dropped: of real tensors and of those without data alike."""

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active, counts the storages that operations make: `now` those still held, `peak` the most at once.

    `known` tensors, such as parameters, their gradients and inputs, do not count. What a kernel takes and gives back
    inside one operation is not seen.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._known = list(known)
        self._seen: dict[int, weakref.ref] = {}
        self._own = {tensor.untyped_storage()._cdata for tensor in self._known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for value in tree_leaves(outputs):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        return outputs

    def _note(self, storage: torch.UntypedStorage) -> None:
        # the object may be gone and its number taken again: then `_drop` has removed it
        key, size = storage._cdata, storage.nbytes()
        if key in self._own or key in self._seen:
            return
        self._seen[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size
