"""What transformers makes of a checkpoint's names and layers, asked on the meta device before any work.

Runs in a process apart. transformers renames, joins and splits tensors as it loads them, has no use for some, and
reads the weights of some layers in ways that codes do not allow. All of that is found by its own rules and by what its
classes do, not by their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from quantcli.conversion.checkpoint.loader_dtypes import is_kept_wide, mixes_dtypes, scales_kept_wide
from quantcli.conversion.checkpoint.loader_experts import held_one_by_one, stacked_as_loaded
from quantcli.conversion.checkpoint.loader_rows import rearranged, rules_against_codes
from quantcli.conversion.checkpoint.made_up_inputs import candidates
from quantcli.conversion.checkpoint.watched import names_weight, watched_dtypes, watched_weights, watched_writes
from quantcli.models.hugging_face import output_head
from quantcli.models.library_errors import is_of_its_own_code
from quantcli.models.stored_parameters import parameter_names, use_layers_for_experts
from quantcli.system.text import first_line


def survey(request: dict[str, Any]) -> dict[str, Any]:
    """What `quantcli.planning.plan.Loader` holds, or an ``error`` where transformers has no such model.

    ``request``: ``folder`` of the original, ``tensors`` by name (``shape``), those that are ``twins`` of others,
    ``coded`` by name (``role``, ``packed``, ``inputs``, and whether a rule ``asked`` for it), ``format``, and the
    ``dtype`` of the result by torch's name.
    """
    try:
        model = build(request["folder"], request["dtype"])
        use_layers_for_experts(model, request["format"])
    except Exception as error:
        return {"error": "it has code of its own" if is_of_its_own_code(error) else first_line(error)}
    return _Survey(model, request).answer()


def build(folder: str, dtype: str) -> Any:
    """The class that config.json names, without weights, on the meta device."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    vars(config).pop("quantization_config", None)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if named is not None:
            return named._from_config(config, dtype=getattr(torch, dtype)).eval()
        return transformers.AutoModel.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False).eval()


