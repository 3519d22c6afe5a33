"""Running models: Hugging Face folders, loaded offline and without remote code."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.decoded import DecodedCheckpoint
from quantcli.checkpoint.hugging_face import load_json
from quantcli.checkpoint.quantized import open_quantized, section_of
from quantcli.errors import InputError, MissingExtraError
from quantcli.system.text import first_line

#: Parameters that a checkpoint may lack without its outputs being random.
HARMLESS_WHEN_MISSING = ("pooler", "position_ids")


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "Running a Hugging Face model") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_model(path: Path, *, causal: bool, headed: bool = False, decoded: bool = False) -> nn.Module:
    """A Hugging Face folder as a torch module in float32 and evaluation mode.

    With ``causal`` the language-modeling head is there, with ``headed`` the class is the one that config.json
    names (a classifier, for example), else it is the bare model. Weights that were quantized
    stay what their codes say; everything is computed in float32, so that what differs is quantization. With
    ``decoded`` they are plain weights of plain layers, and so are those that transformers itself would not load.

    Raises:
        InputError: the folder is not a model that transformers can load, or weights are missing.
    """
    transformers = _transformers()
    config = load_json(require_folder(path) / "config.json")
    section = section_of(config)
    method = section.get("quant_method")
    plain = None
    if (decoded and method) or _needs_decoding(section):
        quantized = open_quantized(open_checkpoint(path))
        if not decoded and any(weight.scheme.inputs for weight in quantized.weights.values()):
            raise InputError(f"{path} has asymmetric weights beside quantized inputs, and such a model cannot be run.")
        plain = DecodedCheckpoint(quantized)
    for needed, extra in {
        "compressed-tensors": ("compressed_tensors", "hf"),
        "bitsandbytes": ("bitsandbytes", "bnb"),
    }.items():
        if method == needed and not plain:
            _require(extra[0], extra[1], f"Loading {path} ({needed})")
    loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    if headed or (causal and _reads_more_than_text(config)):
        loader = named_class(config) or loader
    elif not causal and _is_bare(config):
        loader = named_class(config) or loader  # T5EncoderModel, say, for which AutoModel makes a decoder
    try:
        with quiet():
            options = {"dtype": torch.float32, "output_loading_info": True}
            if plain:
                model, info = _with_weights(loader, plain, options)
            else:
                model, info = loader.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, AttributeError) as error:
        reason = first_line(error)
        raise InputError(f"transformers {transformers.__version__} cannot load {path}: {reason}") from error
    missing = [name for name in info["missing_keys"] if not any(part in name for part in HARMLESS_WHEN_MISSING)]
    missing = sorted(set(missing) - computed_tables(model, missing).keys())
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} weights of {type(model).__name__}, which would be random: "
            f"{', '.join(missing[:3])}.",
            hint="Choose another --task, or repair the model.",
        )
    return model.eval()


def _needs_decoding(section: Mapping[str, Any]) -> bool:
    """Whether transformers 5.23 loads codes of this kind only with what cannot be had on a CPU, or not as they are."""
    if section.get("quant_method") in ("gptq", "awq"):
        return True
    if section.get("quant_method") == "bitsandbytes":
        # bitsandbytes computes in 16 bits, and only some classes, with some shapes, on this processor.
        return section.get("bnb_4bit_quant_type") == "nf4" and bool(section.get("load_in_4bit"))
    groups = (section.get("config_groups") or {}).values()
    return any((group.get("weights") or {}).get("symmetric") is False for group in groups)


def _with_weights(loader: Any, plain: DecodedCheckpoint, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A model with the decoded weights of a checkpoint, and what transformers says of their names."""
    transformers = _transformers()
    config = transformers.AutoConfig.from_pretrained(plain.folder, local_files_only=True, trust_remote_code=False)
    vars(config).pop("quantization_config", None)
    if not issubclass(loader, transformers.PreTrainedModel):
        # Only a class of its own takes weights that lie in no folder.
        with torch.device("meta"):
            loader = type(loader.from_config(config, trust_remote_code=False))
    state = {info.name: plain.read_rows(info, 0, info.rows) for info in plain.infos()}
    found: tuple[nn.Module, dict[str, Any]] = loader.from_pretrained(None, config=config, state_dict=state, **options)
    return found


