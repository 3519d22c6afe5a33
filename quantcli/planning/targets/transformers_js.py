"""What transformers.js loads: one graph in the folder ``onnx``, whose file's name says how its weights are stored.

Read in releases 3.0 to 4.3 of the package ``@huggingface/transformers``: src/utils/dtypes.js has the names of files,
src/models/registry.js what its classes are, src/models/session.js how weights outside of a graph are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantcli.checkpoint.hugging_face import is_causal_config
from quantcli.core.scheme import Scheme
from quantcli.planning.recipe import Recipe, build_scheme
from quantcli.planning.targets.base import ExportedDecoder, GraphRequest, OnnxLayout, Refusal, no_checkpoint

CHECKED = {"transformers.js": "transformers.js 4.3"}
LOADS_ONNX = True
RULES = (no_checkpoint,)

#: By the dtype that a user of the library names, how the file of that dtype ends.
SUFFIXES = {"fp16": "_fp16", "int8": "_int8", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16", "bnb4": "_bnb4"}

#: Its WebGPU kernels are written for it, and files of this dtype that others make have it.
_GROUP_SIZE = 32

#: The onnxruntime that each release runs, of those that were looked up; others have that of the release before.
_ONNXRUNTIME = (((4, 3), "1.30"), ((4,), "1.24"), ((3, 6), "1.21"), ((3, 4), "1.20"), ((3,), "1.19"))

_TEXT_HEADS = (
    "bert", "camembert", "convbert", "deberta", "deberta-v2", "distilbert", "electra", "mpnet", "neobert", "roberta",
    "roformer", "xlm", "xlm-roberta",
)  # fmt: skip
#: Heads that have classes of their own, and the model types that these exist for.
HEADS: dict[str, tuple[str, ...]] = {
    "ForSequenceClassification": (
        *_TEXT_HEADS, "albert", "bart", "esm", "eurobert", "mbart", "mobilebert", "modernbert", "squeezebert",
    ),
    "ForTokenClassification": (*_TEXT_HEADS, "esm", "eurobert", "modernbert", "openai_privacy_filter"),
    "ForQuestionAnswering": (*_TEXT_HEADS, "albert", "mobilebert", "squeezebert"),
    "ForImageClassification": (
        "beit", "convnext", "convnextv2", "deit", "dinov2", "dinov2_with_registers", "efficientnet", "fastvit", "hiera",
        "ijepa", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3", "mobilenet_v4", "mobilevit", "mobilevitv2", "pvt",
        "resnet", "segformer", "swin", "vit", "vit_msn",
    ),
}  # fmt: skip
#: Model types of language models that it has classes for.
LANGUAGE_MODELS = (
    "afmoe", "apertus", "arcee", "bloom", "codegen", "cohere", "cohere2", "deepseek_v3", "deepseek_v4", "ernie4_5",
    "exaone", "falcon", "falcon_h1", "gemma", "gemma2", "gemma3_text", "gemma3n", "gemma4", "glm", "glm_moe_dsa",
    "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoehybrid", "helium",
    "hrm_text", "hunyuan_v1_dense", "jais", "lfm2", "lfm2_moe", "lfm3", "llama", "llama4_text", "ministral",
    "ministral3", "mistral", "mistral4", "mobilellm", "modernbert-decoder", "mpt", "nanochat", "nemotron_h", "olmo",
    "olmo2", "olmo3", "olmo_hybrid", "openelm", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_5",
    "qwen3_5_moe", "qwen3_5_text", "qwen3_moe", "qwen3_next", "smollm3", "solar_open", "stablelm", "starcoder2",
    "vaultgemma", "youtu", "zaya",
)  # fmt: skip
#: What its tokenizers and processors are made by.
_READERS = ("tokenizer.json", "preprocessor_config.json")
#: Sections of a config.json that speak of parts which the library keeps in files of their own.
_PARTS = ("vision_config", "audio_config", "text_config", "encoder", "decoder")


def dtype_of(scheme: Scheme, rest: str) -> str | None:
    """What the library calls weights of a scheme; None where it has no name for them."""
    weights = scheme.weights
    if weights.dtype == "int8":
        return "int8" if scheme.inputs is None else "q8"
    if weights.dtype == "int4":
        return "q4f16" if rest == "fp16" else "q4"
    return {"fp16": "fp16", "nf4": "bnb4"}.get(weights.dtype)


def only_folders(request: GraphRequest) -> Refusal | None:
    """A rule for outputs that are files, and for models that no config.json describes."""
    if request.output.suffix == ".onnx":
        return Refusal("it loads a folder, and the output names a file", "Name a folder with -o.")
    if request.config is None:
        return Refusal(
            "it opens a model by its config.json, and this one has none", "Name a folder as transformers saves it."
        )
    return None


def named_dtypes(request: GraphRequest) -> Refusal | None:
    """A rule for schemes that the library has no name for."""
    recipe = request.recipe
    known = "Use --scheme int4, int8, int8-dynamic, nf4 or fp16; --rest fp16 goes with int4."
    if recipe.rest == "bf16":
        return Refusal("it has no bf16", known)
    if recipe.scheme is not None and dtype_of(build_scheme(recipe.scheme), recipe.rest) is None:
        return Refusal(f"it has no name for files of {recipe.scheme}", known)
    return None


def known_classes(request: GraphRequest) -> Refusal | None:
    """A rule for models that the library has no class for, or that it keeps in several files."""
    config = request.config or {}
    model_type = str(config.get("model_type"))
    for name in map(str, config.get("architectures") or []):
        head = next((head for head in HEADS if name.endswith(head)), None)
        if head is None:
            continue
        if model_type in HEADS[head]:
            return None
        return Refusal(
            f"it has no {name}, since {model_type} is none of the model types that it knows {head} of",
            "Use --target onnxruntime, or a model of another type.",
        )
    parts = [part for part in _PARTS if part in config]
    if config.get("is_encoder_decoder") or parts:
        why = f"its config.json has {parts[0]}" if parts else "it is an encoder with a decoder"
        return Refusal(
            f"it keeps {model_type} in several files, and one would be written: {why}", "Export each by hand."
        )
    return None


def supported_release(request: GraphRequest) -> Refusal | None:
    """A rule for releases before files were named by dtypes."""
    if request.target.is_before("3"):
        return Refusal("releases before 3 know no such files", "Use transformers.js 3 or newer.")
    return None


def decoders(request: GraphRequest) -> Refusal | None:
    """A rule for language models in releases whose onnxruntime does not run lookups in codes of a byte (tried: 3.8)."""
    if is_causal_config(request.config) and request.target.is_before("4"):
        return Refusal(
            "releases before 4 do not run decoders as they are written here", "Use transformers.js 4 or newer."
        )
    return None


def known_language_model(decoder: ExportedDecoder) -> Refusal | None:
    """A rule for architectures that the library has no class for."""
    if decoder.model_type in LANGUAGE_MODELS:
        return None
    return Refusal(
        f"{decoder.target.name} has no class for {decoder.model_type}",
        "Use --target onnxruntime-genai, which runs any decoder with a cache.",
    )


def cache_sized_by_graph(decoder: ExportedDecoder) -> Refusal | None:
    """A rule for releases that reckon the cache's sizes from config.json, and often otherwise than the model has it."""
    if not decoder.target.is_before("4.2"):
        return None
    return Refusal(
        f"releases before 4.2 do not read the sizes of the cache of {decoder.model_type} from its graph",
        "Use transformers.js 4.2 or newer.",
    )


