"""Running models: Hugging Face folders, loaded offline and without remote code."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.checkpoint.config_file import read_config, section_of
from quantcli.checkpoint.decoded import decoded_checkpoint
from quantcli.checkpoint.hugging_face import is_causal_config
from quantcli.checkpoint.quantized import FLOATS
from quantcli.errors import InputError, MissingExtraError
from quantcli.models.library_errors import not_made
from quantcli.models.stored_parameters import computed_tables, forget_codes, with_layers_for_experts
from quantcli.system.text import first_line

#: Parameters that a checkpoint may lack without its outputs being random.
HARMLESS_WHEN_MISSING = ("pooler", "position_ids")


def transformers_library() -> Any:
    """transformers, offline and silent. Raises MissingExtraError where it is not installed."""
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
    transformers_library()
    config = read_config(require_folder(path) / "config.json")
    section = section_of(config)
    method = section.get("quant_method")
    loaders = _loaders(path, config, causal=causal, headed=headed)
    plain = None
    if (decoded and method) or _needs_decoding(section, other_class=len(loaders) > 1):
        plain = decoded_checkpoint(open_checkpoint(path))
        if not decoded and plain.quantizes_inputs:
            raise InputError(f"{path} has asymmetric weights beside quantized inputs, and such a model cannot be run.")
    for needed, extra in {
        "compressed-tensors": ("compressed_tensors", "hf"),
        "bitsandbytes": ("bitsandbytes", "bnb"),
    }.items():
        if method == needed and not plain:
            _require(extra[0], extra[1], f"Loading {path} ({needed})")
    return _complete(loaders, path, plain).eval()


def _complete(loaders: Sequence[Any], path: Path, plain: Checkpoint | None) -> nn.Module:
    """The model by the first class that a folder has all weights of.

    A part of a model has a class of its own: the towers of CLIP, say, of which a classifier has one.
    """
    failures = []
    for loader in loaders:
        try:
            model, missing = _loaded(loader, path, plain)
        except InputError as error:
            # The library may fail to make random values for what is missing, in place of naming it.
            failures.append(error)
            continue
        if not missing:
            return model
        failures.append(
            InputError(
                f"{path} lacks {len(missing)} weights of {type(model).__name__}, which would be random: "
                f"{', '.join(missing[:3])}.",
                hint="Choose another --task, or repair the model.",
            )
        )
    raise failures[0]


def _loaders(path: Path, config: Mapping[str, Any], *, causal: bool, headed: bool) -> list[Any]:
    """Classes of transformers to load a folder by: the one that is asked for, then what config.json names."""
    transformers = transformers_library()
    named = named_class(config)
    loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    if named is None:
        return [loader]
    # T5EncoderModel is bare, and AutoModel makes a decoder of it.
    by_name = _reads_more_than_text(config) if causal else _is_bare(config)
    # Some types have no model without a head, or are not listed among those that continue text.
    if headed or by_name or type(config := load_config(path)) not in loader._model_mapping:
        return [named]
    if not causal and _is_given_parts(loader._model_mapping[type(config)]):
        return [named]
    # One without a head would be scored by what are no logits.
    return [loader] if causal else [loader, named]


def _is_given_parts(bare: Any) -> bool:
    """Whether classes with a head hand a model without one what its inputs go through first (SpeechT5, Perceiver)."""
    parameters = [] if isinstance(bare, tuple) else list(inspect.signature(bare.__init__).parameters.values())
    return any(each.default is None for each in parameters)


def _loaded(loader: Any, path: Path, plain: Checkpoint | None) -> tuple[nn.Module, list[str]]:
    """A folder's model by a class, and the weights it lacks. Raises InputError where transformers cannot load it."""
    try:
        with quiet():
            options = {"dtype": torch.float32, "output_loading_info": True}
            if plain:
                model, info = _with_weights(loader, plain, options)
            else:
                model, info = loader.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, AttributeError) as error:
        raise not_made(path, "load", error) from error
    missing = [name for name in info["missing_keys"] if not any(part in name for part in HARMLESS_WHEN_MISSING)]
    return model, sorted(set(missing) - computed_tables(model, missing).keys())


def _needs_decoding(section: Mapping[str, Any], *, other_class: bool) -> bool:
    """Whether transformers 5.23 loads codes of this kind only with what cannot be had on a CPU, or not as they are.

    With ``other_class`` the class that loads is not the one that was quantized, and may have layers that the file
    lacks: a pooler, the other tower. compressed-tensors makes codes of no value for these.
    """
    if section.get("quant_method") in ("gptq", "awq", "gguf", *FLOATS):
        return True
    if section.get("quant_method") == "bitsandbytes":
        # bitsandbytes computes in 16 bits, and only some classes, with some shapes, on this processor.
        return section.get("bnb_4bit_quant_type") == "nf4" and bool(section.get("load_in_4bit"))
    groups = (section.get("config_groups") or {}).values()
    if section.get("quant_method") == "compressed-tensors" and other_class:
        return not any(group.get("input_activations") for group in groups)
    return any((group.get("weights") or {}).get("symmetric") is False for group in groups)


