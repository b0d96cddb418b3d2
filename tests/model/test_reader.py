"""The projection that reads text tokens: what is added, what it learns from, what an adapter holds of it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from memory.parts import shared_tokenizer
from safetensors.torch import load_file
from tiny import TOKENS, tiny_batch, tiny_model
from transformers import TrainingArguments

from ocrmem.config.projection import ProjectionSettings
from ocrmem.data.collator import MEMCollator
from ocrmem.errors import CheckpointError, ConfigError, SpliceError
from ocrmem.evaluation.run import _untrained
from ocrmem.model import reader as reader_module
from ocrmem.model.adapter import load_projection
from ocrmem.model.mem_model import MEMModel
from ocrmem.model.projection import Projection, compile_projection
from ocrmem.model.reader import VocabularyReader, dealt_evenly, spellings
from ocrmem.training.objectives import covered_embeddings
from ocrmem.training.trainer import MEMTrainer

WORDS = ["the", "Ġof", "Ġ", "and", "ĠOf", "Ġoft", "a", "ing", "Ġ1", "1", "Ġoften"]


def ids(words: list[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(words)}


def random_reader(read_tokens: int = 2) -> VocabularyReader:
    torch.manual_seed(0)
    reader = VocabularyReader(torch.randn(11, 8) * 0.1, read_tokens=read_tokens, vocabulary=ids(WORDS))
    with torch.no_grad():
        for reading in reader.readings:
            torch.nn.init.normal_(reading.none_W)
    return reader


def taught(reader: VocabularyReader, pieces_ND: torch.Tensor, keys_NW: torch.Tensor, *, reading=None) -> None:
    """Make a reading's query of each piece, all at right angles, a key; the first reading if none is given."""
    reading = reading or reader.readings[0]
    seen_ND = F.rms_norm(pieces_ND, pieces_ND.shape[-1:])
    with torch.no_grad():
        reading.query.weight.copy_(keys_NW.T @ seen_ND / pieces_ND.shape[1])
        reading.query.bias.zero_()
        reading.log_scale.fill_(6.0)


def test_every_token_is_spelled_by_its_first_and_last_bytes():
    spelled_CL = spellings({"ab": 0, "Ġof": 3, "bbbbbbb": 4, "abcdefghi": 5, "abcdefghijklm": 1, "far": 7}, 7)
    assert spelled_CL.dtype == torch.uint8
    assert [bytes(row) for row in spelled_CL.tolist()] == [
        b"ab".ljust(9, b"\0"),
        b"abcdefg" + b"lm",
        bytes(9),
        b" of".ljust(9, b"\0"),
        b"bbbbbbb".ljust(9, b"\0"),
        b"abcdefghi",
        bytes(9),
    ]


def test_every_character_of_a_vocabulary_of_characters_is_spelled_otherwise():
    """As sentencepiece has them: ▁ for a space, and thousands of characters that are a token each."""
    characters = [chr(0x4E00 + number) for number in range(3000)]
    spelled_CL = spellings(ids(["▁of", *characters]), 3001)
    assert bytes(spelled_CL[0].tolist()).startswith(b" of\0")
    assert len(spelled_CL.unique(dim=0)) == 3001


def test_what_a_person_reads_apart_is_spelled_apart():
    tokenizer = shared_tokenizer()
    vocabulary = tokenizer.get_vocab()
    spelled_CL = spellings(vocabulary, len(tokenizer))
    _, twin_C, count_K = spelled_CL.unique(dim=0, return_inverse=True, return_counts=True)
    alone = {token for token, row in vocabulary.items() if count_K[twin_C[row]] == 1}
    assert {token for token in vocabulary if len(token) < 8} <= alone
    assert len(alone) > 0.97 * len(vocabulary)


def test_a_piece_gets_the_embedding_that_it_is_read_as():
    reader = random_reader(1)
    pieces_PVD = torch.eye(8)[None, :3]
    reader.readings[0].none_W.data.zero_()
    taught(reader, pieces_PVD[0], reader.keys_CW()[[2, 7, 2]])
    wanted_VD = reader.embeddings_CD[[2, 7, 2]]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            read_PVRD, present_PVR, nothing = reader(pieces_PVD)
        rms = reader.embeddings_CD.square().mean().sqrt()
        torch.testing.assert_close(read_PVRD[0, :, 0], wanted_VD / rms, rtol=1e-3, atol=1e-3)
        assert (present_PVR > 0.99).all()
        assert nothing is None


