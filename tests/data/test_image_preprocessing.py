"""Image folders and their preprocessing, beside transformers' own image processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from quantcli.core.ports import Port
from quantcli.data.image_preprocessing import Preprocess, load_preprocess
from quantcli.data.request import DataRequest
from quantcli.data.samples import Samples, load_samples
from quantcli.errors import InputError, UsageError

RNG = np.random.default_rng(9)
ANY = (Port("x", np.dtype(np.float32), ("n", 3, "h", "w")),)


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def folder_of(root: Path, **classes: int) -> Path:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 6), (number, len(name), 0)).save(root / name / f"{number:03}.png")
    return root


def load(data: Path, ports: tuple[Port, ...] = ANY, text: str = "rescale: 1", **options: Any) -> Samples:
    file = data.parent / "preprocess.yaml"
    file.write_text(text)
    return load_samples(DataRequest(str(data), preprocess=file, **options), ports, folder=None)


@pytest.mark.parametrize(
    "processor",
    [
        transformers.ViTImageProcessorPil(size={"height": 20, "width": 24}),
        transformers.ViTImageProcessorPil(do_resize=False, do_normalize=False, rescale_factor=1 / 128),
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 18}),
        transformers.ConvNextImageProcessorPil(size={"shortest_edge": 24}, crop_pct=0.875),
    ],
)
@pytest.mark.parametrize("size", [(41, 30), (29, 37), (20, 20)])
def test_preprocessing_is_that_of_transformers(tmp_path: Path, processor: Any, size: tuple[int, int]) -> None:
    image = picture(*size)
    expected = processor(image, return_tensors="np")["pixel_values"]
    processor.save_pretrained(tmp_path)
    ours = load_preprocess(None, tmp_path).apply(image)
    assert ours.dtype == np.float32 and ours.shape == expected.shape
    assert np.abs(ours - expected).max() < 1e-5


def test_yaml_in_numbers(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("crop: [1, 3]\nmean: [0.5, 0.25, 0]\nstd: [0.5, 1, 2]\nchannels: bgr\nlayout: nhwc")
    image = Image.fromarray(np.array([[[0, 51, 255], [255, 0, 102], [10, 20, 30]]], np.uint8))
    expected = [[[[(1 - 0.5) / 0.5, 0.2 - 0.25, 0], [(0.4 - 0.5) / 0.5, -0.25, 0.5],
                  [(30 / 255 - 0.5) / 0.5, 20 / 255 - 0.25, 10 / 255 / 2]]]]  # fmt: skip
    assert np.allclose(load_preprocess(file, None).apply(image), expected, atol=1e-6)
    gray = Preprocess(channels="gray", resize=(4, 5), rescale=1).apply(Image.new("RGB", (9, 9), (50, 50, 50)))
    assert gray.shape == (1, 1, 4, 5) and (gray == 50).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rezise: 3", "unknown key 'rezise'. Did you mean 'resize'"),
        ("resize: 0", "p.yaml: resize"), ("resize: 99999999", "p.yaml: resize"), ("crop: [1, 2, 3]", "p.yaml: crop"),
        ("interpolation: magic", "p.yaml: interpolation"), ("rescale: .inf", "p.yaml: rescale"),
        ("mean: [1, 2]", "mean has 2 numbers; rgb has 3 channels"), ("std: [1, 0, 1]", "std: no number may be zero"),
        ("[", "is not valid YAML"), ("- a", "is not a mapping"), ("!!python/object:os.system {}", "is not valid YAML"),
    ],
)  # fmt: skip
def test_preprocessing_that_cannot_be_meant(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_preprocess(tmp_path / "p.yaml", None)


def test_missing_or_foreign_preprocessing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not known: .*does not exist\. Say it with --preprocess.*resize: 256"):
        load_preprocess(None, tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        load_preprocess(tmp_path / "missing.yaml", None)
    for config in ({"do_resize": True, "size": {"longest_edge": 9}}, {"do_pad": True}, {"do_resize": True}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=r"asks for .* not supported\. State the preprocessing with --preprocess"):
            load_preprocess(None, tmp_path)


def test_subfolders_are_classes_in_order_of_their_names(tmp_path: Path) -> None:
    samples = load(folder_of(tmp_path / "d", cat=3, ant=2, bird=4))
    assert samples.labels and len(samples) == 9 and not samples.warnings
    assert [sample.label for sample in samples] == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    for sample in samples:
        assert sample.inputs["x"].shape == (1, 3, 6, 8)
        assert sample.inputs["x"][0, 1, 0, 0] == len(("ant", "bird", "cat")[sample.label or 0])
    (tmp_path / "flat").mkdir()
    for number in range(10):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "flat" / f"{number}.bmp")
    flat = load(tmp_path / "flat", samples=5)
    assert not flat.labels and [s.inputs["x"][0, 0, 0, 0] for s in flat] == [0, 2, 4, 6, 8]


def test_chosen_images_are_balanced_and_the_seed_decides(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "d", a=20, b=20, c=1)
    once, again, other = (load(root, samples=9, seed=seed) for seed in (1, 1, 2))
    counts = [[sample.label for sample in once].count(label) for label in range(3)]
    assert counts == [4, 4, 1]
    assert once.sha256 == again.sha256 != other.sha256
    assert once.sha256 != load(root, samples=9, seed=1, text="rescale: 2").sha256


def test_an_unreadable_image_is_left_out_and_too_many_are_an_error(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "d", a=100)
    whole = (root / "a" / "050.png").read_bytes()
    picture(64, 64).save(root / "a" / "050.jpg", quality=95)
    (root / "a" / "050.jpg").write_bytes((root / "a" / "050.jpg").read_bytes()[:400])
    samples = load(root)
    assert len(samples) == len(list(samples)) == 100
    (warning,) = samples.warnings
    assert warning.startswith("1 of 101 images cannot be read:") and "050.jpg (" in warning
    (root / "a" / "050.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"2 of 101 images cannot be read: .*050\.png.*Remove or repair"):
        load(root)


def test_a_decompression_bomb_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder_of(tmp_path / "d", a=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match=r"1 of 1 images cannot be read: .*exceeds limit"):
        load(root)


def test_images_that_do_not_fit_the_model(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "d", a=2)
    fixed = (Port("x", np.dtype(np.float32), (1, 3, 10, 10)),)
    with pytest.raises(InputError, match=r"x: float32 1 x 3 x 10 x 10 is expected, got float32 1 x 3 x 6 x 8"):
        load(root, fixed)
    assert load(root, fixed, "resize: [10, 10]").fixed_batch == 1
    with pytest.raises(InputError, match="holds images, and the model has 2 inputs"):
        load(root, (*ANY, Port("y", np.dtype(np.int64), ())))
    integers = (Port("x", np.dtype(np.uint8), ("n", 3, "h", "w")),)
    assert next(iter(load(root, integers))).inputs["x"].dtype == np.uint8
    with pytest.raises(InputError, match="takes integers, and the preprocessing makes fractions"):
        load(root, integers, "mean: 0.5")
    np.save(root / "x.npy", np.zeros(3))
    with pytest.raises(InputError, match="holds both arrays and images"):
        load(root)
