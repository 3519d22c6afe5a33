"""What options can be given, as the registries list it: for help, for shell completion and for the reference pages."""

from __future__ import annotations

from collections.abc import Callable


def schemes() -> list[str]:
    """Schemes that have a name."""
    from quantcli.core.scheme import PRESETS

    return [*PRESETS]


def algorithms() -> list[str]:
    """Algorithms, and what stands for the recommended one."""
    from quantcli.algorithms import ALGORITHMS

    return ["auto", *ALGORITHMS]


def formats() -> list[str]:
    """Formats of checkpoints, and ONNX."""
    from quantcli.formats import FORMATS

    return [*FORMATS]


def targets() -> list[str]:
    """Runtimes that a plan can be checked for."""
    from quantcli.planning.targets import TARGETS

    return [*TARGETS]


def tasks() -> list[str]:
    """Tasks that `eval` has metrics for."""
    from quantcli.evaluation.tasks import TASKS

    return ["auto", *TASKS]


def methods() -> list[str]:
    """How ranges of activations can be chosen, the default first."""
    from quantcli.calibration.ranges import DEFAULT_METHOD, METHODS

    return [*dict.fromkeys([DEFAULT_METHOD, *METHODS])]


def rests() -> list[str]:
    """What can become of tensors that are not quantized."""
    return ["keep", "fp16", "bf16"]


def devices() -> list[str]:
    """Where blocks can be calibrated and trained."""
    return ["cpu", "cuda"]


def verifications() -> list[str]:
    """How an artifact is proven by the library that loads it."""
    return ["codes", "run"]


#: The choices of an option, by the name of the parameter.
CHOICES: dict[str, Callable[[], list[str]]] = {
    "scheme": schemes,
    "algorithm": algorithms,
    "format": formats,
    "target": targets,
    "task": tasks,
    "method": methods,
    "rest": rests,
    "device": devices,
    "verify": verifications,
}


def choices_text(parameter: str) -> str:
    """The choices of an option as people write them: ``a, b or c``; nothing for an option without."""
    *most, last = CHOICES[parameter]() if parameter in CHOICES else [""]
    return f"{', '.join(most)} or {last}" if most else last
