"""PP-OCRv6-small: the real weights give the reference's numbers, and its features belong to the text."""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from ocrmem.assets.fetch import resolve
from ocrmem.config.encoder import EncoderSettings, PPOCRSettings
from ocrmem.config.render import PP_OCR_PAGE
from ocrmem.encoders.pp_ocr import FEATURE_STD, PPOCREncoder
from ocrmem.encoders.registry import build_encoder
from ocrmem.errors import AssetError, CheckpointError, PageSizeError
from ocrmem.model.freeze import freeze
from ocrmem.render.renderer import Renderer

TEXT = (
    "user: Did you see that the train to Oslo (no. 4711) leaves at 06:25 now? I booked two seats, 12A and 12B.\n"
    "assistant: Yes! It costs 349.50 kr each way, which is less than last year; bring your ID and e-mail receipt.\n"
    "user: Great. My sister's new number is +47 555 0132, and her code name is \"Blue Heron\". What's the gate?\n"
    "assistant: Gate 7, track 3. By the way, the hash in the ticket was 0x9f3c21 - keep it somewhere safe.\n"
)


@pytest.fixture(scope="module")
def encoder() -> PPOCREncoder:
    return build_encoder(EncoderSettings(name="pp-ocr"))


@pytest.fixture(scope="module")
def pages():
    return Renderer(PP_OCR_PAGE).pages(TEXT)


@pytest.fixture(scope="module")
def pixels_PHW(pages):
    return torch.from_numpy(np.stack([page.image_HW for page in pages]))


@torch.no_grad()
def test_parity_with_onnxruntime_on_the_same_lines(encoder, pixels_PHW):
    lines = pixels_PHW.reshape(-1, 48, 640)[:7]
    model = onnx.load(resolve("pp-ocrv6-small-rec"))
    features_name = [node for node in model.graph.node if node.op_type == "MatMul"][-1].input[0]
    model.graph.output.append(onnx.helper.make_tensor_value_info(features_name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = (lines.numpy().astype(np.float32) / 127.5 - 1)[:, None].repeat(3, axis=1)
    probabilities, features = session.run(None, {"x": inputs})
    found = encoder.line_features(lines)
    assert np.abs(found.numpy() - features).max() <= 2e-4
    assert np.abs(encoder.recogniser.head.head(found).softmax(-1).numpy() - probabilities).max() <= 2e-4
    assert features.std() == pytest.approx(FEATURE_STD, rel=0.1)


@torch.no_grad()
def test_train_mode_gives_the_numbers_of_eval_mode(encoder, pixels_PHW):
    assert not any(isinstance(module, nn.modules.batchnorm._NormBase) for module in encoder.modules())
    freeze(encoder, part="ocr_embed")
    expected = encoder.eval()(pixels_PHW)
    assert torch.equal(encoder.train()(pixels_PHW), expected)
    encoder.eval()


@torch.no_grad()
def test_english_is_read_back(encoder, pages, pixels_PHW):
    text = "".join("".join(lines) for lines in encoder.read_lines(pixels_PHW))
    wanted = TEXT.replace("\n", "»")
    assert edit_distance(text.replace(" ", ""), wanted.replace(" ", "")) / len(wanted.replace(" ", "")) <= 0.03


@torch.no_grad()
def test_features_are_those_of_each_line_alone(encoder, pages, pixels_PHW):
    features_PVE = encoder(pixels_PHW)
    assert features_PVE.shape == (1, 80, 1920)
    used = encoder.num_tokens(pages[0])
    lines = pages[0].num_lines
    last = pages[0].glyph_boxes_N4[pages[0].glyph_boxes_N4[:, 1] == 48 * (lines - 1)]
    assert used == (lines - 1) * 5 + -(-int(last[:, 2].max()) // 128), "nothing is to the right of the last glyph"
    assert not features_PVE[0, lines * 5 :].any(), "blank lines are not encoded"
    alone = encoder.line_features(pixels_PHW[0, 48:96][None]) / FEATURE_STD
    torch.testing.assert_close(features_PVE[0, 5:10].reshape(80, 120), alone[0], rtol=1e-4, atol=1e-4)
    blank = torch.full_like(pixels_PHW, 255)
    assert not encoder(blank).any()


@pytest.mark.parametrize("steps", [4, 16, 20])
def test_spans_cover_the_text_once_and_in_order(steps):
    with torch.device("meta"):
        encoder = PPOCREncoder.build(PPOCRSettings(steps_per_token=steps))
    text = TEXT * 12 + "中文也要覆盖。" * 9
    renderer = Renderer(encoder.page)
    pages = renderer.pages(text)
    assert len(pages) > 3
    found = ""
    for page in pages:
        spans = encoder.token_spans(page)
        assert len(spans) == encoder.num_tokens(page)
        found += "".join(text[start:end] for token in spans for start, end in token)
    assert found == text


def test_bad_pages_are_refused(encoder):
    with pytest.raises(PageSizeError, match=r"takes \[pages, 768, 640\] uint8"):
        encoder(torch.zeros(1, 768, 1280, dtype=torch.uint8))
    page = dataclasses.replace(PP_OCR_PAGE, line_height=40, page_width=700)
    with pytest.raises(PageSizeError, match="line_height=40, expected 48; page_width=700, expected a multiple of 128"):
        build_encoder(EncoderSettings(), page=page)


def test_bad_weights_are_refused(tmp_path):
    path = tmp_path / "weights.onnx"
    with pytest.raises(AssetError, match="is no asset, no existing file or folder"):
        build_encoder(EncoderSettings(checkpoint=str(path)))
    path.write_bytes(resolve("pp-ocrv6-small-rec").read_bytes()[:1_000_000])
    with pytest.raises(CheckpointError, match="truncated or no ONNX file"):
        build_encoder(EncoderSettings(checkpoint=str(path)))
    weight = onnx.numpy_helper.from_array(np.ones((4, 3, 1, 1), dtype=np.float32), "w")
    bias = onnx.numpy_helper.from_array(np.ones((1, 4, 1, 1), dtype=np.float32), "b")
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["c"], name="Conv.0"),
        onnx.helper.make_node("Add", ["c", "b"], ["y"]),
    ]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "other", values[:1], values[1:], [weight, bias])
    onnx.save(onnx.helper.make_model(graph), path)
    with pytest.raises(CheckpointError, match="holds 1 convolutions, expected 57"):
        build_encoder(EncoderSettings(checkpoint=str(path)))


def test_identity_is_that_of_settings_weights_and_dtype(encoder):
    same = build_encoder(EncoderSettings())
    assert same.identity() == encoder.identity()
    others = {
        build_encoder(EncoderSettings(settings={"steps_per_token": 8})).identity(),
        build_encoder(EncoderSettings(dtype="bfloat16")).identity(),
    }
    with torch.no_grad():
        same.recogniser.head.head.bias[3] += 1
    others.add(same.identity())
    assert len(others | {encoder.identity()}) == 4


def edit_distance(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
