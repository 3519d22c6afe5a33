"""Models that hear, and models that see and read, in every command that takes DATA."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from support import listening_models, seeing_models
from support.listening_models import tone
from support.seeing_models import pictures, records

from quantcli import convert, evaluate
from quantcli.cli.app import main
from quantcli.errors import InputError, MissingExtraError
from quantcli.evaluation.tasks.speech_recognition import SpeechRecognition, spoken

pytest.importorskip("soundfile", reason="needs the extra audio")


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    for number, text in enumerate(("Hello there.", "One, two!", "Yes")):
        tone(tmp_path / "sounds" / f"{number}.wav", 300 + 100 * number)
        (tmp_path / "sounds" / f"{number}.txt").write_text(text)
    return tmp_path / "sounds"


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    rows = ({"image": name, "text": f"picture number {name} of some"} for name in pictures(tmp_path, 3))
    return records(tmp_path / "captions.jsonl", *rows)


def test_what_is_said_is_compared_without_case_and_punctuation() -> None:
    assert spoken("Don’t — stop, 'Mr. Ø'!\n") == "don't stop mr ø"


def test_word_errors_are_counted_over_all_samples(tmp_path: Path) -> None:
    import transformers

    folder = listening_models.wav2vec2(tmp_path / "m")
    score = SpeechRecognition("m", transformers.AutoTokenizer.from_pretrained(folder))

    def of(*letters: str) -> dict[str, np.ndarray]:
        ids = [listening_models.LETTERS.index(letter) for letter in letters]
        return {"logits": np.eye(len(listening_models.LETTERS), dtype=np.float32)[ids][None]}

    # Repeats are one letter, a blank between them makes two.
    right = of("H", "H", "E", "L", "L", "<pad>", "L", "O", "|", "<pad>", "A", "A")
    score.add({}, "hello, A!", right, None)
    score.add({}, "one two three four", of("O", "N", "E", "|", "T", "O", "O"), right)
    assert score.metrics()["wer"] == 3 / 6 and score.metrics()["same_text"] == 0
    with pytest.raises(InputError, match=r"returns no logits \[batch, moments, vocabulary\]"):
        score.add({}, "x", {"embedding": np.zeros((1, 4), np.float32)}, None)


def test_an_encoder_decoder_says_what_it_hears(tmp_path: Path, sounds: Path) -> None:
    import torch
    import transformers

    folder = listening_models.whisper(tmp_path / "whisper")
    report = evaluate(folder, [folder], data=sounds, require=["wer <= 5", "same_text >= 1"])
    assert report.details["task"] == "speech-recognition" and report.passed
    # The oracle: transformers' own way, sound by sound.
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    import jiwer
    import soundfile

    said, heard = [], []
    for file in sorted(sounds.glob("*.wav")):
        features = processor(soundfile.read(file)[0], sampling_rate=16000, return_tensors="pt").input_features
        with torch.no_grad():
            tokens = model.generate(features, do_sample=False)
        heard.append(spoken(processor.batch_decode(tokens, skip_special_tokens=True)[0]))
        said.append(spoken(file.with_suffix(".txt").read_text()))
    assert report.models[0].metrics["wer"] == pytest.approx(jiwer.wer(said, heard))


@pytest.mark.slow  # transformers is asked which layers it can run as codes, in a process of its own
def test_a_model_of_letters_is_calibrated_and_judged_on_sounds(
    tmp_path: Path, sounds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = listening_models.wav2vec2(tmp_path / "wav2vec2"), tmp_path / "out"
    convert(folder, out, scheme="int4", group_size=32, algorithm="gptq", data=sounds)
    report = evaluate(folder, [out], data=sounds)
    assert report.details["task"] == "speech-recognition" and report.models[1].metrics.keys() >= {"wer", "same_text"}
    for text in sounds.glob("*.txt"):
        text.unlink()
    report = evaluate(folder, [out], data=sounds)
    assert report.details["task"] == "fidelity" and report.models[1].metrics["sqnr_db"] > 20  # type: ignore[operator]
    assert main(["eval", str(folder), "--data", str(sounds), "--task", "speech-recognition"]) == 3
    assert "does not say what is heard" in capsys.readouterr().err


def test_a_missing_package_of_word_errors_is_named(
    tmp_path: Path, sounds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = listening_models.wav2vec2(tmp_path / "wav2vec2")
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(MissingExtraError, match=r'jiwer.*pip install "quantcli\[audio\]"'):
        evaluate(folder, data=sounds)


@pytest.mark.slow  # transformers is asked which layers it can run as codes, in a process of its own
@pytest.mark.parametrize("name", ["llava", "idefics3", "paligemma"])
def test_a_model_that_sees_is_calibrated_and_judged_on_images_with_text(
    name: str, tmp_path: Path, captions: Path
) -> None:
    folder, out = getattr(seeing_models, name)(tmp_path / name), tmp_path / "out"
    report = convert(folder, out, scheme="int4", group_size=32, algorithm="gptq", data=captions)
    done = {layer.name: layer.reason for layer in report.layers if layer.scheme}
    towers = [layer for layer in done if "vision" in layer and ".layers." in layer]
    # The code of PaliGemma's tower reads weights, which packed codes lack: the tower is left.
    assert bool(towers) == (name != "paligemma")
    assert not any("in place of" in (done[layer] or "") for layer in towers)
    report = evaluate(folder, [out], data=captions, by_layer=name == "llava")
    assert report.details["task"] == "language-modeling"
    assert 0 < report.models[1].metrics["kl_nats"] < 0.1  # type: ignore[operator]


def test_perplexity_leaves_the_places_of_images_out(tmp_path: Path, captions: Path) -> None:
    import torch
    import transformers
    from PIL import Image

    folder = seeing_models.llava(tmp_path / "llava")
    report = evaluate(folder, data=captions)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    total, count = 0.0, 0
    for line in captions.read_text().splitlines():
        record = json.loads(line)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["text"]}]}
        text = processor.apply_chat_template([turn], tokenize=False)
        inputs = processor(text=[text], images=[Image.open(tmp_path / record["image"])], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, :-1]
        targets = inputs["input_ids"][0, 1:]
        kept = targets != model.config.image_token_id
        total += torch.nn.functional.cross_entropy(logits[kept], targets[kept], reduction="sum").item()
        count += int(kept.sum())
    assert report.models[0].metrics["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)
