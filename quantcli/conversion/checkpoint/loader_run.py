"""An artifact loaded by transformers and run on made-up inputs, layer by layer beside our own decoding of its codes.

Runs in a process apart.
"""

from __future__ import annotations

import gc
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.decoded import DecodedCheckpoint
from quantcli.checkpoint.quantized import QuantizedCheckpoint, open_quantized
from quantcli.conversion.checkpoint.loader_load import Blocks, load
from quantcli.conversion.checkpoint.made_up_inputs import candidates
from quantcli.conversion.checkpoint.writer import ranges
from quantcli.core.scheme import INPUT_SCALE
from quantcli.models.hugging_face import disable_caches
from quantcli.system.child import raise_if_out_of_memory
from quantcli.system.text import first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Rows of a layer's inputs that are compared, and rows of random signs that tell how large rounding errors may be.
_ROWS, _SIGNS = 8, 4
#: Values of a weight that are decoded at a time: as float32 they fill a cache.
_DECODED = 1 << 18
#: What rounding to a compute dtype may change, in units of its own rounding error: weights, products and sums.
_ROUNDINGS = 4
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def prove(request: dict[str, Any]) -> dict[str, Any]:
    """Load, run, compare.

    ``request``: ``artifact``, ``original``, ``threads``, ``keep`` (see `loader_load.load`; empty for the whole model),
    and by the file's name the tensor that the library makes of a quantized weight (``loaded``), or that it becomes a
    part of (``joined``).

    Raises:
        MemoryError: the model does not fit.
    """
    import torch

    torch.set_num_threads(max(1, request["threads"]))
    original, keep = request["original"], request["keep"]
    model, answer = load(request["artifact"], original, None, keep=keep)
    if model is None or answer.get("problems"):
        return answer
    disable_caches(model.config)
    quantized = open_quantized(open_checkpoint(Path(request["artifact"])))
    comparison = _Comparison(model.eval(), quantized, request["loaded"], request["joined"])
    del model
    with torch.no_grad():
        comparison.run()
        if not comparison.problems:
            comparison.call_others()
            comparison.compare_joined()
        ran, problems, error = comparison.counts(), comparison.problems, comparison.error
        if error:
            broken, dtype = comparison.broken, comparison.model.dtype
            # The original takes the place of the artifact in memory.
            del comparison
            gc.collect()
            reason = _why_it_should_run(dtype, original, keep)
            if reason:
                problems.insert(0, f"it does not run{f' in {broken}' if broken else ''} ({error}), {reason}")
            ran["forward"] = f"no forward pass with made-up inputs, of the original either: {error}"
    return answer | {"ran": ran, "problems": problems}


def _why_it_should_run(dtype: torch.dtype, original: str, keep: Blocks) -> str | None:
    """What of the original runs on inputs that the artifact does not run on; None where nothing does."""
    model, _ = load(original, original, None, keep=keep)
    if model is None or not _runs(model):
        return None
    if model.dtype != dtype:
        del model
        gc.collect()
        model, _ = load(original, original, None, dtype, keep)
    runs = model is not None and _runs(model)
    return _AS_ORIGINAL if runs else _WIDE.format(str(dtype).removeprefix("torch."))


_AS_ORIGINAL = "and the original does"
_WIDE = "and neither does the original in {}: --rest keep leaves what is not quantized as it is"