class _Survey:
    """One model, and what is asked of it."""

    def __init__(self, model: Any, request: dict[str, Any]) -> None:
        self.model, self.request = model, request
        self.name = type(model).__name__
        self.coded: dict[str, dict[str, Any]] = request["coded"]
        self.modules = dict(model.named_modules())
        #: Weights that the library renames by their whole name, which is not that of their codes and scales.
        self.renamed_alone: set[str] = set()
        self.loaded, self.joined, self.unknown = self._names()
        self._owners: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            for parameter in module._parameters.values():
                self._owners.setdefault(id(parameter), []).append(path)
        self.leave: dict[str, str] = {}
        self.unpacked: list[str] = []
        self.weights_only: list[str] = []

    def answer(self) -> dict[str, Any]:
        """All findings."""
        from torch import nn

        self._leave_what_is_not_one_layer()
        takes_codes = True
        if self.request["format"] == "compressed-tensors":
            takes_codes = self._leave_what_rules_forbid()
            self._read_by_initialization()
        elif self.request["format"] == "bitsandbytes":
            self._kept_wide()
            self._read_by_others()
        renamed = {}
        for name, loaded in {**self.joined, **self.loaded}.items():
            before, after = name.rpartition("."), loaded.rpartition(".")
            if before[2] == after[2] == "weight" and before[0] != after[0]:
                renamed[before[0]] = after[0]
        return {
            "name": f"{self.name}",
            "modules": renamed,
            "absent": self._absent(),
            "leave": self.leave,
            "unknown": self.unknown,
            "untied": self._untied(),
            "unpacked": self.unpacked,
            # bitsandbytes replaces no subclass of linear layers.
            "takes_codes": takes_codes,
            "fits_nf4": not takes_codes or any(type(self._linear(name)) is nn.Linear for name in self.unpacked),
            "weights_only": self.weights_only,
            "wide": self._wide(),
            "runs_narrow": self._runs_narrow(),
            "split": held_one_by_one(self.modules, {name: self.request["tensors"][name] for name in self.unknown}),
            "single": self._single_experts(),
            "rearranged": rearranged(self.model, self.request["tensors"]),
            "loaded": {name: loaded for name, loaded in self.loaded.items() if name in self.coded},
            "joined": {name: place for name, place in self.joined.items() if name in self.coded},
            **self._blocks(),
        }

    def _blocks(self) -> dict[str, Any]:
        """Lists of blocks that are in no other list, with the keys in each, and where in them tensors are."""
        from torch import nn

        lists: dict[str, list[str]] = {}
        for name, module in self.modules.items():
            inner = any(name.startswith(f"{outer}.") for outer in lists)
            if isinstance(module, nn.ModuleList) and len(module) > 1 and not inner:
                lists[name] = list(module._modules)
        places = {}
        for name, loaded in {**self.joined, **self.loaded}.items():
            for path in lists:
                if loaded.startswith(f"{path}."):
                    key, _, leaf = loaded[len(path) + 1 :].partition(".")
                    places[name] = (path, key, leaf)
        filled = {path for path, _, _ in places.values()}
        return {"lists": {path: keys for path, keys in lists.items() if path in filled}, "places": places}

    def _names(self) -> tuple[dict[str, str], dict[str, str], list[str]]:
        """By the file's name, the loaded one; likewise of what becomes a part of another; what has no use."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
        prefix, known = self.model.base_model_prefix, dict(self.model.state_dict())
        loaded, joined, unknown = {}, {}, []
        scales = {f"{name}_scale": parameter for name, parameter in known.items()}
        for name in self.request["tensors"]:
            renamed, merged = rename_source_key(name, renamings, converters, prefix, known)
            if renamed not in known:
                plain, _ = rename_source_key(name, [], [], prefix, known)
                renamed, merged = (plain, None) if plain in known else (renamed, merged)
            if renamed not in known:
                unknown.append(name)
            elif merged:
                joined[name] = renamed
            else:
                loaded[name] = renamed
                scale, _ = rename_source_key(f"{name}_scale", renamings, [], prefix, known | scales)
                if scale != f"{renamed}_scale":
                    self.renamed_alone.add(name)
        return loaded, joined, unknown

    def _untied(self) -> list[str]:
        """Tensors in the memory of others, in a file of torch, that the class does not tie."""
        names = parameter_names(self.model, self.request.get("twins", ()))
        known = self.model.state_dict().keys() - self.model.all_tied_weights_keys.keys()
        return [name for name, loaded in names.items() if loaded in known]

    def _linear(self, tensor: str) -> Any:
        """The loaded layer whose weight a tensor is, if it is a linear one."""
        from torch import nn

        module, _, leaf = self.loaded.get(tensor, "").rpartition(".")
        layer = self.modules.get(module)
        if leaf != "weight" or layer is None:
            return None
        if self.request["format"] == "bitsandbytes":
            return layer if type(layer) is nn.Linear or type(layer).__name__ == "Conv1D" else None
        # compressed-tensors computes a plain product in place of the layer's own code.
        kind: Any = type(layer)
        return layer if isinstance(layer, nn.Linear) and _computes_plainly(kind) else None

    def _leave_what_is_not_one_layer(self) -> None:
        for name, how in self.coded.items():
            if name in self.unknown:
                self.leave[name] = f"{self.name} of transformers has no such weight, carried over as it is"
            elif name in self.joined:
                expert = how["role"] in ("expert", "experts")
                if expert and how["inputs"] and self.request["format"] == "compressed-tensors":
                    self.weights_only.append(name)
                elif not expert or self.request["format"] != "compressed-tensors":
                    self.leave[name] = "transformers joins it with other weights or splits it as it loads"
            elif other := self._tied(name):
                self.leave[name] = f"{self.name} ties it to {other}, which would have no values"
            elif name in self.renamed_alone and self.request["format"] == "compressed-tensors":
                self.leave[name] = f"{self.name} of transformers renames it, and would not rename its codes and scales"
            elif self._is_head(name) and how["role"] != "head" and not how["asked"]:
                self.leave[name] = f"output head of {self.name}: runtimes and accuracy want it unquantized"
            elif self._linear(name) is None:
                module = self.modules.get(self.loaded[name].rpartition(".")[0])
                kind = type(module).__name__
                self.leave[name] = f"{kind} of transformers, which {self.request['format']} does not replace"

    def _leave_what_rules_forbid(self) -> bool:
        """Whether the class is loaded with codes at all; where not, every layer is left."""
        splits = rules_against_codes(self.model, [self.loaded[name] for name in self._targets()])
        for name in self.coded if splits else ():
            self.leave[name] = (
                f"transformers does not load {self.name} with codes of compressed-tensors, since it would split "
                f"{', '.join(splits[:2])} of such models"
            )
        return not splits

    def _is_head(self, tensor: str) -> bool:
        """Whether a tensor is of what the class calls its output head, or of a layer that gives scores or labels.

        The latter lies outside the base model, has a row for each label, or one for each end of an answer; codes of so
        few rows save nothing.
        """
        path = self.loaded[tensor].rpartition(".")[0]
        layer, base = self.modules[path], self.model.base_model
        if layer is output_head(self.model):
            return True
        rows = getattr(layer, "out_features", None)
        inside = base is self.model or any(layer is module for module in base.modules())
        return not inside and rows is not None and (rows <= 2 or rows == self.model.config.num_labels)

    def _tied(self, tensor: str) -> str | None:
        """Another module that has the very parameter that a tensor is loaded as; a module with two names is one."""
        path, _, leaf = self.loaded[tensor].rpartition(".")
        owners = self._owners.get(id(getattr(self.modules[path], leaf, None)), [])
        return next((name for name in owners if self.modules[name] is not self.modules[path]), None)

    def _single_experts(self) -> dict[str, list[dict[str, Any]]]:
        """What `stacked_as_loaded` finds, where the library unpacks the codes of single experts."""
        if self.request["format"] != "compressed-tensors":
            return {}
        return stacked_as_loaded(self.model, {name: self.request["tensors"][name] for name in self.loaded}, self.loaded)

    def _absent(self) -> list[str]:
        """Linear layers that no tensor of the file fills, such as a pooler that only the class has."""
        from torch import nn

        filled = {*self.loaded.values(), *self.joined.values()}
        return [
            name
            for name, module in self.modules.items()
            if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and f"{name}.weight" not in filled
        ]

    def _runs_narrow(self) -> bool:
        """Whether the class runs in the result's dtype, as far as the meta device tells, or not in float32 either."""
        if self.request["dtype"] == "float32":
            return True
        packed = self.request["format"] == "compressed-tensors"
        if packed and scales_kept_wide(self.model, [self.loaded[name] for name in self._targets()]):
            return False
        if not mixes_dtypes(self.model, keeps_buffers=packed):
            return True
        wide = build(self.request["folder"], "float32")
        use_layers_for_experts(wide, self.request["format"])
        return mixes_dtypes(wide, keeps_buffers=packed)

    def _wide(self) -> list[str]:
        """Tensors that the class keeps in float32 whatever the dtype of the rest."""
        import torch

        plan = self.model._get_dtype_plan(getattr(torch, self.request["dtype"]))
        return [name for name, loaded in self.loaded.items() if is_kept_wide(plan, loaded)]

    def _kept_wide(self) -> None:
        """Layers that transformers does not replace because their class keeps them in float32."""
        from transformers.quantizers.quantizers_utils import should_convert_module

        kept = list(self.model._keep_in_fp32_modules or [])
        for name in self.coded:
            if name not in self.leave and not should_convert_module(self.loaded[name].rpartition(".")[0], kept):
                self.leave[name] = f"{self.name} of transformers keeps it in float32"

    def _targets(self) -> dict[str, Any]:
        """Layers that become codes, by tensor."""
        found = {}
        for name in self.coded:
            layer = None if name in self.leave else self._linear(name)
            if layer is not None:
                found[name] = layer
        return found

    def _read_by_initialization(self) -> None:
        """Layers whose weight the class's ``_init_weights`` reads, which transformers calls for loaded layers as well.

        Packed codes have other names, so that there is no weight.
        """
        targets = {name: layer for name, layer in self._targets().items() if self.coded[name]["packed"]}
        names = {id(layer): name for name, layer in targets.items()}
        asked: list[str] = []
        weights = {name: layer._parameters.pop("weight") for name, layer in targets.items()}
        with watched_weights(targets.values(), lambda layer: asked.append(names[id(layer)])):
            for owner, module in _initialized(self.model, self.model):
                for _ in range(64):
                    asked.clear()
                    try:
                        owner._init_weights(module)
                    except AttributeError as error:
                        culprit = asked[-1] if asked else None
                        if culprit is None or "'weight'" not in str(error):
                            break
                        targets[culprit]._parameters["weight"] = weights.pop(culprit)
                        self.unpacked.append(culprit)
                        continue
                    except Exception:
                        # Values are not there on the meta device; what reads them fails for that reason alone.
                        break
                    break
        for name, weight in weights.items():
            targets[name]._parameters["weight"] = weight

    def _read_by_others(self) -> None:
        """Layers whose weight is read, but which are not called: their codes would be multiplied as they are."""
        import torch

        targets = self._targets()
        names = {id(layer): name for name, layer in targets.items()}
        called: set[str] = set()
        read: dict[str, None] = {}
        inside: list[str] = []

        def enter(layer: Any, _: Any) -> None:
            called.add(names[id(layer)])
            inside.append(names[id(layer)])

        def leave(_: Any, __: Any, ___: Any) -> None:
            inside.pop()

        def seen(layer: Any) -> None:
            if names[id(layer)] not in inside:
                read[names[id(layer)]] = None

        asked: dict[str, None] = {}
        weights = {id(layer.weight): name for name, layer in targets.items()}

        def dtype_asked(weight: int) -> None:
            if weights[weight] not in inside:
                asked[weights[weight]] = None

        hooks = [layer.register_forward_pre_hook(enter) for layer in targets.values()]
        hooks += [layer.register_forward_hook(leave) for layer in targets.values()]
        written: dict[str, None] = {}
        dtypes = watched_dtypes(weights, dtype_asked)
        writes = watched_writes(weights, lambda weight: written.setdefault(weights[weight]))
        with dtypes, writes, watched_weights(targets.values(), seen), torch.no_grad(), torch.device("meta"):
            for inputs in candidates(self.model, "meta"):
                inside.clear()
                try:
                    self.model(**inputs)
                except Exception:
                    continue
                break
            else:
                # Nothing made up runs through it, so that the code around the layers tells.
                for name in targets:
                    if names_weight(self.modules, self.loaded[name]):
                        self.leave[name] = f"{self.name} of transformers reads its weight"
        for hook in hooks:
            hook.remove()
        for name in written:
            self.leave[name] = (
                f"{self.name} of transformers changes its weight as it runs, and codes would be rounded anew"
            )
        for name in read:
            if name in written:
                continue
            if name not in called:
                self.leave[name] = f"{self.name} of transformers reads its weight without calling the layer"
            elif name in asked and self.request["format"] == "bitsandbytes":
                self.leave[name] = f"{self.name} of transformers casts to the dtype of its weight, which codes lack"


def _initialized(module: Any, owner: Any) -> Iterator[tuple[Any, Any]]:
    """Modules as transformers initializes them, each with the model whose rules it goes by; children first."""
    import transformers

    for child in module.children():
        yield from _initialized(child, child if isinstance(child, transformers.PreTrainedModel) else owner)
    yield owner, module


@cache
def _computes_plainly(kind: Any) -> bool:
    """Whether a class of linear layers computes what torch's own does: code of its own is tried on a small layer.

    One that is made in another way may keep settings that its code looks at, such as limits of its inputs.
    """
    import torch
    from torch import nn

    if kind.forward is nn.Linear.forward:
        return True
    if kind.__init__ is not nn.Linear.__init__:
        return False
    with torch.device("cpu"), torch.no_grad():
        layer = kind(6, 5)
        given = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 100, 1e4]).view(
            3, 1, 1
        )
        return torch.allclose(layer(given), nn.functional.linear(given, layer.weight, layer.bias))
