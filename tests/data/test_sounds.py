"""Sounds as DATA: folders and records of files, read and resampled, with what is said in them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from support import listening_models
from support.listening_models import tone

from quantcli.core.ports import Port
from quantcli.data.request import DataRequest
from quantcli.data.samples import Samples, load_samples
from quantcli.data.sound_files import read_sound
from quantcli.errors import InputError, MissingExtraError, UsageError

soundfile = pytest.importorskip("soundfile", reason="needs the extra audio")

HEARS = (Port("input_values", np.dtype(np.float32), None), Port("attention_mask", np.dtype(np.int64), None, True))
SAYS = (
    Port("input_features", np.dtype(np.float32), None),
    Port("decoder_input_ids", np.dtype(np.int64), None, True),
)


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return listening_models.wav2vec2(tmp_path_factory.mktemp("models") / "wav2vec2")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return listening_models.whisper(tmp_path_factory.mktemp("models") / "whisper")


def load(data: Path, model: Path, ports: tuple[Port, ...] = HEARS, **wishes: int) -> Samples:
    return load_samples(DataRequest.of(data, **wishes), ports, folder=model)


def records(file: Path, *rows: dict[str, object]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def test_a_folder_of_sounds_at_any_rate(tmp_path: Path, wav2vec2: Path) -> None:
    tone(tmp_path / "d" / "a.wav", 400)
    tone(tmp_path / "d" / "b.flac", 400, rate=44100, channels=2)
    tone(tmp_path / "d" / "c.ogg", 400, rate=8000)
    samples = load(tmp_path / "d", wav2vec2)
    assert len(samples) == 3 and samples.labels == "" and samples.fixed_batch is None
    for sample in samples:
        values = sample.inputs["input_values"]
        assert values.dtype == np.float32 and values.shape == (1, 6400) and abs(values.std() - 1) < 0.01
        peak = np.argmax(np.abs(np.fft.rfft(values[0]))) / 0.4
        assert peak == 400  # the tone is where it was, however it was sampled
        assert sample.inputs["attention_mask"].tolist() == [[1] * 6400]
    assert samples.sha256 == load(tmp_path / "d", wav2vec2).sha256 != load(tmp_path / "d", wav2vec2, samples=2).sha256


def test_texts_beside_sounds_and_in_records(tmp_path: Path, wav2vec2: Path) -> None:
    for name in "ab":
        tone(tmp_path / "d" / f"{name}.wav", 300)
        (tmp_path / "d" / f"{name}.txt").write_text(f"Hello,\n {name}.\n")
    samples = load(tmp_path / "d", wav2vec2)
    assert samples.labels == "texts" and [sample.label for sample in samples] == ["Hello, a.", "Hello, b."]
    for key, text in (("audio", "text"), ("audio_filepath", "sentence"), ("file_name", "transcription")):
        data = records(tmp_path / "m.jsonl", *({key: f"d/{name}.wav", text: name} for name in "ab"))
        assert [sample.label for sample in load(data, wav2vec2)] == ["a", "b"]
    inside = records(tmp_path / "m.jsonl", {"audio": {"path": str(tmp_path / "d" / "a.wav")}})
    assert load(inside, wav2vec2).labels == ""
    (tmp_path / "d" / "b.txt").unlink()
    with pytest.raises(InputError, match=r"1 of 2 sounds in .* have no text beside them, such as b\.wav"):
        load(tmp_path / "d", wav2vec2)
    with pytest.raises(InputError, match="line 2 has no text, and 1 of 2 records have one"):
        load(records(tmp_path / "m.jsonl", {"audio": "d/a.wav", "text": "x"}, {"audio": "d/b.wav"}), wav2vec2)


def test_folders_of_classes(tmp_path: Path, wav2vec2: Path) -> None:
    for name in ("down", "up"):
        tone(tmp_path / "d" / name / "a.wav", 300)
    samples = load(tmp_path / "d", wav2vec2)
    assert samples.labels == "classes" and [sample.label for sample in samples] == [0, 1]


def test_a_decoder_reads_what_is_said_one_token_behind(tmp_path: Path, whisper: Path) -> None:
    import transformers

    tone(tmp_path / "d" / "a.wav", 300)
    samples = load(tmp_path / "d", whisper, SAYS)
    assert "decoder reads its first token alone" in " ".join(samples.warnings)
    (tmp_path / "d" / "a.txt").write_text("hello")
    (sample,) = load(tmp_path / "d", whisper, SAYS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whisper)
    labels = tokenizer("hello")["input_ids"]
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    expected = [start, *[token for token in labels if token != start]][:-1]
    assert sample.inputs["decoder_input_ids"].tolist() == [expected] and tokenizer.decode(expected[-5:]) == "hello"
    assert sample.inputs["input_features"].shape == (1, 16, 400)
    (tmp_path / "d" / "a.txt").write_text("hello " * 99)
    (sample,) = load(tmp_path / "d", whisper, SAYS)
    assert sample.inputs["decoder_input_ids"].shape == (1, 32)


def test_long_sounds_are_cut_and_left_out_where_their_text_says_more(tmp_path: Path, wav2vec2: Path) -> None:
    tone(tmp_path / "d" / "a.wav", 300)
    tone(tmp_path / "d" / "b.wav", 300, seconds=31)
    samples = load(tmp_path / "d", wav2vec2)
    assert [sample.inputs["input_values"].shape[1] for sample in samples] == [6400, 480000]
    assert "1 of 2 sounds last over 30 s; the rest of them is not read." in samples.warnings
    for name in "ab":
        (tmp_path / "d" / f"{name}.txt").write_text("words")
    samples = load(tmp_path / "d", wav2vec2)
    assert len(samples) == 1 and "1 of 2 sounds last over 30 s; they are left out." in samples.warnings


def test_what_cannot_be_read_is_named(tmp_path: Path, wav2vec2: Path) -> None:
    tone(tmp_path / "d" / "a.wav", 300)
    (tmp_path / "d" / "b.wav").write_bytes(b"no sound")
    with pytest.raises(InputError, match=r"1 of 2 sounds cannot be read: .*b\.wav"):
        load(tmp_path / "d", wav2vec2)
    soundfile.write(tmp_path / "d" / "b.wav", np.zeros(0), 16000)
    with pytest.raises(InputError, match=r"b\.wav \(it holds no sound\)"):
        load(tmp_path / "d", wav2vec2)
    soundfile.write(tmp_path / "d" / "b.wav", np.full(99, np.nan, np.float32), 16000, subtype="FLOAT")
    with pytest.raises(InputError, match="NaN or infinite"):
        load(tmp_path / "d", wav2vec2)
    for name, problem in (
        ("../a.wav", "lies outside of"),
        ("/etc/passwd.wav", "lies outside of"),
        ("d/x.wav", "there is no such file"),
        ("https://host/a.wav", "is no file"),
    ):
        with pytest.raises(InputError, match=rf"m\.jsonl, line 2 names {name}.*{problem}"):
            load(records(tmp_path / "m.jsonl", {"audio": "d/a.wav"}, {"audio": name}), wav2vec2)
    with pytest.raises(InputError, match="line 2 names no files of sound; it has id, text"):
        load(records(tmp_path / "m.jsonl", {"audio": "d/a.wav"}, {"id": "1", "text": "x"}), wav2vec2)
    with pytest.raises(UsageError, match="--seq-len is for text"):
        load(tmp_path / "d", wav2vec2, seq_len=8)


def test_models_that_do_not_hear_are_told_so(tmp_path: Path, wav2vec2: Path) -> None:
    tone(tmp_path / "d" / "a.wav", 300)
    reads = (Port("input_ids", np.dtype(np.int64), None),)
    with pytest.raises(InputError, match="holds sounds, and the model takes input_ids"):
        load(tmp_path / "d", wav2vec2, reads)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="has no feature extractor"):
        load(tmp_path / "d", tmp_path / "bare")


@pytest.mark.parametrize("package", ["soundfile", "soxr"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tone(tmp_path / "a.wav", 300)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf'{package}, which .*pip install "quantcli\[audio\]"'):
        read_sound(file, 8000)


#: Twelve bytes of G.721, which libsndfile cannot search, and 16 million samples per second: found by fuzzing.
FORGED_HEAD = bytes.fromhex("52494646ec21000057415645666d74201000000040000100")
FORGED_TAIL = bytes.fromhex("803e000044001000646174610000006100af")


@pytest.mark.parametrize(("rate", "said"), [(16_777_247, "claims 16,777,247 samples per second"), (900_000, None)])
def test_a_rate_that_is_forged_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int, said: str | None
) -> None:
    asked: list[int] = []
    read = soundfile.SoundFile.read

    def watched(file: object, frames: int = -1, **options: object) -> np.ndarray:
        asked.append(frames)
        return read(file, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", watched)
    (tmp_path / "a.wav").write_bytes(FORGED_HEAD + rate.to_bytes(4, "little") + FORGED_TAIL)
    if said is None:
        assert len(read_sound(tmp_path / "a.wav", 16000)[0])
        assert max(asked) < 1000
        return
    with pytest.raises(ValueError, match=said):
        read_sound(tmp_path / "a.wav", 16000)
    assert not asked
