"""llama.cpp, asked to run a GGUF file: its log-probabilities beside those of torch on the same decoded weights.

It runs in a process apart, from the package xllamacpp. Weights are read back from the file; settings and tokenizer are
the original's, so that a setting, a tokenizer or an order of rows that was written wrongly gives other numbers.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantcli.conversion.checkpoint.gguf_file import GgufFile
from quantcli.errors import InputError, NotProvenError
from quantcli.system.child import Child, ChildFailedError
from quantcli.system.hardware import free_memory_bytes
from quantcli.system.parallel import usable_cores
from quantcli.system.text import format_bytes

PACKAGE = "xllamacpp"
#: Divergence of torch from llama.cpp, in nats, that rounding explains: beside codes it rounds inputs to 8 bits.
#: SmolLM2-135M has 0.01 with codes of 4 bits, 0.0002 without any, and some nats with rows in a wrong order.
MAX_KL_NATS, MAX_KL_NATS_PLAIN = 0.1, 0.01
#: Bytes a second of a file that is run, at the least, beside what starting takes.
_SLOWEST, _START_SECONDS = 5 << 20, 300
#: The likeliest tokens that are compared.
_TOKENS = 500
#: Tokens read before what follows is compared.
_LENGTHS = (4, 9, 25)
#: What tokenizers are compared on: letters and digits, other scripts, spaces in rows, what words end in.
TEXTS = (
    "The quick brown fox doesn't jump over 12345 lazy dogs; it's 3.14159 times too tired, they said.",
    "  Spaces   in rows,\tand tabs\n\nand lines:\n    if x == 1:\n        return f(x) ** 2  # why?\n",
    "\u00dcber na\u00efve caf\u00e9s, \u4f60\u597d\u4e16\u754c, \u041f\u0440\u0438\u0432\u0435\u0442, "
    "\u0645\u0631\u062d\u0628\u0627 \U0001f600!",
    "HELLO We'LL I'd 'Tis (1,000.50$) [x]{y} a_b-c/d\\e 2024-01-31T23:59:59Z www.example.com/?q=1&r=%20",
)


def reason_to_skip(file: GgufFile, verify: str | None, limit: int | None) -> tuple[str, bool] | None:
    """Why llama.cpp is not asked, and whether that is the user's own choice; None where it is."""
    if verify == "codes":
        return "--verify codes", True
    for package in (PACKAGE, "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed", False
    if verify == "run":
        return None
    allowed, bound = free_memory_bytes() // 2, "half of the free memory"
    if limit is not None and limit < allowed:
        allowed, bound = limit, "--max-memory allows"
    # torch holds the model in float32, twice while it is filled.
    needed = 8 * sum(tensor.layer.info.numel for tensor in file.tensors)
    if needed > allowed:
        return f"loaded beside torch, it takes {format_bytes(needed)}, more than {bound}", False
    return None


def skipped(reason: str, foreseen: bool) -> dict[str, Any]:
    """What manifest and report hold of a file that was not run."""
    about = {"checked": False, "run": "none", "reason": reason, "foreseen": foreseen}
    return about | {"summary": f"not checked by llama.cpp: {reason}"}


def planned(skip: tuple[str, bool] | None) -> dict[str, Any]:
    """What a report holds of a file that is only planned."""
    if skip:
        return skipped(*skip)
    summary = "llama.cpp is to run the file, beside torch on the decoded weights"
    return {"checked": False, "run": "all", "foreseen": True, "summary": summary}


def prove(path: Path, folder: Path, *, codes: bool) -> dict[str, Any]:
    """Let llama.cpp run a file.

    Args:
        path: the file.
        folder: settings and tokenizer of the original.
        codes: whether any weight is stored as codes.

    Returns:
        What it said, for manifest and report.

    Raises:
        InputError: it does not load the file, or computes something else than torch.
        NotProvenError: it gave no answer.
    """
    child = Child(f"{__name__}:run", {"file": str(path), "folder": str(folder), "threads": usable_cores()})
    try:
        answer = child.result(_START_SECONDS + path.stat().st_size / _SLOWEST)
    except ChildFailedError as error:
        if error.status == 1 and not error.of_memory:
            raise InputError(f"llama.cpp does not run the file: {error.end}.") from error
        raise NotProvenError(
            f"llama.cpp gave no answer as it ran the file: {error.end}.", "--verify codes goes on without its word."
        ) from error
    finally:
        child.stop()
    _refuse(answer, MAX_KL_NATS if codes else MAX_KL_NATS_PLAIN)
    summary = (
        f"llama.cpp ({PACKAGE} {answer['version']}) runs the file as torch runs its decoded weights: "
        f"{answer['kl_nats']:.1e} nats between their next tokens, {answer['texts']} texts in equal tokens"
    )
    return {"checked": True, "run": "all", "foreseen": True, "summary": summary, "llama_cpp": answer}


def _refuse(answer: Mapping[str, Any], limit: float) -> None:
    if (texts := answer["unequal"]) > 0:
        raise InputError(
            f"llama.cpp makes other tokens of {texts} of {answer['texts']} texts than the model's tokenizer.",
            "The tokenizer is of a kind that GGUF has no name for; --verify codes goes on without this check.",
        )
    if not answer["kl_nats"] <= limit:
        raise InputError(
            f"llama.cpp computes something else than torch on the same weights: {answer['kl_nats']:.3g} nats between "
            f"their next tokens, and rounding explains {limit}.",
            "The model uses what llama.cpp computes otherwise; --verify codes goes on without this check.",
        )


def run(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compare torch and llama.cpp on a file; see `prove` for the request."""
    import torch

    from quantcli.models.hugging_face import load_tokenizer

    torch.set_num_threads(request["threads"])
    tokenizer = load_tokenizer(Path(request["folder"]))
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    prompts = [ids[:length] for ids in tokens[:2] for length in _LENGTHS if len(ids) >= length]
    expected = log_probabilities(Path(request["file"]), Path(request["folder"]), prompts)
    with LlamaCpp(Path(request["file"]), request["threads"]) as runtime:
        theirs = [runtime.next_tokens(ids, _TOKENS) for ids in prompts]
        unequal = sum(runtime.tokens(text) != ids for text, ids in zip(TEXTS, tokens, strict=True))
    divergences = []
    for logits, found in zip(expected, theirs, strict=True):
        log_p = torch.tensor(list(found.values()), dtype=torch.float64)
        log_q = logits[list(found)].double()
        divergences.append(float((log_p.exp() * (log_p - log_q)).sum()))
    return {
        "version": version(PACKAGE), "kl_nats": sum(map(abs, divergences)) / len(prompts), "positions": len(prompts),
        "texts": len(TEXTS), "unequal": unequal,
    }  # fmt: skip


def log_probabilities(file: Path, folder: Path, prompts: list[list[int]]) -> Any:
    """Log-probabilities of the token after each prompt, float32 ``[prompts, tokens]``, by torch.

    Args:
        file: a GGUF file, whose weights are decoded.
        folder: whose config.json the model is made of.
        prompts: ids of tokens.
    """
    import torch

    from quantcli.checkpoint.decoded import decoded_checkpoint
    from quantcli.checkpoint.gguf.checkpoint import open_gguf
    from quantcli.models.hugging_face import build_model

    decoded = decoded_checkpoint(open_gguf(file))
    model = build_model(folder).eval()
    state = {info.name: decoded.read_rows(info, 0, info.rows).float() for info in decoded.infos()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()  # type: ignore[operator]
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise InputError(f"The file lacks weights, or has others: {[*missing, *unexpected][:3]}.")
    with torch.inference_mode():
        return torch.stack([model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1) for ids in prompts])


class LlamaCpp:
    """A GGUF file in llama.cpp, on the CPU."""

    def __init__(self, path: Path, threads: int, context: int = 512) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = context, 1, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        # The port of a server that others could ask is one that the system chooses, of this machine alone.
        settings.warmup, settings.port = False, 0
        self._server = xllamacpp.Server(settings)
        self._letter = self.tokens("a")[-1]

    def __enter__(self) -> LlamaCpp:
        """It is loaded."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release it."""
        del self._server

    def next_tokens(self, ids: list[int], count: int) -> dict[int, float]:
        """Log-probabilities of the ``count`` likeliest tokens after some, by token."""
        # What is said next is a letter: an end, or half of one, would be told without probabilities. These are of the
        # model's own logits, which the choice does not change.
        request = {"prompt": ids, "n_predict": 1, "n_probs": count, "logit_bias": [[self._letter, 1000.0]]}
        answer = self._server.handle_completions(request)
        first = answer["choices"][0]["logprobs"]["content"][0]
        return {each["id"]: each["logprob"] for each in first["top_logprobs"] if each["logprob"] is not None}

    def tokens(self, text: str) -> list[int]:
        """Ids of a text's tokens, without special ones in front."""
        import urllib.request

        body = json.dumps({"content": text, "add_special": False}).encode()
        address = f"{self._server.listening_address}/tokenize"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as reply:
            found: list[int] = json.loads(reply.read())["tokens"]
        return found
