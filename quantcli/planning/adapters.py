"""Adapters: files of changes to another model, which are no model themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable

from quantcli.core.tensors import TensorInfo
from quantcli.errors import InputError

#: What a change to a layer is called by the tools that make them, behind the layer's name.
_CHANGE = re.compile(
    r"[._](lora_(A|B|up|down|mid|embedding_[AB]|magnitude_vector)|lora\.(up|down)|ia3_l|vera_lambda_[bd]|oft_[rR]"
    r"|(hada|lokr)_w[12]([ab])?|dora_scale)([._]|$)"
)


def refuse_adapter(infos: Iterable[TensorInfo]) -> None:
    """Raise InputError where tensors are changes to layers that are not there: of no use once they are quantized."""
    names = [info.name for info in infos]
    known = set(names)
    for name in names:
        found = _CHANGE.search(name)
        layer = name[: found.start()] if found else ""
        if found and not known & {f"{layer}.weight", f"{layer}.base_layer.weight"}:
            raise InputError(
                f"{name} is part of an adapter, which changes a layer of another model that is not here.",
                "Merge it into its base model first, and convert that: peft.AutoPeftModelForCausalLM.from_pretrained("
                "FOLDER).merge_and_unload().save_pretrained(MERGED), or fuse_lora() of a diffusers pipeline.",
            )
