"""What a GPU makes of a model beside what the CPU makes of it, by scheme and algorithm, and the time that both take.

Run: .venv/bin/python tests/benchmarks/compare_devices.py [int4] [nf4] [int8] [training]     (all by default)

int4      gptq, awq, awq + gptq and autoround in four bits, groups of 64
nf4       gptq on the grid of bitsandbytes
int8      smoothquant with scales of inputs that are found at inference, and with fixed ones
training  tune and qat, after gptq

SmolLM2-135M, 32 x 256 tokens of calibration. Of the two artifacts it shows the share of codes that are equal, the
largest difference between two scales relative to the larger one, and of their outputs on held-out prose the
Kullback-Leibler divergence and the signal to noise, each beside what quantization itself costs. Products are rounded
otherwise on another processor, so that codes chosen from data differ in part: what must not differ is what the model
loses. On a machine without a GPU it says so, and ends with status 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from benchmark_algorithms import subject, texts
from harness import line, main, show
from safetensors.torch import load_file
from torch import Tensor

SEQUENCES, TOKENS, EVALUATED = 32, 256, 16
#: Of what quantization costs on the CPU, how much more it may cost on the GPU.
MOST = 1.1

CHAINS: dict[str, dict[str, dict[str, Any]]] = {
    "int4": {
        " + ".join(next(iter(step)) if isinstance(step, dict) else step for step in steps): {
            "scheme": "int4",
            "group_size": 64,
            "steps": steps,
        }
        for steps in (["gptq"], ["awq"], ["awq", "gptq"], [{"autoround": {"iterations": 60}}])
    },
    "nf4": {"gptq": {"scheme": "nf4", "steps": ["gptq"]}},
    "int8": {
        f"{scheme}, smoothquant": {"scheme": scheme, "steps": ["smoothquant"]}
        for scheme in ("int8-dynamic", "int8-static")
    },
    "training": {
        "gptq + tune": {"scheme": "int4", "group_size": 64, "steps": ["gptq", "tune"]},
        "gptq + qat": {"scheme": "int4", "group_size": 64, "steps": ["gptq", {"qat": {"steps": 20}}]},
    },
}


def compare(chains: dict[str, dict[str, Any]], folder: Path) -> None:
    """Convert by every chain on both devices, and show what they have in common."""
    from quantcli import convert
    from quantcli.planning.recipe import Recipe

    model = subject(folder)
    calibration, evaluated = texts(folder)
    for name, wishes in chains.items():
        seconds = []
        for device in ("cpu", "cuda"):
            start = perf_counter()
            convert(
                model, folder / f"{name} {device}", recipe=Recipe(**wishes), data=calibration, samples=SEQUENCES,
                seq_len=TOKENS, device=device, verify="codes",
            )  # fmt: skip
            seconds.append(perf_counter() - start)
        near, far = (folder / f"{name} {device}" for device in ("cpu", "cuda"))
        show(f"{name}: seconds on the CPU, and on the GPU", f"{seconds[0]:.1f}, {seconds[1]:.1f}")
        show(f"{name}: times as fast", f"{seconds[0] / seconds[1]:.2f} x")
        _show_tensors(name, tensors(near), tensors(far), bits=4 if wishes["scheme"] in ("int4", "nf4") else 8)
        _show_outputs(name, model, near, far, evaluated["prose"])


def tensors(artifact: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by name."""
    return {name: part for file in sorted(artifact.glob("*.safetensors")) for name, part in load_file(file).items()}


def equal_codes(near: dict[str, Tensor], far: dict[str, Tensor], bits: int) -> float:
    """The share of codes that are equal: of bytes, or of their halves where two codes are in one."""
    same = total = 0
    for name, values in near.items():
        if values.is_floating_point() or not values.ndim or name.endswith("_shape"):
            continue
        one, other = (each.contiguous().view(torch.uint8) for each in (values, far[name]))
        for mask in (0x0F, 0xF0) if bits == 4 else (0xFF,):
            same += int(((one & mask) == (other & mask)).sum())
            total += one.numel()
    return same / total


def largest_difference(near: dict[str, Tensor], far: dict[str, Tensor]) -> float:
    """Of two scales at one place, relative to the larger one, over all of them."""
    found = [0.0]
    for name, values in near.items():
        if values.is_floating_point() and name.endswith(("_scale", ".absmax", ".scales")):
            one, other = values.double(), far[name].double()
            largest = torch.maximum(one.abs(), other.abs()).clamp(min=1e-300)
            found.append(float(((one - other).abs() / largest).max()))
    return max(found)


def _show_tensors(name: str, near: dict[str, Tensor], far: dict[str, Tensor], bits: int) -> None:
    same = near.keys() == far.keys()
    line(f"{name}: tensors", "the same" if same else "differ", "the same", same)
    show(f"{name}: equal codes", f"{equal_codes(near, far, bits):.2%}")
    show(f"{name}: largest difference of scales", f"{largest_difference(near, far):.2g}")
    finite = all(bool(values.isfinite().all()) for values in far.values() if values.is_floating_point())
    line(f"{name}: values of the GPU's artifact", "finite" if finite else "not finite", "finite", finite)


def _show_outputs(name: str, model: Path, near: Path, far: Path, text: Path) -> None:
    """Divergence of the two from each other, and of each from the original."""
    from quantcli import evaluate

    asked: dict[str, Any] = {"data": text, "task": "fidelity", "samples": EVALUATED, "seq_len": TOKENS}
    between = evaluate(near, [far], **asked).models[1].metrics
    shown = {key: between[key] for key in sorted(between) if "kl" in key or "sqnr" in key}
    show(f"{name}: one beside the other", ", ".join(f"{key} {_figure(value)}" for key, value in shown.items()))
    costs = [each.metrics for each in evaluate(model, [near, far], **asked).models[1:]]
    key = next(key for key in costs[0] if key.endswith("kl_nats"))
    cpu, gpu = (float(each[key]) for each in costs)
    line(f"{name}: KL to the original, GPU beside CPU", f"{gpu:.4f}, {cpu:.4f}", f"<= {MOST} x", gpu <= MOST * cpu)


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


PARTS = {
    name: (lambda folder, chains=chains: compare(chains, folder), "SmolLM2-135M on the CPU and on the GPU")
    for name, chains in CHAINS.items()
}

if __name__ == "__main__":
    if not torch.cuda.is_available() and not {"-h", "--help"} & set(sys.argv[1:]):
        print(f"torch {torch.__version__} sees no GPU on this machine, so that there is nothing to compare.")
        sys.exit(2)
    main(__doc__ or "", PARTS)
