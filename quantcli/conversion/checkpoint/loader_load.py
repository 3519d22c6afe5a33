"""An artifact loaded by transformers, whole or with some of its blocks left out.

Runs in a process apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantcli.checkpoint.config_file import read_config, section_of
from quantcli.system.child import raise_if_out_of_memory
from quantcli.system.text import first_line

#: Of lists of blocks, by the path of each in the model, the keys of the blocks that are there.
Blocks = Mapping[str, Sequence[str]]

_KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def load_names(request: dict[str, str]) -> dict[str, Any]:
    """Load headers on the meta device, and where that is not clean those of the original too."""
    _, answer = load(request["artifact"], request["original"], "meta")
    return answer


def load(
    artifact: str, original: str, device: str | None, dtype: Any = None, keep: Blocks | None = None
) -> tuple[Any, dict[str, Any]]:
    """The loaded artifact, and what transformers found wrong with it that is right in the original.

    Args:
        artifact: folder of what is loaded.
        original: folder of what it was made of.
        device: ``meta`` to load headers alone, None for the values.
        dtype: of torch, for values that are loaded as another than they are stored as.
        keep: of the lists of blocks named, the blocks that are loaded; the model computes without the others.

    Raises:
        MemoryError: it does not fit.
    """
    import transformers

    answer: dict[str, Any] = {"checked": True, "transformers": transformers.__version__}
    problems: list[str] = []
    model, after = None, None
    try:
        model, after = _loading_info(artifact, device, dtype, keep)
        answer["class"] = type(model).__name__
    except Exception as error:
        raise_if_out_of_memory(error)
        problems = [first_line(error)]
    if after is None or any(after[kind] for kind in _KINDS):
        try:
            _, before = _loading_info(original, "meta")
        except Exception as error:
            if problems and section_of(read_config(Path(original) / "config.json")):
                # The original is quantized in a way that this installation does not load: that excuses nothing.
                return None, answer | {"problems": problems}
            reason = f"transformers {transformers.__version__} does not load the original: {first_line(error)}"
            return None, {"checked": False, "reason": reason}
        for kind in _KINDS:
            new = sorted(after[kind] - before[kind]) if after else []
            problems += [f"{kind.replace('_', ' ')}: {', '.join(new[:3])}"] if new else []
    return model, answer | {"problems": problems}


def _loading_info(
    folder: str, device: str | None, dtype: Any = None, keep: Blocks | None = None
) -> tuple[Any, dict[str, set[str]]]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    loader = getattr(transformers, (config.architectures or [""])[0], None) or transformers.AutoModel
    if keep:
        loader = _with_blocks(loader, config, keep)
    options: dict[str, Any] = {"trust_remote_code": False} | ({"device_map": device} if device else {})
    options |= {"dtype": dtype} if dtype else {}
    model, info = loader.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    return model, {kind: {_name(entry) for entry in info.get(kind, ())} for kind in _KINDS}


def _with_blocks(loader: Any, config: Any, keep: Blocks) -> type:
    """A model's class that makes only some of its blocks; these keep their names, and with them their tensors."""
    import torch
    import transformers

    if loader is transformers.AutoModel:
        with torch.device("meta"):
            loader = type(transformers.AutoModel.from_config(config, trust_remote_code=False))

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        loader.__init__(self, *args, **kwargs)
        for path, kept in keep.items():
            blocks = self.get_submodule(path)
            for key in [key for key in blocks._modules if key not in kept]:
                del blocks._modules[key]

    left_out = [rf"(^|\.){re.escape(path)}\.(?!({'|'.join(map(re.escape, kept))})\.)" for path, kept in keep.items()]
    ignored = [*(loader._keys_to_ignore_on_load_unexpected or []), *left_out]
    # The library's rules for a class hold for those of its own modules.
    own = {"__init__": make, "__module__": loader.__module__, "_keys_to_ignore_on_load_unexpected": ignored}
    return type(loader.__name__, (loader,), own)


def _name(entry: Any) -> str:
    """A key, or the name in front of two shapes that do not fit."""
    return entry if isinstance(entry, str) else str(entry[0])
