"""The projection that reads the LLM's vocabulary: what is mixed, what it learns from, what an adapter holds of it."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import tiny_batch, tiny_model

from ocrmem.config.projection import ProjectionSettings
from ocrmem.errors import ConfigError, SpliceError
from ocrmem.evaluation.run import _untrained
from ocrmem.model.mem_model import MEMModel
from ocrmem.model.projection import Projection, VocabularyReader
from ocrmem.training.objectives import covered_embeddings


def test_a_piece_gets_the_embedding_that_it_is_read_as():
    torch.manual_seed(0)
    table_CD = torch.randn(11, 8) * 0.1
    reader = VocabularyReader(table_CD)
    with torch.no_grad():
        reader.log_scale.fill_(8.0)  # so sharp that one token has it all
    pieces_PVD = 3 * table_CD[torch.tensor([[2, 7, 2]])]
    read_PVD, nothing = reader(pieces_PVD)
    expected = F.rms_norm(table_CD[torch.tensor([[2, 7, 2]])], (8,), eps=1e-6)
    torch.testing.assert_close(read_PVD - pieces_PVD, expected, rtol=1e-3, atol=1e-3)
    assert nothing is None


def test_the_cross_entropy_is_that_of_the_covered_tokens():
    torch.manual_seed(0)
    table_CD = torch.randn(11, 8)
    reader = VocabularyReader(table_CD)
    pieces_PVD = torch.randn(1, 3, 8)
    ids_PVT = torch.tensor([[[4, -1], [-1, -1], [0, 9]]])
    _, loss = reader(pieces_PVD, ids_PVT)
    cosines_VC = F.cosine_similarity(pieces_PVD[0, :, None], table_CD[None], dim=-1)
    shares_VC = torch.log_softmax(20 * cosines_VC, dim=-1)
    expected = -(shares_VC[0, 4] + (shares_VC[2, 0] + shares_VC[2, 9]) / 2) / 2
    torch.testing.assert_close(loss, expected)
    none = reader(pieces_PVD, torch.full((1, 3, 2), -1))[1]
    assert none.item() == 0


def test_every_parameter_learns_and_the_table_stays(tmp_path):
    model = tiny_model(kind="attention", vocabulary=True)
    table_CD = model.get_input_embeddings().weight
    before = table_CD.clone()
    batch = tiny_batch()
    model(**batch).loss.backward()
    missing = [name for name, parameter in model.proj.named_parameters() if not parameter.grad.any()]
    assert missing == []
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == {
        id(parameter) for parameter in model.proj.parameters()
    }
    assert torch.equal(model.proj.reader.embeddings_CD, before.float())
    assert set(model._ddp_params_and_buffers_to_ignore) <= set(dict(model.named_buffers()))
    with torch.no_grad():
        model.proj.reader.log_scale.add_(0.5)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter.safetensors")
    assert {"reader.query.weight", "reader.value.weight", "reader.log_scale"} <= set(stored)
    assert not [name for name in stored if "embeddings" in name]
    loaded = MEMModel.from_pretrained(tmp_path, base_llm_model=model.base_llm_model, ocr_embed=model.ocr_embed)
    torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss)


def test_a_warm_start_has_the_reading_in_its_loss():
    model = tiny_model(kind="attention", vocabulary=True)
    features_PVE = torch.randn(2, 3, model.ocr_embed.feature_width)
    slots_PVT = torch.tensor([[[5, -1], [6, 7], [-1, -1]], [[8, -1], [5, -1], [9, -1]]])
    targets_PVD = covered_embeddings(slots_PVT, model.get_input_embeddings())
    given = {"input_ids": torch.zeros(1, 1, dtype=torch.int64), "features": features_PVE}
    given["page_num_tokens"] = torch.tensor([3, 3])
    optimizer = torch.optim.Adam(model.proj.parameters(), lr=1e-2)

    def losses():
        cosine = model(**given, memory_targets=targets_PVD).loss
        return cosine.item(), model(**given, memory_targets=targets_PVD, memory_token_ids=slots_PVT).loss

    cosine, both = losses()
    assert both.item() > cosine + 1
    for _ in range(60):
        optimizer.zero_grad()
        losses()[1].backward()
        optimizer.step()
    assert losses()[1].item() < 0.5 * both.item()
    assert losses()[0] < cosine


@pytest.mark.parametrize(("vocabulary", "pieces"), [(False, 1), (True, 2)])
def test_tokens_that_cannot_be_read_are_refused(vocabulary, pieces):
    settings = ProjectionSettings(kind="attention", num_heads=2, pieces=pieces, vocabulary=vocabulary)
    parts = {"feature_width": 4, "embedding_width": 8, "embedding_rms": 0.1}
    proj = Projection(settings, **parts, embeddings_CD=torch.randn(11, 8))
    said = f"vocabulary={str(vocabulary).lower()} and features of {pieces} pieces to a memory token"
    with pytest.raises(SpliceError, match=said):
        proj(torch.randn(1, 3, 4), token_ids_PVT=torch.zeros(1, 3, 1, dtype=torch.int64))


def test_an_untrained_projection_reads_the_same_table():
    model = tiny_model(kind="attention", vocabulary=True)
    fresh = _untrained(model, torch.Generator().manual_seed(0))
    assert torch.equal(fresh.reader.embeddings_CD, model.proj.reader.embeddings_CD)
    assert not torch.equal(fresh.linear1.weight, model.proj.linear1.weight)


def test_it_needs_attention_and_the_table():
    with pytest.raises(ConfigError, match="vocabulary=true needs kind 'attention'; kind is 'mlp'"):
        ProjectionSettings(vocabulary=True)
    settings = ProjectionSettings(kind="attention", num_heads=2, vocabulary=True)
    for table in (None, torch.zeros(0)):  # the second as ZeRO-3 leaves it
        with pytest.raises(ConfigError, match="needs the LLM's input embeddings in one piece, and got none"):
            Projection(settings, feature_width=4, embedding_width=8, embedding_rms=0.1, embeddings_CD=table)
