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


#: What peft puts in front of everything that it saves, layers included that it trained as a whole.
_OF_PEFT = "base_model.model."


def refuse_adapter(infos: Iterable[TensorInfo]) -> None:
    """Raise InputError where tensors are changes to layers that are not there: of no use once they are quantized."""
    matrices = [info.name for info in infos if len(info.shape) > 1 or _CHANGE.search(info.name)]
    changes = [name for name in matrices if _CHANGE.search(name)]
    others = [name for name in matrices if not _CHANGE.search(name)]
    if not changes or not all(name.startswith(_OF_PEFT) for name in others):
        return
    layers = {_CHANGE.split(name)[0] for name in changes}
    if not {f"{layer}{end}" for layer in layers for end in (".weight", ".base_layer.weight")}.intersection(others):
        raise InputError(
            f"{changes[0]} is part of an adapter, which changes a layer of another model that is not here.",
            "Merge it into its base model first, and convert that: peft.AutoPeftModelForCausalLM.from_pretrained("
            "FOLDER).merge_and_unload().save_pretrained(MERGED), or fuse_lora() of a diffusers pipeline.",
        )
