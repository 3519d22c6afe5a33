"""What ranks send each other: over gloo in main memory, over nccl between GPUs.

The only importer of torch.distributed.
"""

from __future__ import annotations

import io
import os
import pickle
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from quantcli.errors import InputError

#: Bytes that are sent at a time.
_PIECE = 1 << 28


class Messages:
    """A group of processes. Use `meet`."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._direct = dist.get_backend() != dist.Backend.GLOO

    def broadcast(self, value: Any, source: int) -> Any:
        """A rank's value, for all; tensors in it are sent as they are, and arrive where theirs lie."""
        mine = self.rank == source
        pickler = Pickler()
        content = bytearray(pickler.pickled(value) if mine else b"")
        size = torch.tensor([len(content)])
        dist.broadcast(size, source)
        buffer = torch.frombuffer(content, dtype=torch.uint8) if mine else torch.empty(int(size), dtype=torch.uint8)
        self._send(buffer, source)
        if mine:
            for tensor in pickler.tensors:
                self._send(tensor, source)
            return value
        unpickler = Unpickler(buffer.numpy().tobytes())
        received = unpickler.load()
        for tensor in unpickler.tensors.values():
            self._send(tensor, source)
        return received

    def _send(self, tensor: Tensor, source: int) -> None:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for piece in torch.split(flat, _PIECE) if len(flat) else ():
            if self._direct or piece.device.type == "cpu":
                dist.broadcast(piece, source)
            else:
                copied = piece.cpu()
                dist.broadcast(copied, source)
                piece.copy_(copied)

    def close(self) -> None:
        """Part from the others; again is no error."""
        if dist.is_initialized():
            dist.destroy_process_group()


class Pickler(pickle.Pickler):
    """Sets tensors aside, each once."""

    def __init__(self) -> None:
        self._stream = io.BytesIO()
        super().__init__(self._stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def pickled(self, value: Any) -> bytes:
        """The rest of a value."""
        self.dump(value)
        return self._stream.getvalue()

    def persistent_id(self, value: Any) -> Any:
        """What stands for a tensor."""
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)], value.dtype, tuple(value.shape), value.device.type


class Unpickler(pickle.Unpickler):
    """Makes room for the tensors of a value, in the order in which they arrive."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.tensors: dict[int, Tensor] = {}

    def persistent_load(self, described: Any) -> Tensor:
        """An empty tensor."""
        number, dtype, shape, device = described
        if number not in self.tensors:
            self.tensors[number] = torch.empty(shape, dtype=dtype, device=device)
        return self.tensors[number]


def meet(timeout: timedelta) -> tuple[Messages, Any]:
    """Wait for the other processes that torchrun started; returns the group and a store that all of them read.

    Where every process has a GPU of its own, that is made its current one.

    Raises:
        InputError: they cannot be reached.
    """
    local, beside = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
        # nccl refuses two processes on one GPU.
        if beside <= torch.cuda.device_count() and dist.is_nccl_available():
            backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, world = next(rendezvous("env://"))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"The other processes of torchrun cannot be reached: {str(error).splitlines()[0]}",
            "MASTER_ADDR and MASTER_PORT must name a place that all of them see.",
        ) from error
    return Messages(rank, world), PrefixStore("quantcli", store)
