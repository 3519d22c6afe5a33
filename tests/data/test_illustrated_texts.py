"""Images with texts as DATA: records of several kinds, by the model's own processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import seeing_models
from support.seeing_models import pictures, records

from quantcli.data.media_records import MARK, illustrated, medium_of
from quantcli.data.request import DataRequest
from quantcli.data.samples import Samples, load_samples
from quantcli.data.sources import kinds_of
from quantcli.errors import InputError
from quantcli.models.inputs import hugging_face_ports


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("models")

    def build(name: str) -> Path:
        if name not in made:
            made[name] = getattr(seeing_models, name)(root / name)
        return made[name]

    return build


def load(data: Path, model: Path, **wishes: int) -> Samples:
    return load_samples(DataRequest.of(data, **wishes), hugging_face_ports(model, text=True), folder=model)


def read(samples: Samples, model: Path) -> list[str]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return [tokenizer.decode(sample.inputs["input_ids"][0]) for sample in samples]


def chat(image: str, question: str, answer: str) -> dict[str, object]:
    asked = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def test_records_of_every_form_become_the_same_sample(tmp_path: Path, model: Callable[[str], Path]) -> None:
    (name,) = pictures(tmp_path, 1)
    llava = model("llava")
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "That."}]
    bare = chat(name, "What?", "That.")
    bare["messages"][0]["content"][0] = {"type": "image"}  # type: ignore[index]
    forms = [
        chat(name, "What?", "That."),
        {"id": "17", "image": name, "conversations": turns},
        {"images": [name], **bare},
        {"image": {"path": name}, "prompt": "What?", "completion": "That."},
        {"completion": "That.", "prompt": "<image>What?", "file_name": name},
        {"instruction": "What?", "output": "That.", "image": str(tmp_path / name)},
    ]
    samples = load(records(tmp_path / "d.jsonl", *forms), llava)
    texts = read(samples, llava)
    assert set(texts) == {f"user: {'<image>' * 4}What?\nassistant: That.\n"} and len(texts) == len(forms)
    for sample in samples:
        assert sample.inputs["pixel_values"].shape == (1, 3, 28, 28) and sample.label is None
    assert samples.fixed_batch == 1 and not samples.warnings
    assert samples.sha256 == load(tmp_path / "d.jsonl", llava).sha256


def test_several_images_stand_where_the_text_has_them(tmp_path: Path, model: Callable[[str], Path]) -> None:
    first, second = pictures(tmp_path, 2)
    llava = model("llava")
    data = records(
        tmp_path / "d.jsonl",
        {"images": [first, second], "text": "a <image> b <image> c"},
        {"images": [first, second], "text": f"both {MARK}"},
    )
    samples = load(data, llava)
    image = "<image>" * 4
    assert read(samples, llava) == [f"user: a {image} b {image} c\n", f"user: {image}{image}both \n"]
    assert [sample.inputs["pixel_values"].shape for sample in samples] == [(2, 3, 28, 28)] * 2
    for row, wrong in (
        ({"images": [first, second], "text": "<image>"}, "places for 1 images and names 2"),
        ({"text": "<image> and <image>", "image": first}, "places for 2 images and names 1"),
        ({"image": first, "id": "7"}, "line 2 has no field that is known to hold text; it has id"),
    ):
        with pytest.raises(InputError, match=wrong):
            load(records(data, {"image": first, "text": "x"}, row), llava)


@pytest.mark.parametrize(
    ("name", "text", "arrays"),
    [
        ("paligemma", "<image><image><image><image><s>what\n", {"pixel_values": (1, 3, 28, 28)}),
        ("idefics3", None, {"pixel_values": (1, 5, 3, 28, 28), "pixel_attention_mask": (1, 5, 28, 28)}),
    ],
)
def test_other_processors(
    name: str, text: str | None, arrays: dict[str, object], tmp_path: Path, model: Callable[[str], Path]
) -> None:
    (image,) = pictures(tmp_path, 1)
    samples = load(records(tmp_path / "d.jsonl", {"image": image, "text": "what"}), model(name))
    (sample,) = samples
    assert {key: sample.inputs[key].shape for key in arrays} == arrays
    if text:
        assert read(samples, model(name)) == [text] and sample.inputs["token_type_ids"].shape[0] == 1


def test_files_are_looked_for_in_the_datas_folder_alone(tmp_path: Path, model: Callable[[str], Path]) -> None:
    (image,) = pictures(tmp_path / "d", 1)
    (outside,) = pictures(tmp_path, 1)
    (tmp_path / "d" / "bad.png").write_bytes(b"no image")
    for name, problem in (
        (f"../{outside}", "lies outside of"),
        (f"images/../../{outside}", "lies outside of"),
        (str(tmp_path / outside), "lies outside of"),
        ("images/none.png", "there is no such file"),
        ("bad.png", "no readable image"),
        ("https://host/a.png", "is no file"),
    ):
        data = records(tmp_path / "d" / "d.jsonl", {"image": image, "text": "x"}, {"image": name, "text": "x"})
        with pytest.raises(InputError, match=rf"d\.jsonl, line 2 names .*{problem}"):
            load(data, model("llava"))


def test_lengths_cut_text_and_never_an_image(tmp_path: Path, model: Callable[[str], Path]) -> None:
    (image,) = pictures(tmp_path, 1)
    data = records(tmp_path / "d.jsonl", {"image": image, "text": "long " * 200})
    (sample,) = load(data, model("llava"), seq_len=20)
    assert sample.inputs["input_ids"].shape == sample.inputs["attention_mask"].shape == (1, 20)
    (sample,) = load(data, model("llava"))
    assert sample.inputs["input_ids"].shape == (1, 256)
    with pytest.raises(InputError, match=r"line 1 needs 10 tokens up to the end of its images, more than 8\."):
        load(data, model("llava"), seq_len=8)


def test_records_without_images_are_left_out(tmp_path: Path, model: Callable[[str], Path]) -> None:
    (image,) = pictures(tmp_path, 1)
    data = records(tmp_path / "d.jsonl", {"text": "no image"}, {"image": image, "text": "one"})
    samples = load(data, model("llava"))
    assert len(samples) == 1 and "1 of 2 records" in samples.warnings[0]


def test_which_records_name_images(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    for row, medium in (
        ({"text": "an <image> of words"}, None),
        ({"text": "x", "image": None, "image_id": 3}, None),
        ({"text": "x", "audio": True}, None),
        ({"text": "x", "images": []}, None),
        ({"image": "a.png"}, "image"),
        ({"file_name": "a.PNG"}, "image"),
        ({"audio": "a.wav"}, "sound"),
        (chat("a.png", "?", "!"), "image"),
    ):
        records(data, {"text": "first"}, row)
        assert medium_of(str(data)) == medium, row
        kinds = {None: "texts", "image": "illustrated texts", "sound": "sounds"}
        assert list(kinds_of(str(data))) == [kinds[medium]]
    assert illustrated({"image": "a.png", "text": "x"}, "here").turns == [{"role": "user", "content": f"{MARK}x"}]


def test_a_model_without_eyes_reads_the_text(tmp_path: Path) -> None:
    from support.tokenizers import tokenizer

    (image,) = pictures(tmp_path, 1)
    folder = tokenizer(tmp_path, causal=False)
    data = records(tmp_path / "d.jsonl", {"image": image, "text": "a b c"})
    samples = load(data, folder)
    assert [sample.inputs["input_ids"].shape for sample in samples] == [(1, 3)]
    assert "the model reads text alone" in " ".join(samples.warnings)
    assert all(isinstance(sample.inputs["input_ids"], np.ndarray) for sample in samples)


def test_a_folder_without_a_processor_is_told_what_it_lacks(tmp_path: Path, model: Callable[[str], Path]) -> None:
    import shutil

    (image,) = pictures(tmp_path, 1)
    data = records(tmp_path / "d.jsonl", {"image": image, "text": "x"})
    folder = tmp_path / "model"
    shutil.copytree(model("llava"), folder)
    (folder / "processor_config.json").unlink()
    with pytest.raises(InputError, match=r"has no processor \(processor_config\.json"):
        load(data, folder)