def _runs(model: Any) -> bool:
    disable_caches(model.config)
    for inputs in candidates(model):
        try:
            model(**inputs)
        except Exception as error:
            raise_if_out_of_memory(error)
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

    def counts(self) -> dict[str, Any]:
        """Layers compared: reached by the forward pass, called by themselves, and joined with others."""
        return {"by_forward": self._reached, "by_themselves": self._called, "joined": self._sliced}

    def run(self) -> None:
        """One forward pass on the first inputs that the model takes, with every quantized layer compared."""
        begun: list[str] = []
        hooks = []
        for name, module in self.layers.items():
            hooks.append(module.register_forward_pre_hook(self._beginning(name, begun)))
            hooks.append(module.register_forward_hook(self._hook(name, begun), with_kwargs=True))
        for inputs in candidates(self.model):
            begun.clear()
            self._seen.clear()
            self.problems.clear()
            try:
                self.model(**inputs)
            except Exception as error:
                raise_if_out_of_memory(error)
                self.error = self.error or f"{type(error).__name__}: {first_line(error)}"
                self.broken = self.broken or next(iter(reversed(begun)), None)
                continue
            self.error = self.broken = None
            break
        for hook in hooks:
            hook.remove()
        self._reached = len(self._seen)

    def _beginning(self, name: str, begun: list[str]) -> Any:
        crashes = self.quantized.weights[name].scheme.weights.dtype == "nf4" and _crashes_without_rows()

        def begin(_: Any, args: Any) -> None:
            begun.append(name)
            if crashes and args and not args[0].numel():
                raise RuntimeError("it is given no rows, at which bitsandbytes crashes on this processor")

        return begin

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
                raise_if_out_of_memory(error)
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

    def _product(self, name: str, x: Tensor) -> Tensor:
        """Inputs ``[rows, columns]`` times the decoded weight, of which only a few rows at a time are held."""
        import torch

        info, transposed = self.infos[name], self.quantized.weights[name].transposed
        parts = []
        for start, stop in ranges(info.rows, info.columns, _DECODED, 1):
            values = self.values.read_rows(info, start, stop)
            parts.append(x[:, start:stop] @ values if transposed else x @ values.T)
        return torch.stack(parts).sum(0) if transposed else torch.cat(parts, 1)

    def _compare(self, name: str, given: Tensor, output: Tensor) -> None:
        """Hold one layer's output against the product of its input and the decoded weight."""
        import torch

        scheme = self.quantized.weights[name].scheme
        x, y = (each.detach().reshape(-1, each.shape[-1]) for each in (given, output))
        step = max(1, len(x) // _ROWS)
        x, y = x[::step][:_ROWS].float(), y[::step][:_ROWS].float()
        bias = getattr(self.layers[name], "bias", None)
        steps = torch.zeros(len(x), 1)
        if scheme.inputs is not None and scheme.inputs.dynamic:
            steps = x.abs().amax(1, keepdim=True) / 127
        elif scheme.inputs is not None:
            scale = self.quantized.checkpoint.load(f"{name.removesuffix('weight')}{INPUT_SCALE}").float().reshape(())
            steps = steps + scale
            x = x.clamp(-128 * scale, 127 * scale)
        # Rounding errors are random: they add up like the squares of the products do, which is what random signs give.
        signs = torch.randint(2, (_SIGNS, x.shape[1]), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        rows = torch.cat([x, signs * x.square().mean(0).sqrt(), signs])
        multiplied = self._product(name, rows)
        expected, products, sums = multiplied[: len(x)], multiplied[len(x) : -_SIGNS], multiplied[-_SIGNS:]
        if bias is not None:
            expected = expected + bias.detach().float()
        epsilon = max(torch.finfo(output.dtype).eps, torch.finfo(given.dtype).eps, 1e-5)
        if scheme.weights.dtype == "nf4":
            # On processors that have it, bitsandbytes multiplies in bfloat16, whatever the inputs are.
            epsilon = max(epsilon, torch.finfo(torch.bfloat16).eps)
        error, size = float(_rms(y - expected)), float(_rms(expected))
        limit = _ROUNDINGS * epsilon * (float(_rms(products)) + size) + float(_rms(steps) * _rms(sums))
        if not error <= limit and bool(torch.isfinite(expected).all()):
            self.problems.append(
                f"{name} computes something else than its codes say (error {error:.3g} of {size:.3g}, {limit:.3g} "
                "allowed)"
            )


@cache
def _crashes_without_rows() -> bool:
    """Whether bitsandbytes (0.50) multiplies by its kernel for AVX512-BF16, which divides by the number of rows."""
    from bitsandbytes import functional

    return bool(getattr(functional, "has_avx512bf16", lambda: False)())


def _rms(values: Tensor) -> Tensor:
    """Root of the mean square."""
    return values.square().mean().sqrt()
