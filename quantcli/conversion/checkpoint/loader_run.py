"""An artifact loaded by transformers and run on made-up inputs, layer by layer beside our own decoding of its codes.

Runs in a process apart.
"""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.decoded import DecodedCheckpoint
from quantcli.checkpoint.quantized import QuantizedCheckpoint, open_quantized
from quantcli.conversion.checkpoint.made_up_inputs import candidates
from quantcli.conversion.checkpoint.transformers_check import load
from quantcli.core.scheme import INPUT_SCALE
from quantcli.system.text import first_line

if TYPE_CHECKING:
    from torch import Tensor

#: Rows of a layer's inputs that are compared.
_ROWS = 64
#: What rounding to a compute dtype may change, in units of its own rounding error: weights, products and sums.
_ROUNDINGS = 4
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def prove(request: dict[str, Any]) -> dict[str, Any]:
    """Load, run, compare.

    ``request``: ``artifact``, ``original``, ``threads``, and by the file's name the tensor that the library makes of a
    quantized weight (``loaded``), or that it becomes a part of (``joined``).
    """
    import torch

    torch.set_num_threads(max(1, request["threads"]))
    model, answer = load(request["artifact"], request["original"], None)
    if model is None or answer.get("problems"):
        return answer
    quantized = open_quantized(open_checkpoint(Path(request["artifact"])))
    comparison = _Comparison(model.eval(), quantized, request["loaded"], request["joined"])
    with torch.no_grad():
        comparison.run()
        if comparison.error and (reason := _why_it_should_run(comparison, request["original"])):
            broken = f" in {comparison.broken}" if comparison.broken else ""
            comparison.problems.insert(0, f"it does not run{broken} ({comparison.error}), {reason}")
        elif not comparison.problems:
            comparison.call_others()
            comparison.compare_joined()
    reached, called, joined = comparison.counts
    ran: dict[str, Any] = {"by_forward": reached, "by_themselves": called, "joined": joined}
    if comparison.error:
        ran["forward"] = f"no forward pass with made-up inputs, of the original either: {comparison.error}"
    return answer | {"ran": ran, "problems": comparison.problems}


def _why_it_should_run(comparison: _Comparison, original: str) -> str | None:
    """What of the original runs on inputs that the artifact does not run on; None where nothing does."""
    dtype = comparison.model.dtype
    comparison.model = None
    gc.collect()
    model, _ = load(original, original, None)
    if model is None or not _runs(model):
        return None
    if model.dtype != dtype:
        del model
        gc.collect()
        model, _ = load(original, original, None, dtype)
    runs = model is not None and _runs(model)
    return _AS_ORIGINAL if runs else _WIDE.format(str(dtype).removeprefix("torch."))


_AS_ORIGINAL = "and the original does"
_WIDE = "and neither does the original in {}: --rest keep leaves what is not quantized as it is"


def _runs(model: Any) -> bool:
    for inputs in candidates(model):
        try:
            model(**inputs)
        except Exception:
            continue
        return True
    return False