DECODER_RULES = (known_language_model, cache_sized_by_graph)
GRAPH_RULES = (only_folders, supported_release, named_dtypes, decoders, known_classes)


def completed(recipe: Recipe) -> Recipe:
    """A recipe with what goes without saying: the format, and groups of the size that its kernels are made for."""
    wishes: dict[str, Any] = {} if recipe.format else {"format": "onnx"}
    if recipe.scheme == "int4" and recipe.group_size is None:
        wishes["group_size"] = _GROUP_SIZE
    return recipe.model_copy(update=wishes)


def onnx_layout(recipe: Recipe, scheme: Scheme) -> OnnxLayout:
    """Where a graph lies whose weights have a scheme, for the most part."""
    dtype = dtype_of(scheme, recipe.rest)
    assert dtype is not None, "such schemes are refused before"
    name = f"model{SUFFIXES[dtype]}.onnx"

    def config(own: Mapping[str, Any], outside: bool) -> dict[str, Any]:
        """A config.json that has the file loaded without being told its dtype."""
        settings = {**own.get("transformers.js_config", {}), "dtype": dtype}
        # Caches are float32, which is what holds where this says nothing.
        settings.pop("kv_cache_dtype", None)
        settings.pop("use_external_data_format", None)
        if outside:
            settings["use_external_data_format"] = {name: 1}
        plain = {key: value for key, value in own.items() if key != "quantization_config"}
        if plain.get("multi_query"):
            # It takes that for a cache that holds keys and values in one tensor, as no graph of ours has it.
            plain["multi_query"] = False
        return {**plain, "transformers.js_config": settings}

    return OnnxLayout(f"onnx/{name}", f"{name}_data", config, _READERS)


def onnxruntime_version(version: str) -> str:
    """The onnxruntime in a release."""
    numbers = tuple(int(part) for part in version.split("."))
    return next(runtime for first, runtime in _ONNXRUNTIME if numbers >= first)
