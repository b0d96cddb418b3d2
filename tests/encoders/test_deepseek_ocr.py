"""DeepEncoder: the reference's numbers on the same weights, the original's names, the seed's figures."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_llm
from transformers.models.unlimited_ocr.configuration_unlimited_ocr import UnlimitedOcrVisionConfig
from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrVisionModel

from ocrmem.config.encoder import DeepSeekOCRSettings, EncoderSettings
from ocrmem.config.render import deepseek_ocr_page
from ocrmem.encoders.deepencoder_clip import CLIPSizes
from ocrmem.encoders.deepencoder_sam import SAMSizes
from ocrmem.encoders.deepseek_ocr import DeepSeekOCREncoder
from ocrmem.encoders.registry import build_encoder
from ocrmem.errors import CheckpointError, ConfigError, PageSizeError
from ocrmem.model.mem_model import MEMModel
from ocrmem.render.renderer import Renderer

SAM = SAMSizes(
    width=48, num_layers=4, num_heads=3, mlp_width=80, window=5, global_layers=(1, 3), neck_width=20, mid_width=28,
    out_width=40, grid=32,
)  # fmt: skip
CLIP = CLIPSizes(width=40, num_layers=3, num_heads=4, mlp_width=72, grid=6)
UNUSED = {"model.vision_model.embeddings.patch_embedding.weight": torch.zeros(40, 3, 14, 14)}


def small(features: str = "concat", page_size: int = 512) -> DeepSeekOCREncoder:
    settings = DeepSeekOCRSettings(features=features, page_size=page_size)
    return DeepSeekOCREncoder(settings, page=deepseek_ocr_page(page_size), sam_sizes=SAM, clip_sizes=CLIP)


def reference(sam: SAMSizes = SAM, clip: CLIPSizes = CLIP) -> UnlimitedOcrVisionModel:
    """transformers' model of the same sizes, with random weights everywhere."""
    config = UnlimitedOcrVisionConfig(
        sam_config={
            "hidden_size": sam.width, "output_channels": sam.neck_width, "num_hidden_layers": sam.num_layers,
            "num_attention_heads": sam.num_heads, "image_size": sam.grid * 16, "window_size": sam.window,
            "global_attn_indexes": list(sam.global_layers), "mlp_dim": sam.mlp_width,
            "downsample_channels": [sam.mid_width, sam.out_width],
        },
        encoder_config={
            "hidden_size": clip.width, "intermediate_size": clip.mlp_width, "num_hidden_layers": clip.num_layers,
            "num_attention_heads": clip.num_heads, "image_size": clip.grid * 14, "patch_size": 14,
        },
    )  # fmt: skip
    model = UnlimitedOcrVisionModel._from_config(config, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(std=3 / parameter.shape[-1] ** 0.5 / 3, generator=generator)
    return model


def original_names(model: UnlimitedOcrVisionModel) -> dict[str, torch.Tensor]:
    """The reference's weights under the original checkpoint's names."""
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("sam_encoder."):
            for theirs, original in (
                ("sam_encoder.proj.conv1", "sam_encoder.net_2"), ("sam_encoder.proj.conv2", "sam_encoder.net_3"),
                ("neck.conv1", "neck.0"), ("neck.layer_norm1", "neck.1"), ("neck.conv2", "neck.2"),
                ("neck.layer_norm2", "neck.3"), ("layers.", "blocks."), ("layer_norm", "norm"),
                ("patch_embed.projection", "patch_embed.proj"),
            ):  # fmt: skip
                name = name.replace(theirs, original)
        name = name.replace("sam_encoder.", "sam_model.").replace(
            "vision_encoder.encoder.", "vision_model.transformer."
        )
        state["model." + name.replace("vision_encoder.", "vision_model.")] = value.clone()
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[name.replace(".q_proj.", ".qkv_proj.")] = torch.cat(parts)
    return state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint folder in the original's form: tensors of the language model beside the encoder's."""
    folder = tmp_path_factory.mktemp("checkpoint")
    state = {**original_names(reference()), **UNUSED, "model.embed_tokens.weight": torch.zeros(3, 2)}
    save_file(state, folder / "model.safetensors")
    return folder


def random_pages(page_size: int, count: int = 2) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, page_size, page_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("page_size", [512, 640])
@torch.no_grad()
def test_parity_with_transformers(checkpoint, page_size):
    pages_PHW, theirs = random_pages(page_size), reference()
    pixels = (pages_PHW.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)
    expected = theirs(pixels).last_hidden_state
    sam = theirs.sam_encoder(pixels).last_hidden_state.flatten(2).transpose(1, 2)
    found = {}
    for features in ("sam-mid", "sam", "sum", "concat"):
        encoder = small(features, page_size)
        encoder.load_checkpoint(str(checkpoint))
        found[features] = encoder(pages_PHW)
        assert found[features].shape == (2, encoder.tokens_per_page, encoder.feature_width)
        assert encoder.tokens_per_page == (page_size // 64) ** 2
    assert expected.std() > 0.1
    torch.testing.assert_close(found["concat"], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["sam"], sam, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["sum"], sam + expected[..., :40], rtol=0, atol=1e-4)
    mid = []
    theirs.sam_encoder.proj.conv1.register_forward_hook(lambda module, inputs, output: mid.append(output))
    theirs.sam_encoder(pixels)
    pooled = torch.nn.functional.avg_pool2d(mid[0], 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found["sam-mid"], pooled, rtol=0, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_parity_with_transformers_at_full_size():
    """In float64: features of these random weights have a spread of 69, so that float32 rounds by more than 1e-4."""
    theirs = reference(SAMSizes(), CLIPSizes()).double()
    state = {name.removeprefix("model."): value for name, value in original_names(theirs).items()}
    settings = DeepSeekOCRSettings(page_size=512)
    encoder = DeepSeekOCREncoder.build(settings)
    encoder.double().load_state_dict(state)
    pages_PHW = random_pages(512, 1)
    expected = theirs((pages_PHW.double() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)).last_hidden_state
    torch.testing.assert_close(encoder(pages_PHW), expected, rtol=0, atol=1e-4)


def test_the_seeds_figures_on_the_meta_device():
    encoder = build_encoder(EncoderSettings(name="deepseek-ocr"), load_weights=False, device="meta")
    counts = [
        sum(parameter.numel() for parameter in part.parameters())
        for part in (encoder, encoder.sam_model, encoder.vision_model)
    ]
    assert counts == [397_880_576, 95_569_152, 302_311_424]
    names = {name for name, _ in encoder.named_parameters()}
    assert not {name for name in names if "class_embedding" in name or "position_embedding" in name}
    widths = {}
    for features in ("sam-mid", "sam", "sum", "concat"):
        settings = EncoderSettings(name="deepseek-ocr", settings={"features": features})
        widths[features] = build_encoder(settings, load_weights=False, device="meta").feature_width
    assert widths == {"sam-mid": 512, "sam": 1024, "sum": 1024, "concat": 2048}
    tokens = [
        build_encoder(
            EncoderSettings(name="deepseek-ocr", settings={"page_size": size}),
            load_weights=False,
            device="meta",
        ).tokens_per_page
        for size in (512, 640, 1024, 1280)
    ]
    assert tokens == [64, 100, 256, 400]


def test_a_sharded_checkpoint_loads_alike(checkpoint, tmp_path):
    state = load_file(checkpoint / "model.safetensors")
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: state[name] for name in members}, tmp_path / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    one, two = small(), small()
    one.load_checkpoint(str(checkpoint))
    assert one.identity() != two.identity()
    two.load_checkpoint(str(tmp_path))
    assert one.identity() == two.identity()
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b.safetensors' is missing, truncated or no safetensors"):
        two.load_checkpoint(str(tmp_path))


def test_loading_is_strict(checkpoint, tmp_path):
    state = load_file(checkpoint / "model.safetensors")
    path = tmp_path / "model.safetensors"

    def message(**changes) -> str:
        changed = {**state, **{name: value for name, value in changes.items() if value is not None}}
        save_file({name: value for name, value in changed.items() if changes.get(name, 0) is not None}, path)
        with pytest.raises(CheckpointError) as caught:
            small().load_checkpoint(str(tmp_path))
        return str(caught.value)

    assert "missing model.sam_model.neck.1.bias" in message(**{"model.sam_model.neck.1.bias": None})
    assert "unexpected model.vision_model.head" in message(**{"model.vision_model.head": torch.zeros(2)})
    name = "model.vision_model.pre_layrnorm.bias"
    assert f"{name} is [7], expected [40]" in message(**{name: torch.zeros(7)})
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="missing, truncated or no safetensors"):
        small().load_checkpoint(str(tmp_path))
    path.unlink()
    with pytest.raises(CheckpointError, match="has no safetensors; give the folder of the original checkpoint"):
        small().load_checkpoint(str(tmp_path))
    with pytest.raises(ConfigError, match="needs its weights: set encoder.checkpoint to a hub id"):
        small().load_checkpoint(None)


def test_pages_of_another_size_are_refused():
    with pytest.raises(PageSizeError, match="page_size=512 takes pages of 512 × 512 pixels, but .* 640 × 640"):
        DeepSeekOCREncoder.build(DeepSeekOCRSettings(page_size=512), page=deepseek_ocr_page(640))
    with pytest.raises(PageSizeError, match=r"takes \[pages, 512, 512\] uint8"):
        small()(torch.zeros(1, 640, 640, dtype=torch.uint8))


def test_spans_cover_the_page(checkpoint):
    encoder, text = small(), "The quick brown fox jumps over the lazy dog.\n" * 60
    page = Renderer(encoder.page).pages(text)[0]
    spans = encoder.token_spans(page)
    assert len(spans) == 64
    covered = sorted(span for token in spans for span in token)
    assert covered[0][0] == page.text_start
    assert covered[-1][1] == page.text_end
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(covered))
    assert text[slice(*spans[0][0])].startswith("The quick")


def test_it_trains_a_projection_inside_a_memmodel(checkpoint):
    encoder = small()
    encoder.load_checkpoint(str(checkpoint))
    model = MEMModel(tiny_config(), base_llm_model=tiny_llm(), ocr_embed=encoder).train()
    page = Renderer(encoder.page).pages("hello world")[0]
    ids = torch.tensor([[1] + [97] * 64 + [5, 6, 7]])
    output = model(
        ids, labels=ids.masked_fill(ids == 97, -100), pages=torch.from_numpy(np.stack([page.image_HW])),
        page_num_tokens=torch.tensor([64]), num_pages=torch.tensor([1]),
    )  # fmt: skip
    output.loss.backward()
    assert all(parameter.grad.any() for parameter in model.proj.parameters())
    assert all(parameter.grad is None for parameter in encoder.parameters())