def test_a_token_that_was_never_seen_is_read_by_its_letters():
    """Half of the vocabulary is in the training pieces, each drawn as its letters; the other half is read too."""
    torch.manual_seed(0)
    letters = "abcdefgh"
    words = [a + b for a in letters for b in letters]
    reader = VocabularyReader(torch.randn(64, 16), read_tokens=1, vocabulary=ids(words))
    drawn_ND = torch.stack([F.one_hot(torch.tensor([*map(letters.index, word)]), 8).flatten() for word in words])
    ids_N = torch.arange(64)
    seen_N = (ids_N // 8 + ids_N) % 2 == 0
    optimizer = torch.optim.Adam(reader.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        reader(drawn_ND[None, seen_N].float(), None, ids_N[None, seen_N, None])[2].backward()
        optimizer.step()
    read_PVRD, *_ = reader(drawn_ND[None].float())
    closest_N = torch.cdist(read_PVRD[0, :, 0], reader.value(reader.embeddings_CD * reader.scale)).argmin(1)
    assert (closest_N == ids_N)[seen_N].all()
    assert (closest_N == ids_N)[~seen_N].float().mean() > 0.9


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3_text"])
def test_what_is_read_has_one_size_whatever_the_llm_makes_of_its_embeddings(family):
    """Gemma multiplies its embeddings by the root of their width; the table has them as they are stored."""
    reader = tiny_model(family, kind="attention", read_tokens=1).proj.reader
    pieces_ND = torch.linalg.qr(torch.randn(24, 24)).Q
    read = []
    for keys_NW in reader.keys_CW()[:96].split(24):
        taught(reader, pieces_ND, keys_NW)
        read.append(reader(pieces_ND[None])[0])
    assert torch.cat(read).square().mean().sqrt().item() == pytest.approx(1, abs=0.1)


def test_a_piece_that_is_read_as_none_gets_nothing():
    reader = random_reader(1)
    pieces_PVD = torch.eye(8)[None, :3]
    keys_CW = reader.keys_CW().detach()
    none_W = torch.randn(144)
    with torch.no_grad():
        reader.readings[0].none_W.copy_(none_W)
    taught(reader, pieces_PVD[0], torch.stack([keys_CW[3], none_W, keys_CW[4]]))
    read_PVRD, present_PVR, _ = reader(pieces_PVD)
    assert present_PVR[0, 1, 0] < 1e-3 < 0.99 < present_PVR[0, 0, 0]
    assert read_PVRD[0, 1].abs().max() < 1e-3
    assert read_PVRD[0, 0].norm() > 0.1


def test_the_loss_is_the_cross_entropy_of_each_reading_of_the_pieces_in_use():
    reader = random_reader(2)
    pieces_PVD = torch.randn(2, 3, 8)
    ids_PVT = torch.tensor([[[4, -1, -1], [-1, -1, -1], [0, 9, 3]], [[5, 6, -1], [1, 1, 1], [2, -1, -1]]])
    *_, loss = reader(pieces_PVD, torch.tensor([3, 1]), ids_PVT)
    expected = 0.0
    letters = reader.letters.view(9, -1, 144)
    spelled = reader.spellings_CL.tolist()
    keys_CW = torch.stack([sum(letters[at, letter] for at, letter in enumerate(row)) for row in spelled])
    keys_CW = keys_CW / keys_CW.norm(dim=1, keepdim=True)
    for page, piece in ((0, 0), (0, 1), (0, 2), (1, 0)):
        for number, reading in enumerate(reader.readings):
            query_W = reading.query(pieces_PVD[page, piece] / pieces_PVD[page, piece].square().mean().sqrt())
            query_W = 40 * query_W / query_W.norm()
            logits = torch.cat([keys_CW @ query_W, (query_W @ reading.none_W)[None]])
            target = int(ids_PVT[page, piece, number])
            if number and ids_PVT[page, piece, number - 1] < 0:
                continue
            expected += F.cross_entropy(logits, torch.tensor(11 if target < 0 else target))
    torch.testing.assert_close(loss, expected / 4)


def test_the_loss_has_no_end_below_zero_in_lower_precision():
    """Whatever is rounded, the target's share of all shares is no more than 1."""
    torch.manual_seed(0)
    reader = VocabularyReader(torch.randn(50, 64), read_tokens=1, vocabulary=ids([f"{n:02}" for n in range(50)]))
    keys_CW = reader.keys_CW().detach()
    pieces_ND = torch.linalg.qr(torch.randn(64, 64)).Q[:50]
    taught(reader, pieces_ND, keys_CW)
    targets_N1 = torch.arange(50).repeat(20)[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        drawn_ND = pieces_ND.repeat(20, 1) + 0.001 * torch.randn(1000, 64)
        *_, losses_N = reader.readings[0](drawn_ND, keys_CW, reader.embeddings_CD, targets_N1[:, 0])
    assert losses_N.min() >= 0
    assert losses_N.max() < 1


def test_spellings_looked_up_are_those_as_a_product():
    reader = random_reader(1)
    looked_up_CW = reader.keys_CW()
    torch.testing.assert_close(reader.keys_CW(torch.tensor([4, 2])), looked_up_CW[[4, 2]])
    torch.testing.assert_close(looked_up_CW.norm(dim=1), torch.ones(11))


def test_training_reads_among_the_tokens_on_the_pages_and_others(monkeypatch):
    reader = random_reader(2)
    pieces_PVD = torch.randn(1, 4, 8)
    ids_PVT = torch.tensor([[[3, -1], [10, 3], [-1, -1], [6, -1]]])
    whole = reader(pieces_PVD, None, ids_PVT)[2]
    monkeypatch.setattr(reader_module, "CANDIDATES", 6)
    chosen_K, offset_K, places_NR = reader_module._chosen(ids_PVT[0], 11)
    assert len(chosen_K.unique()) == 6
    assert torch.where(places_NR < 0, -1, chosen_K[places_NR.clamp(min=0)]).equal(ids_PVT[0])
    fixed = torch.isin(chosen_K, torch.tensor([0, 3, 6, 10]))  # 0 stands in for none
    assert not offset_K[fixed].any()
    torch.testing.assert_close(offset_K[~fixed], torch.full((2,), 7 / 2).log())  # 7 others, 2 drawn
    among_few = [reader(pieces_PVD, None, ids_PVT)[2].item() for _ in range(40)]
    assert len({round(loss, 4) for loss in among_few}) > 5  # others are drawn each time
    with torch.no_grad():
        torch.testing.assert_close(reader(pieces_PVD, None, ids_PVT)[2], whole.detach())
    monkeypatch.setattr(reader_module, "CANDIDATES", 3)
    chosen_K, _, places_NR = reader_module._chosen(ids_PVT[0], 11)
    left_out_NR = (ids_PVT[0] >= 0) & ~torch.isin(ids_PVT[0], chosen_K)
    assert (places_NR == -2).equal(left_out_NR)
    assert torch.isfinite(reader(pieces_PVD, None, ids_PVT)[2])


def test_none_is_as_likely_among_few_as_among_all(monkeypatch):
    """Without the logits' offset it would be likelier in training than where tokens are read."""
    torch.manual_seed(0)
    words = [f"{number:04}" for number in range(3000)]
    reader = VocabularyReader(torch.randn(3000, 16), read_tokens=1, vocabulary=ids(words))
    with torch.no_grad():
        reader.readings[0].log_scale.fill_(1.0)
    pieces_PVD, ids_PVT = torch.randn(1, 20, 16), torch.full((1, 20, 1), -1)
    whole = reader(pieces_PVD, None, ids_PVT)[2].item()
    monkeypatch.setattr(reader_module, "CANDIDATES", 1000)
    assert reader(pieces_PVD, None, ids_PVT)[2].item() == pytest.approx(whole, abs=0.1)  # log 3 = 1.10 otherwise


@pytest.mark.parametrize("given", [False, True])
def test_parts_give_what_the_whole_gives(given, monkeypatch):
    reader = random_reader()
    pieces_PVD = torch.randn(3, 5, 8)
    ids_PVT = torch.randint(-1, 11, (3, 5, 2)) if given else None
    whole = reader(pieces_PVD, None, ids_PVT)
    monkeypatch.setattr(reader_module, "CHUNK", 4)
    with torch.no_grad():
        parts = reader(pieces_PVD, None, ids_PVT)
    assert given is (parts[2] is not None)
    for part, of_whole in zip(parts, whole, strict=True):
        if of_whole is not None:
            torch.testing.assert_close(part, of_whole.detach())


def test_a_piece_without_a_first_token_has_no_second():
    reader = random_reader(2)
    pieces_PVD = torch.eye(8)[None, :2]
    keys_CW = reader.keys_CW().detach()
    none_W = torch.randn(144)
    for reading, keys_NW in zip(reader.readings, (torch.stack([none_W, keys_CW[3]]), keys_CW[[4, 5]]), strict=True):
        with torch.no_grad():
            reading.none_W.copy_(none_W)
        taught(reader, pieces_PVD[0], keys_NW, reading=reading)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            read_PVRD, present_PVR, _ = reader(pieces_PVD)
        assert (present_PVR[0] > 0.5).tolist() == [[False, False], [True, True]]
        assert not read_PVRD[0, 0, 1].any()
        assert read_PVRD[0, 1, 1].any()


def test_every_parameter_learns_and_the_table_stays(tmp_path):
    model = tiny_model(kind="attention", read_tokens=2)
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
        model.proj.reader.readings[1].none_W.add_(0.5)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter.safetensors")
    assert {"reader.readings.0.query.weight", "reader.readings.1.none_W", "reader.letters"} <= set(stored)
    assert not [name for name in stored if "embeddings" in name]
    loaded = MEMModel.from_pretrained(tmp_path, base_llm_model=model.base_llm_model, ocr_embed=model.ocr_embed)
    torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("matrix_dtype", [None, torch.bfloat16, torch.int8])
def test_an_adapter_has_the_spellings_as_they_are(tmp_path, matrix_dtype):
    model = tiny_model(kind="attention", read_tokens=1)
    model.save_pretrained(tmp_path, matrix_dtype=matrix_dtype)
    loaded = MEMModel.from_pretrained(tmp_path, base_llm_model=model.base_llm_model, ocr_embed=model.ocr_embed)
    assert loaded.proj.reader.spellings_CL.equal(spellings(TOKENS, 101))
    assert loaded.proj.reader.spellings_CL.dtype == torch.uint8


def test_training_without_a_vocabulary_is_refused(tmp_path):
    model = tiny_model(kind="attention", read_tokens=1)
    unread = MEMModel(model.config, base_llm_model=model.base_llm_model, ocr_embed=model.ocr_embed)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ConfigError, match=r"was given no vocabulary. Make .* vocabulary=tokenizer.get_vocab\(\)\)"):
        MEMTrainer(unread, arguments, data_collator=MEMCollator(0))


def test_a_batch_with_its_text_has_the_same_loss_and_that_of_reading():
    model = tiny_model(kind="attention", read_tokens=1)
    batch = tiny_batch()
    pages = batch["pages"].shape[0]
    ids_PVT = torch.randint(-1, 50, (pages, model.ocr_embed.tokens_per_page, 2))
    features = model.ocr_embed(batch.pop("pages"))
    with_text = model(**batch, features=features, memory_token_ids=ids_PVT)
    without = model(**batch, features=features)
    torch.testing.assert_close(with_text.loss, without.loss)
    assert without.reading_loss is None
    assert with_text.reading_loss > 1
    with pytest.raises(SpliceError, match="`memory_targets` came without `features`; give both"):
        model(**batch, memory_targets=torch.zeros(pages, model.ocr_embed.tokens_per_page, 8))


@pytest.mark.parametrize("deal_tokens", [False, True])
def test_true_tokens_stand_for_what_would_be_read(deal_tokens, monkeypatch):
    model = tiny_model(kind="attention", read_tokens=2, merge=True, deal_tokens=deal_tokens)
    batch = tiny_batch()
    features = model.ocr_embed(batch.pop("pages"))
    ids_PVT = torch.randint(0, 50, (len(features), model.ocr_embed.tokens_per_page, 2))
    ids_PVT[:, ::3] = -1
    ids_PVT[:, 1::3, 1] = -1

    def rightly(seen_ND, keys_CW, table_CD, targets_N, offset_C):
        return table_CD[targets_N.clamp(min=0)], (targets_N < 0).float(), seen_ND.new_zeros(len(targets_N))

    true, reading_loss = model.proj(None, batch["page_num_tokens"], token_ids_PVT=ids_PVT)
    assert reading_loss is None
    for reading in model.proj.reader.readings:
        monkeypatch.setattr(reading, "forward", rightly)
    read, _ = model.proj(features, batch["page_num_tokens"], token_ids_PVT=ids_PVT)
    used = torch.arange(read.shape[1]) < batch["page_num_tokens"][:, None]
    torch.testing.assert_close(read[used], true[used])
    outputs = model(**batch, memory_token_ids=ids_PVT)
    outputs.loss.backward()
    assert outputs.reading_loss is None
    learning = {name for name, parameter in model.proj.named_parameters() if parameter.grad is not None}
    assert "reader.value.weight" in learning
    assert not any(name.startswith(("linear", "attention", "reader.readings", "reader.letters")) for name in learning)


def test_other_pages_are_read_beside_those_of_the_memory():
    model = tiny_model(kind="attention", read_tokens=2, merge=True, deal_tokens=True)
    batch = tiny_batch()
    features = model.ocr_embed(batch.pop("pages"))
    ids_PVT = torch.randint(-1, 50, (len(features), model.ocr_embed.tokens_per_page, 2))
    others = {"features": features.flip(0)[:1], "page_num_tokens": torch.tensor([2]), "memory_token_ids": ids_PVT[:1]}
    outputs = model(**batch, memory_token_ids=ids_PVT, reading=others)
    torch.testing.assert_close(outputs.loss, model(**batch, memory_token_ids=ids_PVT).loss)
    _, expected = model.proj(others["features"], others["page_num_tokens"], token_ids_PVT=ids_PVT[:1])
    torch.testing.assert_close(outputs.reading_loss, expected)
    (outputs.loss + outputs.reading_loss).backward()
    assert all(parameter.grad is not None for parameter in model.proj.parameters())


@pytest.mark.parametrize("deal_tokens", [False, True])
def test_with_the_text_the_layers_that_read_learn_from_it_alone(deal_tokens):
    model = tiny_model(kind="attention", read_tokens=1, merge=True, deal_tokens=deal_tokens)
    batch = tiny_batch()
    features = model.ocr_embed(batch.pop("pages"))
    ids_PVT = torch.randint(0, 50, (len(features), model.ocr_embed.tokens_per_page, 1))
    reads = ("linear1", "linear2", "attention", "reader.readings", "reader.letters")

    def learning(loss):
        model.zero_grad()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.proj.named_parameters()}
        return {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}

    outputs = model(**batch, features=features, memory_token_ids=ids_PVT)
    assert not any(name.startswith(reads) for name in learning(outputs.loss))
    outputs = model(**batch, features=features, memory_token_ids=ids_PVT)
    assert all(name.startswith(reads) for name in learning(outputs.reading_loss))
    without = learning(model(**batch, features=features).loss)
    assert {"linear1.weight", "reader.letters", "reader.value.weight"} <= without


def test_a_warm_start_learns_to_read():
    model = tiny_model(kind="attention", read_tokens=1)
    features_PVE = torch.randn(2, 3, model.ocr_embed.feature_width)
    slots_PVT = torch.tensor([[[5, -1], [6, 7], [-1, -1]], [[8, -1], [5, -1], [9, -1]]])
    targets_PVD = covered_embeddings(slots_PVT, model.get_input_embeddings())
    given = {"input_ids": torch.zeros(1, 1, dtype=torch.int64), "features": features_PVE}
    given |= {"page_num_tokens": torch.tensor([3, 3]), "memory_targets": targets_PVD, "memory_token_ids": slots_PVT}
    optimizer = torch.optim.Adam(model.proj.parameters(), lr=1e-2)
    before = model(**given)
    for _ in range(60):
        optimizer.zero_grad()
        outputs = model(**given)
        (outputs.loss + outputs.reading_loss).backward()
        optimizer.step()
    after = model(**given)
    assert after.reading_loss < 0.5 * before.reading_loss
    assert after.loss < before.loss


@pytest.mark.parametrize(
    ("read_tokens", "shape", "said"),
    [
        (0, (1, 6, 1), "a projection with projection.read_tokens=0, which reads none"),
        (1, (1, 3, 1), r"have the shape \[1, 3, 1\], expected \[1, 6, …\]: those of every piece"),
    ],
)
def test_tokens_that_cannot_be_read_are_refused(read_tokens, shape, said):
    settings = ProjectionSettings(kind="attention", num_heads=2, pieces=2, read_tokens=read_tokens)
    parts = {"feature_width": 4, "embedding_width": 8, "embedding_rms": 0.1}
    proj = Projection(settings, **parts, embeddings_CD=torch.randn(11, 8))
    with pytest.raises(SpliceError, match=said):
        proj(torch.randn(1, 3, 4), token_ids_PVT=torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(SpliceError, match="neither features nor text tokens came to the projection"):
        proj(None)


def test_a_projection_begins_to_read_with_the_layers_of_one_that_does_not(tmp_path):
    plain, reads = tiny_model(kind="attention", seed=3), tiny_model(kind="attention", read_tokens=2)
    plain.save_pretrained(tmp_path)
    fresh = {name: value.clone() for name, value in reads.proj.reader.state_dict().items()}
    load_projection(reads, tmp_path, start=True)
    for name, value in plain.proj.state_dict().items():
        assert torch.equal(reads.proj.state_dict()[name], value)
    for name, value in fresh.items():
        assert torch.equal(reads.proj.reader.state_dict()[name], value)
    reads(**tiny_batch()).loss.backward()
    assert all(parameter.grad.any() for parameter in reads.proj.reader.parameters())
    with pytest.raises(CheckpointError, match="missing reader.letters; "):
        load_projection(reads, tmp_path)


def test_a_compiled_reading_is_the_same():
    model = tiny_model(kind="attention", read_tokens=2)
    features_PVE, used_P = torch.randn(2, 3, model.ocr_embed.feature_width), torch.tensor([3, 2])
    ids_PVT = torch.randint(-1, 50, (2, 3, 2))
    memory_PVD, loss = model.proj(features_PVE, used_P, token_ids_PVT=ids_PVT)
    compile_projection(model.proj, backend="eager")
    compiled_PVD, compiled_loss = model.proj(features_PVE, used_P, token_ids_PVT=ids_PVT)
    torch.testing.assert_close(compiled_PVD, memory_PVD)
    torch.testing.assert_close(compiled_loss, loss)


def test_an_untrained_projection_reads_the_same_table():
    model = tiny_model(kind="attention", read_tokens=1)
    fresh = _untrained(model, torch.Generator().manual_seed(0))
    assert torch.equal(fresh.reader.embeddings_CD, model.proj.reader.embeddings_CD)
    assert torch.equal(fresh.reader.spellings_CL, model.proj.reader.spellings_CL)
    assert fresh.reader.spellings_CL.any()
    assert not torch.equal(fresh.linear1.weight, model.proj.linear1.weight)


def test_it_needs_attention_and_the_table():
    with pytest.raises(ConfigError, match="read_tokens=1 needs kind 'attention'"):
        ProjectionSettings(read_tokens=1)
    with pytest.raises(ConfigError, match="read_tokens=-1: expected 0 or more"):
        ProjectionSettings(kind="attention", read_tokens=-1)
    settings = ProjectionSettings(kind="attention", num_heads=2, read_tokens=1)
    for table in (None, torch.zeros(0)):  # the second as ZeRO-3 leaves it
        with pytest.raises(ConfigError, match="read_tokens=1 needs the LLM's input embeddings in one piece, and got"):
            Projection(settings, feature_width=4, embedding_width=8, embedding_rms=0.1, embeddings_CD=table)


@pytest.mark.parametrize("slots", [6, 4, 1])
def test_tokens_are_dealt_out_as_a_rivals_are(slots):
    torch.manual_seed(0)
    states_LMD = torch.randn(20, 24, 3, requires_grad=True)
    present_LM = torch.rand(20, 24) < torch.linspace(0, 1, 20)[:, None]
    dealt_LVKD = dealt_evenly(states_LMD, present_LM, torch.full((20,), slots), (6, 5))
    for line in range(20):
        found = states_LMD[line, present_LM[line]]
        expected = torch.zeros(6, 5, 3)
        of_slot = [number * slots // len(found) for number in range(len(found))]  # as `token_slots` has it
        for slot in range(slots):
            inside = [found[number] for number in range(len(found)) if of_slot[number] == slot]
            for back, state in enumerate(reversed(inside[-5:])):
                expected[slot, back] = state
        torch.testing.assert_close(dealt_LVKD[line], expected)
    dealt_LVKD.sum().backward()
    assert (states_LMD.grad[~present_LM] == 0).all()


def dealing(pieces=2, **changes):
    settings = ProjectionSettings(
        **{"kind": "attention", "num_layers": 1, "num_heads": 2, "pieces": pieces, "merge": True, "merged_layers": 1}
        | {"read_tokens": 2, "deal_tokens": True, **changes}
    )
    torch.manual_seed(0)
    parts = {"feature_width": 3 * pieces, "embedding_width": 8, "embedding_rms": 0.1}
    return Projection(settings, **parts, embeddings_CD=torch.randn(31, 8), vocabulary=TOKENS)


def test_a_page_is_dealt_out_as_far_as_it_goes():
    proj = dealing()
    for matrix in proj.merge:
        torch.nn.init.normal_(matrix.weight)
    features_PVE, used_P = torch.randn(2, 12, 6), torch.tensor([12, 6])
    memory_PVD = proj(features_PVE, used_P)
    assert memory_PVD.shape == (2, 12, 8)
    changed = features_PVE.clone()
    changed[1, 6:] = 9.0  # beyond what is in use
    torch.testing.assert_close(proj(changed, used_P)[1, :6], memory_PVD[1, :6])
    torch.testing.assert_close(proj(features_PVE[1:, :6]), memory_PVD[1:, :6])
    fine = proj(features_PVE.reshape(2, 24, 3), used_P * 2)  # one piece to a memory token
    assert fine.shape == (2, 24, 8)
    assert proj(features_PVE[:0], used_P[:0]).shape == (0, 12, 8)
    with pytest.raises(
        SpliceError, match="features of 4 pieces to a memory token, expected projection.pieces=2 at most"
    ):
        proj(torch.randn(1, 4, 12), torch.tensor([4]))


def test_what_is_dealt_is_the_tokens_that_were_read():
    proj = dealing(merged_layers=0)
    states_PND = torch.randn(1, 8, 8)
    read_PNRD = torch.randn(1, 8, 2, 8)
    present_PNR = torch.zeros(1, 8, 2)
    for piece, reading in ((0, 0), (1, 1), (2, 0), (2, 1), (7, 0)):
        present_PNR[0, piece, reading] = 1
    matrices = [matrix.weight for matrix in proj.merge]
    for weight in matrices:
        torch.nn.init.normal_(weight)
    dealt_PVD = proj._dealt(states_PND[:, :, None] + read_PNRD, present_PNR, 2, torch.tensor([4]))
    token = {(n, r): states_PND[0, n] + read_PNRD[0, n, r] for n, r in ((0, 0), (1, 1), (2, 0), (2, 1), (7, 0))}
    expected = torch.stack(  # five tokens over four memory tokens
        [
            matrices[0] @ token[1, 1] + matrices[1] @ token[0, 0],
            matrices[0] @ token[2, 0],
            matrices[0] @ token[2, 1],
            matrices[0] @ token[7, 0],
        ]
    )
    torch.testing.assert_close(dealt_PVD[0], expected, rtol=1e-4, atol=1e-4)


def test_dealing_learns_through_every_matrix_and_goes_on_with_more_pieces(tmp_path):
    model = tiny_model(kind="attention")
    model.proj = dealing(pieces=2, merged_layers=0)
    memory_PVD = model.proj(torch.randn(3, 4, 6), torch.tensor([4, 4, 4]))
    memory_PVD.pow(3).sum().backward()
    assert all(matrix.weight.grad.any() for matrix in model.proj.merge)
    model.save_pretrained(tmp_path)
    model.proj = dealing(pieces=4, merged_layers=0)
    load_projection(model, tmp_path, start=True)
    assert len(model.proj.merge) == 5
    assert not model.proj.merge[3].weight.any()


def test_an_adapter_that_deals_is_no_start_for_one_that_merges_pieces(tmp_path):
    model = tiny_model(kind="attention")
    settings = dataclasses.asdict(model.config.projection_settings)
    model.config.projection = {**settings, "pieces": 2, "merge": True, "read_tokens": 2, "deal_tokens": True}
    model.proj = dealing()
    model.save_pretrained(tmp_path)
    other = tiny_model(kind="attention")
    other.proj = dealing(pieces=4, deal_tokens=False)
    with pytest.raises(CheckpointError, match=r"deals out the tokens .* Set projection.deal_tokens=true, or"):
        load_projection(other, tmp_path, start=True)


def test_dealing_needs_tokens_that_are_read():
    with pytest.raises(ConfigError, match="deal_tokens=true needs read_tokens of 1 or more, and merge=true"):
        ProjectionSettings(kind="attention", pieces=2, merge=True, deal_tokens=True)