def build_model(path: Path) -> nn.Module:
    """A Hugging Face folder's model as its config.json describes it, float32, with no weights read.

    Its class is the one that config.json names, heads included.

    Raises:
        InputError: transformers cannot make a model of this configuration.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        if named is not None:
            model = named._from_config(config, dtype=torch.float32)
        else:
            model = transformers.AutoModel.from_config(config, dtype=torch.float32)
        _disable_caches(model.config)
        return model  # type: ignore[no-any-return]
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, AttributeError) as error:
        reason = first_line(error)
        raise InputError(f"transformers {transformers.__version__} cannot build {path}: {reason}") from error


def _disable_caches(config: Any) -> None:
    """Turn off key-value caches of a configuration and of all that are nested in it, where each part looks."""
    if hasattr(config, "use_cache"):
        config.use_cache = False
    for name in getattr(config, "sub_configs", None) or {}:
        if (nested := getattr(config, name, None)) is not None:
            _disable_caches(nested)


def named_class(config: Mapping[str, Any]) -> Any:
    """The class of transformers that a config.json names; None where there is none of that name."""
    return getattr(_transformers(), (config.get("architectures") or [""])[0], None)


def computed_tables(model: nn.Module, missing: Iterable[str]) -> dict[str, Tensor]:
    """Values of those of the ``missing`` parameters that a class computes, such as a table of sinusoids.

    Checkpoints need not hold these. Such a parameter is an embedding's, and is initialized to the same values, not all
    one, whatever was there before, and whatever the random numbers.
    """
    initialize = getattr(model, "_init_weights", None)
    found: dict[str, Tensor] = {}
    for name in missing if initialize else ():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(module, nn.Embedding) or leaf != "weight":
            continue
        tries = []
        for seed in range(2):
            twin = copy.copy(module)
            twin._parameters = {leaf: nn.Parameter(torch.full(tuple(module.weight.shape), float(seed)))}
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(seed)
                initialize(twin)  # type: ignore[misc]
            tries.append(twin.weight.detach().float())
        if torch.equal(*tries) and bool((tries[0] != tries[0].reshape(-1)[0]).any()):
            found[name] = tries[0]
    return found


def parameter_names(model: nn.Module, tensors: Iterable[str]) -> dict[str, str | None]:
    """What a model calls the tensors of a checkpoint; None for one that it merges with others, or splits.

    Architectures change in transformers, and published checkpoints do not: it renames tensors as it loads them. The
    rules are its own.
    """
    if not hasattr(model, "base_model_prefix"):
        return {name: name for name in tensors}
    _transformers()
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _renamings(model)
    prefix, known = model.base_model_prefix, dict(model.state_dict())
    found: dict[str, str | None] = {}
    for name in tensors:
        renamed, merged = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known:
            plain, _ = rename_source_key(name, [], [], prefix, known)
            renamed, merged = (plain, None) if plain in known else (renamed, merged)
        found[name] = None if merged else renamed
    return found


def _renamings(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """The rules by which transformers renames a checkpoint's tensors, and those by which it merges or splits them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if not isinstance(rule, WeightRenaming)]


class MergedExperts:
    """Which tensors of a checkpoint transformers stacks, one for each expert, into a parameter of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._known: dict[str, Any] = {}
        if hasattr(model, "base_model_prefix"):
            _transformers()
            self._prefix, self._known = model.base_model_prefix, dict(model.state_dict())
            self._renamings, self._converters = _renamings(model)

    def place(self, tensor: str) -> tuple[str, int, int, str] | None:
        """The parameter, the expert's number, which of the parts joined by rows it is, and the layer's own name.

        None where the tensor is no expert's, or is put together with others in another way.
        """
        from transformers.core_model_loading import rename_source_key

        if not self._known:
            return None
        plain, _ = rename_source_key(tensor, self._renamings, [], self._prefix, self._known)
        for rule in self._converters:
            target, pattern = rename_source_key(tensor, self._renamings, [rule], self._prefix, self._known)
            if pattern is None:
                continue
            steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
            numbers = [(at, part) for at, part in enumerate(plain.split(".")) if part.isdigit()]
            stacked = steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
            if not stacked or len(rule.target_patterns) > 1 or not numbers or target not in self._known:
                return None
            at, number = numbers[-1]
            leaf = "_".join(plain.removesuffix(".weight").split(".")[at + 1 :])
            return target, int(number), rule.source_patterns.index(pattern), leaf or "weight"
        return None


def use_plain_experts(model: nn.Module) -> None:
    """Let a mixture compute one expert after the other, in its class's own code."""
    model.set_experts_implementation("eager")  # type: ignore[operator]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep stderr clean: compressed-tensors draws progress bars that cannot be turned off."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def run(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """One forward pass; the first one of a compressed-tensors model unpacks its weights."""
    with quiet():
        return model(**inputs, return_dict=True)