def _with_weights(loader: Any, plain: Checkpoint, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A model with the decoded weights of a checkpoint, and what transformers says of their names."""
    transformers = transformers_library()
    config = transformers.AutoConfig.from_pretrained(plain.folder, local_files_only=True, trust_remote_code=False)
    method = forget_codes(config)
    if not issubclass(loader, transformers.PreTrainedModel):
        # Only a class of its own takes weights that lie in no folder.
        with torch.device("meta"):
            loader = type(loader.from_config(config, trust_remote_code=False))
    if method:
        loader = with_layers_for_experts(loader, method)
    state = {info.name: plain.read_rows(info, 0, info.rows) for info in plain.infos()}
    found: tuple[nn.Module, dict[str, Any]] = loader.from_pretrained(None, config=config, state_dict=state, **options)
    return found


def load_values(checkpoint: Checkpoint) -> nn.Module:
    """A causal language model with the values that a folder's codes stand for, in float32 and evaluation mode.

    Attention is computed as written down, product by product. Raises InputError where weights are missing.
    """
    transformers = transformers_library()
    options = {"dtype": torch.float32, "output_loading_info": True, "attn_implementation": "eager"}
    with quiet():
        model, info = _with_weights(transformers.AutoModelForCausalLM, checkpoint, options)
    if info["missing_keys"]:
        raise InputError(
            f"{checkpoint.path} lacks weights of {type(model).__name__}: {sorted(info['missing_keys'])[0]}."
        )
    return model.eval()


def rotary_module(path: Path) -> nn.Module:
    """The module of a causal language model that makes its rotary embedding; no weight is read."""
    transformers, config = transformers_library(), load_config(path)
    with torch.device("meta"), quiet():
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    found = next(module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding"))
    made: nn.Module = type(found)(config)
    return made


def build_model(path: Path) -> nn.Module:
    """A Hugging Face folder's model as its config.json describes it, float32, with no weights read.

    Its class is the one that config.json names, heads included.

    Raises:
        InputError: transformers cannot make a model of this configuration.
    """
    transformers = transformers_library()
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        if named is not None:
            model = named._from_config(config, dtype=torch.float32)
        else:
            model = transformers.AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        disable_caches(model.config)
        return model  # type: ignore[no-any-return]
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise not_made(path, "build", error) from error


def disable_caches(config: Any) -> None:
    """Turn off key-value caches of a configuration and of all that are nested in it, where each part looks."""
    if hasattr(config, "use_cache"):
        config.use_cache = False
    for name in getattr(config, "sub_configs", None) or {}:
        if (nested := getattr(config, name, None)) is not None:
            disable_caches(nested)


def named_class(config: Mapping[str, Any]) -> Any:
    """The class of transformers that a config.json names; None where there is none of that name."""
    return getattr(transformers_library(), (config.get("architectures") or [""])[0], None)


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


def output_head(module: nn.Module) -> nn.Module | None:
    """The layer that a model of transformers calls last of all, if its class says which it is."""
    named = getattr(module, "get_output_embeddings", None)
    head = named() if callable(named) else None
    return head if isinstance(head, nn.Module) else None


def _require(package: str, extra: str, purpose: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, extra, purpose)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder, a model's or its own. Raises InputError where there is none."""
    transformers = transformers_library()
    if not path.is_dir():
        raise InputError(f"{path} is no folder, so it has no tokenizer.", "Name one with --tokenizer FOLDER.")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        tokenizer("a \ue000")  # also what no vocabulary holds
        return tokenizer
    except Exception as error:  # transformers, and Rust below it, raise whatever a damaged file makes them stumble over
        reason = first_line(error)
        raise InputError(f"{path} has no usable tokenizer: {reason}", "Name one with --tokenizer FOLDER.") from error


def loadable_folder(path: Path) -> Path:
    """The path, or the folder that stands for a GGUF file: transformers loads folders."""
    if path.suffix.lower() != ".gguf":
        return path
    return open_checkpoint(path).folder or path


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
    config = read_config(require_folder(path) / "config.json")
    return _reads_more_than_text(config) or is_causal_config(config)


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


def tensor_inputs(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the tensors that the forward of a config.json's class may be given."""
    cls = named_class(config)
    taken = inspect.signature(cls.forward).parameters.values() if cls else ()
    return tuple(
        each.name for each in taken if "Tensor" in str(each.annotation) and "tuple" not in str(each.annotation)
    )


def decoder_start(model: nn.Module) -> int | None:
    """The token that an encoder-decoder's decoder starts from; None for a model of another kind.

    A decoder that reads several ids at once, those of a sound's codes, is none that a text can be given to: its class
    makes the first ones itself.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None
    decoders = [getattr(config, name, None) for name in ("decoder_config", "decoder")]
    side_by_side = [getattr(each, name, None) for each in decoders for name in ("num_channels", "num_codebooks")]
    return None if any(isinstance(count, int) and count > 1 for count in side_by_side) else _start_of(config)


def _start_of(config: Any) -> int:
    start = getattr(config, "decoder_start_token_id", None)
    return start if isinstance(start, int) else getattr(config, "bos_token_id", None) or 0


def decoder_of(path: Path) -> tuple[int, int]:
    """The token that the decoder of a folder's encoder-decoder starts from, and how many it reads at the most."""
    config = load_config(path)
    names = ("max_target_positions", "max_position_embeddings")
    longest = next((value for name in names if isinstance(value := getattr(config, name, None), int)), 512)
    return _start_of(config), longest


def load_config(path: Path) -> Any:
    """The configuration of a folder, as transformers reads it. Raises InputError where it cannot."""
    transformers = transformers_library()
    try:
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        raise not_made(path, "read", error) from error