class _Comparison:
    """Every quantized layer of a loaded model beside the values that its codes stand for."""

    def __init__(self, model: Any, quantized: QuantizedCheckpoint, loaded: dict[str, str], joined: dict[str, str]):
        self.model: Any = model
        self.quantized, self.values = quantized, DecodedCheckpoint(quantized)
        self.infos = {info.name: info for info in self.values.infos()}
        modules = dict(model.named_modules())
        self.layers = {}
        for name in quantized.weights:
            module, _, leaf = loaded.get(name, "").rpartition(".")
            if leaf == "weight" and module in modules:
                self.layers[name] = modules[module]
        self.joined = {name: joined[name] for name in quantized.weights if name in joined}
        self.problems: list[str] = []
        self.error: str | None = None
        self.broken: str | None = None
        self._seen: set[str] = set()
        self._reached = self._called = self._sliced = 0

    @property
    def counts(self) -> tuple[int, int, int]:
        """Layers compared: reached by the forward pass, called by themselves, and joined with others."""
        return self._reached, self._called, self._sliced

    def run(self) -> None:
        """One forward pass on the first inputs that the model takes, with every quantized layer compared."""
        begun: list[str] = []
        hooks = []
        for name, module in self.layers.items():
            hooks.append(module.register_forward_pre_hook(lambda _, __, name=name: begun.append(name)))
            hooks.append(module.register_forward_hook(self._hook(name, begun), with_kwargs=True))
        for inputs in candidates(self.model):
            begun.clear()
            self._seen.clear()
            self.problems.clear()
            try:
                self.model(**inputs)
            except Exception as error:
                self.error = self.error or f"{type(error).__name__}: {first_line(error)}"
                self.broken = self.broken or next(iter(reversed(begun)), None)
                continue
            self.error = self.broken = None
            break
        for hook in hooks:
            hook.remove()
        self._reached = len(self._seen)

    def _hook(self, name: str, begun: list[str]) -> Any:
        def compare(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            begun.remove(name)
            given = args[0] if args else next(iter(kwargs.values()))
            if name not in self._seen and given.numel():
                self._seen.add(name)
                self._compare(name, given, output)

        return compare

    def call_others(self) -> None:
        """Layers that the forward pass did not come to, on inputs of their own."""
        import torch

        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        noise = torch.Generator().manual_seed(0)
        for name, module in self.layers.items():
            if name in self._seen:
                continue
            given = torch.randn(4, self.quantized.weights[name].shape[1], generator=noise).to(dtype)
            try:
                self._compare(name, given, module(given))
            except Exception as error:
                self.problems.append(f"{name} does not run: {type(error).__name__}: {first_line(error)}")
            self._called += 1

    def compare_joined(self) -> None:
        """Experts that the library holds in one tensor per layer: each must be a part of it."""
        import torch

        for name, place in self.joined.items():
            number = _EXPERT.search(name)
            whole = self.model.get_parameter(place)
            if number is None or whole.ndim != 3:
                continue
            held, wanted = whole[int(number[1])].float(), self._decoded(name)
            rows, columns = wanted.shape
            parts = [
                part
                for each in (held, held.T)
                if each.shape[1] == columns and each.shape[0] >= rows
                for part in (each[:rows], each[-rows:], each[::2], each[1::2])
                if part.shape == wanted.shape
            ]
            limit = 4 * torch.finfo(whole.dtype).eps * float(wanted.abs().max())
            if not any(bool(((part - wanted).abs() <= limit).all()) for part in parts):
                self.problems.append(f"{name}: {place} holds other values than its codes say")
            self._sliced += 1

    def _decoded(self, name: str) -> Tensor:
        info = self.infos[name]
        values = self.values.read_rows(info, 0, info.rows)
        return values.T if self.quantized.weights[name].transposed else values

    def _compare(self, name: str, given: Tensor, output: Tensor) -> None:
        """Hold one layer's output against the product of its input and the decoded weight."""
        import torch

        weight, scheme = self._decoded(name), self.quantized.weights[name].scheme
        x = given.detach().reshape(-1, given.shape[-1])[:_ROWS].float()
        y = output.detach().reshape(-1, output.shape[-1])[:_ROWS].float()
        bias = getattr(self.layers[name], "bias", None)
        steps = torch.zeros(len(x), 1)
        if scheme.inputs is not None and scheme.inputs.dynamic:
            steps = x.abs().amax(1, keepdim=True) / 127
        elif scheme.inputs is not None:
            scale = self.quantized.checkpoint.load(f"{name.removesuffix('weight')}{INPUT_SCALE}").float().reshape(())
            steps = steps + scale
            x = x.clamp(-128 * scale, 127 * scale)
        expected = x @ weight.T
        if bias is not None:
            expected = expected + bias.detach().float()
        # Rounding errors are random: they add up like the squares of the products do.
        size = (x.square() @ weight.square().T).sqrt() + expected.abs()
        epsilon = max(torch.finfo(output.dtype).eps, torch.finfo(given.dtype).eps, 1e-5)
        if scheme.weights.dtype == "nf4":
            # On processors that have it, bitsandbytes multiplies in bfloat16, whatever the inputs are.
            epsilon = max(epsilon, torch.finfo(torch.bfloat16).eps)
        allowed = _ROUNDINGS * epsilon * size + steps * weight.square().sum(1).sqrt()
        error = float((y - expected).square().mean().sqrt())
        limit = float(allowed.square().mean().sqrt())
        if not error <= limit and bool(torch.isfinite(expected).all()):
            self.problems.append(
                f"{name} computes something else than its codes say (error {error:.3g} of "
                f"{float(expected.square().mean().sqrt()):.3g}, {limit:.3g} allowed)"
            )