def arguments(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Inputs as a module's forward takes them: by position where it allows no names, else by name."""
    taken = inspect.signature(module.forward).parameters.values()
    first = [each.name for each in taken if each.kind is each.POSITIONAL_ONLY and each.name in inputs]
    return tuple(inputs[name] for name in first), {name: inputs[name] for name in inputs if name not in first}


def _require(package: str, extra: str, purpose: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, extra, purpose)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder, a model's or its own. Raises InputError where there is none."""
    transformers = _transformers()
    if not path.is_dir():
        raise InputError(f"{path} is no folder, so it has no tokenizer.", "Name one with --tokenizer FOLDER.")
    try:
        return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = first_line(error)
        raise InputError(f"{path} has no usable tokenizer: {reason}", "Name one with --tokenizer FOLDER.") from error


def require_folder(path: Path) -> Path:
    """The path, if it is a Hugging Face folder. Raises InputError otherwise."""
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is not a Hugging Face folder (it has no config.json), so it cannot be run.")
    return path


def require_vocabulary(model: nn.Module, ids: Sequence[Any], data: str) -> None:
    """Raise InputError where token ids are none of the model's: the tokenizer belongs to another model."""
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", None)
    config = text_config() if callable(text_config) else config
    known = getattr(config, "vocab_size", None)
    largest = max((int(each.max()) for each in ids), default=0)
    if isinstance(known, int) and largest >= known:
        raise InputError(
            f"The tokenizer makes token {largest} of {data}, and the model knows {known}: they do not belong together.",
            hint="Name the model's own with --tokenizer FOLDER.",
        )


def is_causal(path: Path) -> bool:
    """Whether a folder's architecture is a causal language model, or holds one that also sees or hears."""
    config = load_json(require_folder(path) / "config.json")
    architectures = config.get("architectures") or []
    return _reads_more_than_text(config) or any(
        "CausalLM" in str(name) or str(name).endswith("LMHeadModel") for name in architectures
    )


def _reads_more_than_text(config: Mapping[str, Any]) -> bool:
    """Whether a model continues text that may come with images or sound, of which the text may also be all."""
    architectures = config.get("architectures") or []
    towers = any(f"{tower}_config" in config for tower in ("vision", "audio"))
    speaks = any(str(name).endswith("ForConditionalGeneration") for name in architectures)
    return towers and speaks and not config.get("is_encoder_decoder") and "input_ids" in config_inputs(config)


def _is_bare(config: Mapping[str, Any]) -> bool:
    """Whether a config.json names a class without a head."""
    name = str((config.get("architectures") or [""])[0])
    return name.endswith("Model") and not name.endswith(("LMHeadModel", "HeadsModel"))


def config_inputs(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of what the forward of a config.json's class takes, its main input first."""
    cls = named_class(config)
    if cls is None:
        return ("input_ids", "attention_mask", "token_type_ids")
    main = getattr(cls, "main_input_name", "input_ids")
    return tuple(dict.fromkeys((main, *inspect.signature(cls.forward).parameters)))


def decoder_start(model: nn.Module) -> int | None:
    """The token that an encoder-decoder's decoder starts from; None for a model of another kind."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None
    start = getattr(config, "decoder_start_token_id", None)
    return start if isinstance(start, int) else getattr(config, "bos_token_id", None) or 0


def longest_sequence(path: Path) -> int:
    """Tokens a model can take, as its config.json says; 512 where it does not."""
    config = load_json(require_folder(path) / "config.json")
    config = config.get("text_config") or config
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    return longest if isinstance(longest, int) and longest > 0 else 512


def pooling_of(path: Path) -> str:
    """How a sentence-transformers folder pools token vectors: ``mean``, ``cls`` or ``last``; by default mean."""
    pooling = path / "1_Pooling" / "config.json"
    if not pooling.is_file():
        return "mean"
    config = load_json(pooling)
    modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
    chosen = [mode for mode, key in modes.items() if config.get(key)]
    if len(chosen) != 1:
        raise InputError(f"{pooling} asks for a pooling that is not supported; known are {', '.join(modes)}.")
    return chosen[0]


def weighted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold a weight of their own and may be quantized: linear, convolution, embedding layers."""
    found = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if (
            isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd))
            or "Linear" in kind
            or kind == "Conv1D"
        ):
            found[name] = module
    return found
