"""What became of weights, noted as it is made: in a file in place of memory, and for who continues."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.conversion.staging import Staging
from quantcli.core.tensors import Rounding
from quantcli.onnx.graph.model import OnnxModel
from quantcli.onnx.plan.evidence import Made
from quantcli.planning.recipe import Recipe
from quantcli.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir


#: Where tensors begin in the file, in bytes.
_ALIGNMENT = 64


def _fingerprint(model: OnnxModel, recipe: Recipe) -> str:
    """Hash of all that decides what becomes of a model's weights, short of reading them."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in model.files]
    identity = {"quantcli": __version__, "recipe": recipe.model_dump(), "files": files}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def begin(staging: Staging, model: OnnxModel, recipe: Recipe, *, force: bool) -> CodesJournal:
    """Begin, or continue, a conversion in a staging folder, which then holds nothing but its journal and codes.

    Raises:
        UsageError: what lies there was begun with another recipe or input, and ``force`` is False.
    """
    done = staging.begin(_fingerprint(model, recipe), force=force, kept=staging.scratch)
    staging.keep_scratch()
    return CodesJournal(staging, done)


class CodesJournal:
    """Codes of weights in a file of a staging folder, and in its journal what they are.

    Args:
        staging: the folder, begun.
        done: records of an interrupted run, by key.
    """

    def __init__(self, staging: Staging, done: Mapping[str, Mapping[str, Any]]) -> None:
        self._staging, self._done = staging, done
        self._asked = Counter[str]()
        staging.scratch.mkdir(exist_ok=True)
        self._file = staging.scratch / "codes"

    def of(self, key: str, make: Callable[[], Made]) -> Made:
        """What is noted under a key, which is made and noted where it is not, or is damaged."""
        # Constants of different bodies may have one name.
        self._asked[key] += 1
        key = f"{key} {self._asked[key]}"
        record = self._done.get(key)
        made = self._read(record) if record else None
        return made or self._noted(key, make())

    def _noted(self, key: str, made: Made) -> Made:
        import numpy as np

        tensors = {}
        with self._file.open("ab") as stream:
            for part in made.tensors:
                values = np.ascontiguousarray(made.array(part))
                stream.write(bytes(-stream.tell() % _ALIGNMENT))
                tensors[part] = {
                    "offset": stream.tell(), "shape": list(values.shape), "dtype": values.dtype.name,
                    "crc32": zlib.crc32(values.data),
                }  # fmt: skip
                stream.write(values.data)
        cost = made.rounding
        record = {
            "name": key, "tensors": tensors, "narrowed": made.narrowed, "algorithm": cost.algorithm, "note": cost.note,
            "signal": cost.signal, "noise": cost.noise,
        }  # fmt: skip
        self._staging.record(record)
        return self._made(record)

    def _read(self, record: Mapping[str, Any]) -> Made | None:
        """What a record speaks of; None where the file does not hold it whole, as after a power cut."""
        size = self._file.stat().st_size if self._file.exists() else 0
        tensors = record["tensors"].values()
        if any(each["offset"] + math.prod(each["shape"]) * _itemsize(each) > size for each in tensors):
            return None
        made = self._made(record)
        whole = all(zlib.crc32(made.array(part).data) == each["crc32"] for part, each in record["tensors"].items())
        return made if whole else None

    def _made(self, record: Mapping[str, Any]) -> Made:
        tensors = {part: _mapped(self._file, each) for part, each in record["tensors"].items()}
        cost = Rounding(record["algorithm"], record["note"], record["signal"], record["noise"])
        return Made(tensors, cost, record["narrowed"])


def _itemsize(tensor: Mapping[str, Any]) -> int:
    import numpy as np

    return int(np.dtype(tensor["dtype"]).itemsize)


def _mapped(file: Path, tensor: Mapping[str, Any]) -> ir.TensorProtocol:
    import numpy as np
    import onnx_ir as ir

    from quantcli.onnx.graph.mapped import MappedTensor

    length = math.prod(tensor["shape"]) * _itemsize(tensor)
    return MappedTensor(
        file.resolve(), tensor["offset"], length, ir.DataType.from_numpy(np.dtype(tensor["dtype"])),
        shape=ir.Shape(tensor["shape"]), name="",
    )  # fmt: skip
