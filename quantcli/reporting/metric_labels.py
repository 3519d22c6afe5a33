"""How metrics are called and written in tables."""

from __future__ import annotations

from collections.abc import Mapping

METRICS = {
    "top1": ("Top-1", "{:.2%}"),
    "top5": ("Top-5", "{:.2%}"),
    "wer": ("Word error rate", "{:.2%}"),
    "same_text": ("Same text", "{:.2%}"),
    "perplexity": ("Perplexity", "{:.4g}"),
    "kl_nats": ("KL (nats)", "{:.3g}"),
    "top1_agreement": ("Top-1 agreement", "{:.2%}"),
    "argmax_agreement": ("Argmax agreement", "{:.2%}"),
    "cosine": ("Cosine", "{:.5f}"),
    "cosine_min": ("Worst cosine", "{:.5f}"),
    "sqnr_db": ("SQNR", "{:.1f} dB"),
    "not_finite": ("Not finite", "{:,.0f}"),
    "latency_ms_p50": ("p50 ms", "{:.3g}"),
    "latency_ms_p90": ("p90 ms", "{:.3g}"),
    "latency_ms_p99": ("p99 ms", "{:.3g}"),
    "throughput_per_s": ("Per second", "{:,.1f}"),
    "speedup": ("Speed-up", "{:.2f}"),
    "prompt_tokens_per_s": ("Prompt tokens/s", "{:,.0f}"),
    "time_to_first_token_ms": ("First token, ms", "{:.3g}"),
    "tokens_per_s": ("Tokens/s", "{:.3g}"),
    "prompt_speedup": ("Prompt speed-up", "{:.2f}"),
    "generation_speedup": ("Generation speed-up", "{:.2f}"),
    "load_ms": ("Load ms", "{:.3g}"),
    "peak_rss_bytes": ("Peak memory, bytes", "{:,.0f}"),
    "size_bytes": ("Size, bytes", "{:,.0f}"),
}
#: Of models that generate, and of those that are compared with one.
GENERATION_METRICS = ("prompt_tokens_per_s", "time_to_first_token_ms", "tokens_per_s")
GENERATION_SPEEDUPS = ("prompt_speedup", "generation_speedup")


def decibel_text(value: float | None) -> str:
    """A signal-to-noise ratio, or a dash where nothing was lost."""
    return "-" if value is None else f"{value:.1f} dB"


def metric_label(name: str) -> str:
    """What people call a metric."""
    return METRICS[name][0] if name in METRICS else name


def is_fraction(name: str) -> bool:
    """Whether people read a metric in percent."""
    return name in METRICS and METRICS[name][1].endswith("%}")


def metric_text(metrics: Mapping[str, float | None], name: str) -> str:
    """A metric with its standard error, where that is known; a dash where there is none."""
    value = metrics.get(name)
    if value is None:
        return "-"
    form = METRICS[name][1] if name in METRICS else "{:.5g}"
    error = metrics.get(f"{name}_se")
    return form.format(value) if error is None else f"{form.format(value)} +- {form.format(error)}"
