"""llm-compressor and AutoRound as their documentation says to use them, each in an environment of its own.

Both get a model folder and token ids ``[samples, tokens]``, and give the model back with its weights quantized and
dequantized again: plain floats, so that everybody's result is measured by the same code.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

#: What is installed, in this order; torch is named first and by its CPU version, or a CUDA build would come.
REQUIREMENTS = {
    "llm-compressor": ("torch==2.13.0", "llmcompressor==0.14.0"),
    "auto-round": ("torch==2.13.0", "auto-round==0.16.0"),
}

_LLM_COMPRESSOR = """
import sys
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

source, windows, output, group_size = sys.argv[1:]
ids = load_file(windows)["input_ids"]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=int(group_size))
recipe = GPTQModifier(
    config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
)
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
oneshot(
    model=model, tokenizer=AutoTokenizer.from_pretrained(source), dataset=data, recipe=recipe,
    num_calibration_samples=len(ids), max_seq_length=ids.shape[1],
)
# Until it is compressed for saving, the model's weights are what their codes say.
plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
found = model.state_dict()
plain.load_state_dict({name: found[name] for name in plain.state_dict()})
plain.save_pretrained(output)
"""

_AUTO_ROUND = """
import sys
from pathlib import Path
import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

source, windows, output, group_size, iterations, batch_size = sys.argv[1:]
ids = load_file(windows)["input_ids"]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
rounder = AutoRound(
    model, AutoTokenizer.from_pretrained(source), bits=4, group_size=int(group_size), sym=True,
    dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids],
    nsamples=len(ids), seqlen=ids.shape[1], iters=int(iterations), batch_size=int(batch_size),
)
rounder.quantize()
plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
found = rounder.model.state_dict()
plain.load_state_dict({name: found[name] for name in plain.state_dict()})
plain.save_pretrained(output)
"""

#: Its choice of schemes alone, without a quantization by them.
_AUTO_SCHEME = """
import json
import sys
import torch
from auto_round import AutoRound, AutoScheme
from auto_round.auto_scheme.gen_auto_scheme import GenScheme
from transformers import AutoModelForCausalLM, AutoTokenizer

source, texts, output, bits = sys.argv[1:]
found = GenScheme.get_layer_config

def kept(self):
    chosen = {name: entry["bits"] for name, entry in found(self).items()}
    with open(output, "w") as file:
        json.dump(chosen, file)
    raise SystemExit(0)

GenScheme.get_layer_config = kept
given = {"dataset": texts, "nsamples": 16, "seqlen": 256}
scheme = AutoScheme(avg_bits=float(bits), options=("W4A16", "W8A16"), batch_size=4, **given)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
AutoRound(model, AutoTokenizer.from_pretrained(source), scheme=scheme, iters=0, **given).quantize()
"""

_SCRIPTS = {"llm-compressor": _LLM_COMPRESSOR, "auto-round": _AUTO_ROUND}


#: Runs a program and writes its peak memory: a child is counted as at least as large as what started it.
_LAUNCHER = """
import os, sys
place, *command = sys.argv[1:]
child = os.fork()
if not child:
    os.execvp(command[0], command)
_, status, usage = os.wait4(child, 0)
with open(place, "w") as file:
    file.write(str(usage.ru_maxrss * 1024))
sys.exit(os.waitstatus_to_exitcode(status) and 1)
"""


@dataclass(frozen=True)
class Cost:
    """What a program took: seconds by the clock, seconds of all cores together, and memory at the peak."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.wall_seconds:.0f} s, {self.cpu_seconds:.0f} CPU-s"


def measured(command: Sequence[object], log: Path, *, threads: int) -> Cost:
    """Run a program to its end; what it says goes to ``log``. Raises RuntimeError where it fails."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    start, peak = time.monotonic(), log.with_suffix(".peak")
    with log.open("wb") as stream:
        launched = [sys.executable, "-I", "-S", "-c", _LAUNCHER, peak, *map(str, command)]
        child = subprocess.Popen(
            launched, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | counts | offline, cwd=log.parent
        )
        # Popen's own wait would throw away what the system counted.
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise RuntimeError(f"{command[0]} ended with status {child.returncode}; the end of {log}:\n{tail}")
    return Cost(time.monotonic() - start, usage.ru_utime + usage.ru_stime, int(peak.read_text()))


def environment(name: str, cache: Path) -> Path:
    """The Python of a peer's own environment, made where the cache has none for these requirements."""
    folder, wanted = cache / "environments" / name, "\n".join(REQUIREMENTS[name])
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]], check=True)
        stamp.write_text(wanted)
    return python


def auto_scheme(
    model: Path, text: Path, folder: Path, cache: Path, bits: float, *, threads: int
) -> tuple[dict[str, int], Cost]:
    """AutoRound's AutoScheme: bits of each linear layer, 4 or 8, that make so many on average; and what it took.

    Args:
        model: a Hugging Face folder.
        text: what it calibrates on.
        folder: for files on the way.
        cache: where environments are kept.
        bits: the average, scales included, as it counts them.
        threads: threads of the program.
    """
    whole, part = text.read_text(encoding="utf-8"), 6000
    records = [json.dumps({"text": whole[at : at + part]}) + "\n" for at in range(0, len(whole) - part, part)]
    (folder / "texts.jsonl").write_text("".join(records), encoding="utf-8")
    paths = [path.resolve() for path in (model, folder / "texts.jsonl", folder / "bits.json")]
    command = [environment("auto-round", cache), "-c", _AUTO_SCHEME, *paths, bits]
    cost = measured(command, folder / "auto-scheme.log", threads=threads)
    return json.loads((folder / "bits.json").read_text()), cost


def quantized(
    name: str,
    model: Path,
    windows: Path,
    cache: Path,
    options: Mapping[str, int],
    *,
    threads: int,
    fresh: bool = False,
) -> tuple[Path, Cost]:
    """A peer's result as a folder of plain floats, and what it took; from the cache where the task was the same.

    Args:
        name: a key of `REQUIREMENTS`.
        model: a Hugging Face folder.
        windows: a safetensors file with ``input_ids`` ``[samples, tokens]``.
        cache: where environments and results are kept.
        options: in the order of the script's arguments.
        threads: threads of the program.
        fresh: do it again even so.
    """
    from hashlib import sha256

    task = {
        "requirements": REQUIREMENTS[name], "options": dict(options), "threads": threads, "script": _SCRIPTS[name],
        "model": sha256((model / "model.safetensors").read_bytes()).hexdigest(),
        "windows": sha256(windows.read_bytes()).hexdigest(),
    }  # fmt: skip
    key = sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / "results" / f"{name}-{key}"
    record = folder / "cost.json"
    if fresh or not record.is_file():
        python = environment(name, cache)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        paths = [path.resolve() for path in (model, windows, folder)]
        cost = measured([python, "-c", _SCRIPTS[name], *paths, *options.values()], folder / "log.txt", threads=threads)
        for file in model.glob("*token*"):
            shutil.copy(file, folder)
        record.write_text(json.dumps(asdict(cost)))
    return folder, Cost(**json.loads(record.read_text()))
