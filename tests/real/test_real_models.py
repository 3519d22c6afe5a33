"""Real models, every scheme: the artifact loads in a fresh process and computes what its codes say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.artifacts import bitsandbytes_rounds, decoded

import quantcli
from examples import models as packaged

pytestmark = pytest.mark.slow

SCHEMES = ["fp16", "bf16", "int8", "int4", "nf4", "nf4-double", "int8-dynamic"]
PROMPT = list(range(100, 124))

_RUN = """
import json, sys, torch, transformers
transformers.logging.set_verbosity_error()
folder, loader = sys.argv[1:3]
model = getattr(transformers, loader).from_pretrained(folder).eval()
with torch.inference_mode():
    output = model(torch.tensor([json.loads(sys.argv[3])]))
values = output.logits if "logits" in output else output.last_hidden_state
torch.save((values.float(), str(model.dtype)), sys.argv[4])
"""


@pytest.fixture(scope="module", params=["all-MiniLM-L6-v2", "SmolLM2-135M"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packaged.prepare(request.param, tmp_path_factory.mktemp("models") / request.param)


def loader_of(folder: Path) -> str:
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    return "AutoModelForCausalLM" if "CausalLM" in architecture else "AutoModel"


def outputs_in_a_fresh_process(folder: Path, scratch: Path) -> tuple[torch.Tensor, str]:
    result = scratch / "outputs.pt"
    arguments = [sys.executable, "-c", _RUN, str(folder), loader_of(folder), json.dumps(PROMPT), str(result)]
    subprocess.run(arguments, check=True, capture_output=True, timeout=300)
    return torch.load(result)


def outputs_of_the_codes(original: Path, artifact: Path, dtype: str) -> torch.Tensor:
    """The original architecture with weights decoded by the libraries that own the formats, not by quantcli."""
    import transformers

    loader = getattr(transformers, loader_of(original))
    model = loader.from_pretrained(original, dtype=getattr(torch, dtype.removeprefix("torch."))).eval()
    state = decoded(artifact)
    expected = set(model.state_dict())
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight", "embeddings.position_ids"}, missing
    assert set(state) <= expected | {"embeddings.position_ids"}
    model.tie_weights()
    with torch.inference_mode():
        output = model(torch.tensor([PROMPT]))
    return (output.logits if "logits" in output else output.last_hidden_state).float()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_loads_and_computes_what_the_codes_say(original: Path, scheme: str, tmp_path: Path) -> None:
    report = quantcli.convert(original, tmp_path / "out", scheme=scheme)
    runtime = report.details["verified"]["runtime"]
    assert runtime["checked"] or scheme in ("fp16", "bf16")
    values, dtype = outputs_in_a_fresh_process(tmp_path / "out", tmp_path)
    expected = outputs_of_the_codes(original, tmp_path / "out", dtype)
    if scheme == "int8-dynamic":
        # The inputs of every layer are rounded as well, so only the direction can agree.
        similarity = torch.nn.functional.cosine_similarity(values.flatten(), expected.flatten(), dim=0)
        assert similarity > 0.99
    else:
        noise = (values - expected).square().sum() / expected.square().sum()
        # Equal weights; what is left is how each runtime orders its 16-bit sums, or rounds what it multiplies.
        limit = 1e-3 if scheme.startswith("nf4") and bitsandbytes_rounds() else 1e-4
        assert noise < limit, f"{10 * noise.log10():.1f} dB"
