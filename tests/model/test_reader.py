"""The projection that reads letters: what it learns from, how text is cut into tokens, what an adapter holds of it."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from memory.parts import shared_tokenizer
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tiny_batch, tiny_model, tiny_tokenizer
from transformers import TrainingArguments

from ocrmem.config.mem import RivalRecord
from ocrmem.config.projection import ProjectionSettings
from ocrmem.data.collator import MEMCollator
from ocrmem.errors import CheckpointError, ConfigError, SpliceError
from ocrmem.evaluation.run import _untrained
from ocrmem.model.adapter import load_projection
from ocrmem.model.mem_model import MEMModel
from ocrmem.model.projection import Projection, compile_projection
from ocrmem.model.reader import (
    ALPHABET,
    LETTERS,
    NONE,
    OTHER,
    PageReader,
    cut_pages,
    dealt_evenly,
    letter_codes,
    page_cutter,
)
from ocrmem.training.rivals import rival_projection
from ocrmem.training.trainer import MEMTrainer

READS = ("linear1", "linear2", "attention", "reader.letters")
"""Parts of a projection that learn from letters alone."""


def codes_of(pieces: list[str]) -> torch.Tensor:
    """int16 [V, LETTERS] of the letters of pieces."""
    return torch.from_numpy(np.stack([np.pad(letter_codes(piece), (0, LETTERS - len(piece))) for piece in pieces]))


def seeing(reader: PageReader, pages: list[list[str]]) -> torch.Tensor:
    """Make a reader see these letters in pieces [P, V, D], which it is given."""
    letters_PVL = torch.stack([codes_of(page) for page in pages]).long()
    wanted = F.one_hot(letters_PVL.flatten(0, 1), len(ALPHABET) + 2).flatten(1).float()
    width = reader.value.in_features
    pieces_ND = torch.linalg.qr(torch.randn(width, width)).Q[: len(wanted)]
    assert len(pieces_ND) == len(wanted), "more pieces than there are dimensions"
    with torch.no_grad():
        reader.letters.weight.copy_(9 * wanted.T @ F.rms_norm(pieces_ND, (width,)) / width)
        reader.letters.bias.zero_()
    return pieces_ND.unflatten(0, letters_PVL.shape[:2])


def new_reader(width: int = 24) -> PageReader:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return PageReader(torch.randn(len(tokenizer), width) * 0.1, tokenizer=tokenizer)


def tokens_of(reader: PageReader, ids_PVT: torch.Tensor) -> list[list[list[str]]]:
    return [
        [[reader.tokenizer.convert_ids_to_tokens(i) for i in piece if i >= 0] for piece in page]
        for page in ids_PVT.tolist()
    ]


def test_letters_have_codes_of_their_own():
    assert len(set(ALPHABET)) == len(ALPHABET)
    codes = letter_codes(ALPHABET)
    assert sorted(codes.tolist()) == list(range(2, len(ALPHABET) + 2))
    assert letter_codes("漢😀").tolist() == [OTHER] * 2
    assert letter_codes("").tolist() == []
    assert NONE not in codes


def test_a_page_is_cut_into_tokens_as_its_text_is():
    """Tokens go to the piece within which they begin, also where they go on in the next."""
    reader = new_reader()
    pieces_PVD = seeing(reader, [["a th", "e ki", "", "ng\n"], ["xy", "", "12", "漢"]])
    ids_PVR = reader.read(pieces_PVD, torch.tensor([4, 4]))
    assert ids_PVR.shape == (2, 4, LETTERS)
    assert tokens_of(reader, ids_PVR) == [
        [["a", " ", "the"], [" ", "k", "ing"], [], ["\n"]],
        [["x", "y"], [], ["1", "2"], ["?"]],
    ]
    whole = reader.tokenizer("a the king\n", add_special_tokens=False)["input_ids"]
    assert ids_PVR[0][ids_PVR[0] >= 0].tolist() == whole
    assert tokens_of(reader, reader.read(pieces_PVD, torch.tensor([1, 0]))) == [
        [["a", " ", "th"], [], [], []],
        [[], [], [], []],
    ]
    assert (reader.read(pieces_PVD, torch.tensor([0, 0])) == -1).all()


def test_a_piece_ends_with_its_first_none():
    reader = new_reader()
    pieces_PVD = seeing(reader, [["abcde", "fgh"]])
    assert tokens_of(reader, reader.read(pieces_PVD)) == [[[*"abcde"], [*"fgh"]]]
    with torch.no_grad():  # the second letter of every piece is none
        reader.letters.bias.view(LETTERS, -1)[1, NONE] = 100.0
    assert tokens_of(reader, reader.read(pieces_PVD)) == [[["a"], ["f"]]]


def test_pages_are_cut_apart_and_blanks_are_spaces():
    tokenizer = shared_tokenizer()
    pieces = [["The ", "king"], [" and", " all"], ["10\u00a0", "m\tx"]]
    codes = np.stack([codes_of(page).numpy() for page in (pieces[0], pieces[1], pieces[2], ["end", " "])])
    cut = cut_pages(codes, page_cutter(tokenizer))
    found = [tokenizer.decode(page[page >= 0]) for page in cut]
    assert found == ["The king", " and all", "10 m x", "end"]
    assert cut.shape == (4, 2, LETTERS)


def test_a_tokenizer_that_pads_or_shortens_does_neither_here():
    reader = new_reader()
    reader.tokenizer.pad_token = "?"
    reader.tokenizer(["abc", "a"], padding=True, truncation=True, max_length=2)
    pieces_PVD = seeing(reader, [["abcde"], ["f"]])
    assert tokens_of(reader, reader.read(pieces_PVD)) == [[[*"abcde"]], [["f"]]]


def test_rare_words_are_cut_as_the_llms_tokenizer_cuts_them():
    tokenizer = shared_tokenizer()
    text = "Artiodactyla: fingering\norchestral – 18,250 “naïve” Achaeans don't…"
    reader = PageReader(torch.randn(len(tokenizer), 24), tokenizer=tokenizer)
    pieces = [text[start : start + 4] for start in range(0, len(text), 4)]
    pieces_PVD = seeing(reader, [pieces])
    ids_PVR = reader.read(pieces_PVD)
    assert ids_PVR[ids_PVR >= 0].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_tokens_are_given_as_the_llms_embeddings_at_one_size():
    reader = new_reader()
    ids_PVK = torch.tensor([[[3, 4, -1], [-1, -1, -1]], [[5, 6, 7], [-1, 9, -1]]])
    read_PVKD, present_PVK = reader(ids_PVK)
    assert present_PVK.tolist() == [[[True, True, False], [False] * 3], [[True] * 3, [False, True, False]]]
    rms = reader.embeddings_CD.square().mean().sqrt()
    torch.testing.assert_close(read_PVKD[1, 0], reader.embeddings_CD[[5, 6, 7]] / rms)
    assert not read_PVKD[~present_PVK].any()


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3_text"])
def test_embeddings_have_one_size_whatever_the_llm_makes_of_them(family):
    """Gemma multiplies its embeddings by the root of their width; the table has them as they are stored."""
    reader = tiny_model(family, kind="attention", read_tokens=1).proj.reader
    read, _ = reader(torch.arange(96)[None, :, None])
    assert read.square().mean().sqrt().item() == pytest.approx(1, abs=0.1)


def test_the_loss_is_the_cross_entropy_of_the_letters_of_the_pieces_in_use():
    reader = new_reader()
    pieces_PVD = torch.randn(2, 3, 24)
    letters_PVL = torch.stack([codes_of(["ab", "", "cdefg"]), codes_of(["h", "i", "j"])])
    loss = reader.loss(pieces_PVD, torch.tensor([3, 1]), letters_PVL)
    expected = 0.0
    for page, piece in ((0, 0), (0, 1), (0, 2), (1, 0)):
        seen_D = pieces_PVD[page, piece] / pieces_PVD[page, piece].square().mean().sqrt()
        for logits, letter in zip(reader.letters(seen_D).view(LETTERS, -1), letters_PVL[page, piece], strict=True):
            expected += F.cross_entropy(logits, letter.long())
    torch.testing.assert_close(loss, expected / 4)


def test_it_learns_to_read():
    torch.manual_seed(0)
    letters = "abcdefgh"
    words = [a + b for a in letters for b in letters]
    reader = new_reader(16)
    drawn_ND = torch.stack([F.one_hot(torch.tensor([*map(letters.index, word)]), 8).flatten() for word in words])
    optimizer = torch.optim.Adam(reader.parameters(), lr=3e-2)
    for _ in range(100):
        optimizer.zero_grad()
        reader.loss(drawn_ND[None].float(), None, codes_of(words)[None]).backward()
        optimizer.step()
    (read,) = tokens_of(reader, reader.read(drawn_ND[None].float()))
    assert ["".join(tokens) for tokens in read] == words


@pytest.mark.parametrize("tokenizer", [None, "slow"])
def test_without_a_fast_tokenizer_nothing_can_be_read(tokenizer):
    reader = new_reader()
    reader.tokenizer = tokenizer and type("SlowTokenizer", (), {"is_fast": False})()
    said = "a SlowTokenizer, which is no fast" if tokenizer else "no"
    with pytest.raises(ConfigError, match=rf"was given {said} tokenizer. Give the LLM's: MEMModel\(…, tokenizer="):
        reader.read(torch.randn(1, 2, 24))


def test_an_adapter_that_reads_is_loaded_with_the_llms_tokenizer(tmp_path, caplog):
    model = tiny_model(kind="attention", read_tokens=2)
    before = model.get_input_embeddings().weight.clone()
    batch = tiny_batch()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter.safetensors")
    assert {"reader.letters.weight", "reader.value.weight"} <= set(stored)
    assert not [name for name in stored if "embeddings" in name]
    parts = {"base_llm_model": model.base_llm_model, "ocr_embed": model.ocr_embed}
    loaded = MEMModel.from_pretrained(tmp_path, **parts, tokenizer=tiny_tokenizer())
    torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss)
    assert torch.equal(loaded.proj.reader.embeddings_CD, before.float())
    without = MEMModel.from_pretrained(tmp_path, **parts)  # a random LLM, of which there is no tokenizer to load
    assert "the adapter reads letters, and no tokenizer was found" in caplog.text
    with pytest.raises(ConfigError, match="was given no tokenizer. Give the LLM's"):
        without(**batch)
    assert set(model._ddp_params_and_buffers_to_ignore) <= set(dict(model.named_buffers()))


def test_replies_alone_leave_the_reading_as_it_is(tmp_path):
    """No gradient of the LLM's loss reaches it."""
    model = tiny_model(kind="attention", read_tokens=1)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for _ in range(2):
        MEMTrainer(model, arguments, data_collator=MEMCollator(0))
    learning = {name for name, parameter in model.proj.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in model.proj.named_parameters() if not name.startswith(READS)}
    model(**tiny_batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.proj.parameters() if parameter.requires_grad)
    assert tiny_model().proj.reading_parameters() == []


def text_of(model: MEMModel, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Random text for pages."""
    shape = len(features), model.ocr_embed.tokens_per_page
    return {
        "memory_token_ids": torch.randint(-1, 50, (*shape, 2)),
        "memory_letters": torch.randint(0, len(ALPHABET) + 2, (*shape, LETTERS)),
    }


@pytest.mark.parametrize("deal_tokens", [False, True])
def test_with_the_text_the_layers_that_read_learn_from_it_alone(deal_tokens):
    model = tiny_model(kind="attention", read_tokens=1, merge=True, deal_tokens=deal_tokens)
    batch = tiny_batch()
    features = model.ocr_embed(batch.pop("pages"))
    text = text_of(model, features)

    def learning(loss):
        model.zero_grad()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.proj.named_parameters()}
        return {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}

    outputs = model(**batch, features=features, **text)
    assert outputs.reading_loss > 1
    by_llm = learning(outputs.loss)
    assert "reader.value.weight" in by_llm
    assert not any(name.startswith(READS) for name in by_llm)
    outputs = model(**batch, features=features, **text)
    by_reading = learning(outputs.reading_loss)
    assert all(name.startswith(READS) for name in by_reading)
    assert all(any(name.startswith(part) for name in by_reading) for part in READS)
    assert model(**batch, features=features).reading_loss is None


@pytest.mark.parametrize("deal_tokens", [False, True])
def test_a_memory_of_what_is_read_is_that_of_the_text_where_it_is_read_rightly(deal_tokens):
    model = tiny_model(kind="attention", read_tokens=2, merge=True, deal_tokens=deal_tokens)
    batch = tiny_batch()
    features = model.ocr_embed(batch.pop("pages"))
    counts = batch["page_num_tokens"]
    read = model.proj(features, counts)
    pieces_PVD = model.proj._seen(features, 1, counts)
    ids_PVT = model.proj.reader.read(pieces_PVD, counts)
    assert (ids_PVT >= 0).any()
    true = model.proj(None, counts, token_ids_PVT=ids_PVT)
    used = torch.arange(read.shape[1]) < counts[:, None]
    torch.testing.assert_close(read[used], true[used])
    given = model(**batch, memory_token_ids=ids_PVT)
    torch.testing.assert_close(given.loss, model(**batch, features=features).loss)
    assert given.reading_loss is None


def test_other_pages_are_read_beside_those_of_the_memory():
    model = tiny_model(kind="attention", read_tokens=2, merge=True, deal_tokens=True)
    batch = tiny_batch()
    features = model.ocr_embed(batch.pop("pages"))
    text = text_of(model, features)
    counts = torch.tensor([2])
    letters = text["memory_letters"][:1]
    others = {"features": features.flip(0)[:1], "page_num_tokens": counts, "memory_letters": letters}
    memory_PVD, loss = model.proj(features, batch["page_num_tokens"], letters_PVL=text["memory_letters"])
    assert torch.equal(memory_PVD, model.proj(features, batch["page_num_tokens"]))  # of what is read
    assert loss > 1
    outputs = model(**batch, memory_token_ids=text["memory_token_ids"], reading=others)
    alone = model(**batch, memory_token_ids=text["memory_token_ids"])
    torch.testing.assert_close(outputs.loss, alone.loss)
    pieces_PVD = model.proj._seen(others["features"], 1, counts)
    expected = model.proj.reader.loss(pieces_PVD, counts, letters)
    torch.testing.assert_close(outputs.reading_loss, expected)
    (outputs.loss + outputs.reading_loss).backward()
    assert all(parameter.grad is not None for parameter in model.proj.parameters())


@pytest.mark.parametrize(
    ("read_tokens", "shape", "said"),
    [
        (0, (1, 6, 1), "came to a projection with projection.read_tokens=0, which reads none"),
        (1, (1, 3, 1), r"to read have the shape \[1, 3, 1\], expected \[1, 6, …\]: those of every piece"),
    ],
)
@pytest.mark.parametrize("what", ["token_ids_PVT", "letters_PVL"])
def test_text_that_cannot_be_read_is_refused(read_tokens, shape, said, what):
    settings = ProjectionSettings(kind="attention", num_heads=2, pieces=2, read_tokens=read_tokens)
    parts = {"feature_width": 4, "embedding_width": 8, "embedding_rms": 0.1}
    proj = Projection(settings, **parts, embeddings_CD=torch.randn(11, 8))
    with pytest.raises(SpliceError, match=said):
        proj(torch.randn(1, 3, 4), **{what: torch.zeros(shape, dtype=torch.int64)})
    with pytest.raises(SpliceError, match="no features came to the projection"):
        proj(None)
    with pytest.raises(SpliceError, match="no features came to the projection"):
        tiny_model(kind="attention", read_tokens=1)(**tiny_batch(), memory_targets=torch.zeros(1, 21, 24))


def test_a_projection_begins_to_read_with_the_layers_of_one_that_does_not(tmp_path):
    plain, reads = tiny_model(kind="attention", seed=3), tiny_model(kind="attention", read_tokens=2)
    plain.save_pretrained(tmp_path)
    fresh = {name: value.clone() for name, value in reads.proj.reader.state_dict().items()}
    load_projection(reads, tmp_path, start=True)
    for name, value in plain.proj.state_dict().items():
        assert torch.equal(reads.proj.state_dict()[name], value)
    for name, value in fresh.items():
        assert torch.equal(reads.proj.reader.state_dict()[name], value)
    with pytest.raises(CheckpointError, match="missing reader.letters.bias; missing reader.letters.weight; "):
        load_projection(reads, tmp_path)


def test_a_compiled_projection_is_the_same():
    model = tiny_model(kind="attention", read_tokens=2)
    features_PVE, used_P = torch.randn(2, 3, model.ocr_embed.feature_width), torch.tensor([3, 2])
    given = {"token_ids_PVT": torch.randint(-1, 50, (2, 3, 2)), "letters_PVL": torch.randint(0, 50, (2, 3, LETTERS))}
    memory_PVD, loss = model.proj(features_PVE, used_P, **given)
    compile_projection(model.proj, backend="eager")
    compiled_PVD, compiled_loss = model.proj(features_PVE, used_P, **given)
    torch.testing.assert_close(compiled_PVD, memory_PVD)
    torch.testing.assert_close(compiled_loss, loss)


def test_an_untrained_projection_has_the_same_table_and_tokenizer():
    model = tiny_model(kind="attention", read_tokens=1)
    fresh = _untrained(model, torch.Generator().manual_seed(0))
    assert torch.equal(fresh.reader.embeddings_CD, model.proj.reader.embeddings_CD)
    assert fresh.reader.tokenizer is model.proj.reader.tokenizer
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
    ids_LM = torch.randint(0, 99, (20, 24))
    ids_LM[torch.rand(20, 24) >= torch.linspace(0, 1, 20)[:, None]] = -1
    dealt_LVK = dealt_evenly(ids_LM, torch.full((20,), slots), (6, 5))
    for line in range(20):
        found = ids_LM[line][ids_LM[line] >= 0].tolist()
        of_slot = [number * slots // len(found) for number in range(len(found))]  # as `token_slots` has it
        for slot in range(6):
            inside = [token for token, at in zip(found, of_slot, strict=True) if at == slot][-5:]
            assert dealt_LVK[line, slot].tolist() == [-1] * (5 - len(inside)) + inside


def dealing(pieces=2, **changes):
    settings = ProjectionSettings(
        **{"kind": "attention", "num_layers": 1, "num_heads": 2, "pieces": pieces, "merge": True, "merged_layers": 1}
        | {"read_tokens": 2, "deal_tokens": True, **changes}
    )
    torch.manual_seed(0)
    parts = {"feature_width": 3 * pieces, "embedding_width": 8, "embedding_rms": 0.1}
    return Projection(settings, **parts, embeddings_CD=torch.randn(VOCABULARY, 8), tokenizer=tiny_tokenizer())


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
    ids_PVT = torch.full((1, 8, 3), -1)
    for token, (piece, place) in enumerate(((0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (7, 0))):
        ids_PVT[0, piece, place] = token
    matrices = [matrix.weight for matrix in proj.merge]
    for weight in matrices:
        torch.nn.init.normal_(weight)
    memory_PVD = proj._of_text(ids_PVT, 2, torch.tensor([4]))
    states = proj.reader(torch.arange(6)[None, None])[0][0, 0]
    expected = torch.stack(  # five tokens over four memory tokens: of a piece two are read
        [
            matrices[0] @ states[1] + matrices[1] @ states[0],
            matrices[0] @ states[2],
            matrices[0] @ states[3],
            matrices[0] @ states[5],
        ]
    )
    torch.testing.assert_close(memory_PVD[0], expected, rtol=1e-4, atol=1e-4)


def test_dealing_begins_with_the_sum_learns_through_every_matrix_and_goes_on_with_more_pieces(tmp_path):
    model = tiny_model(kind="attention")
    model.proj = dealing(pieces=2, merged_layers=0)
    ids_PVT = torch.arange(16).reshape(1, 8, 2)
    memory_PVD = model.proj(None, token_ids_PVT=ids_PVT)
    states_PVKD = model.proj.reader(ids_PVT.reshape(1, 4, 4)[..., 1:])[0]  # of four tokens three are kept
    torch.testing.assert_close(F.normalize(memory_PVD, dim=-1), F.normalize(states_PVKD.sum(dim=2), dim=-1))
    memory_PVD.pow(3).sum().backward()
    assert all(matrix.weight.grad.any() for matrix in model.proj.merge)
    for matrix in model.proj.merge:
        torch.nn.init.normal_(matrix.weight)
    model.save_pretrained(tmp_path)
    last = model.proj.merge[2].weight
    model.proj = dealing(pieces=4, merged_layers=0)
    load_projection(model, tmp_path, start=True)
    assert len(model.proj.merge) == 5
    torch.testing.assert_close(model.proj.merge[2].weight, last)
    assert torch.equal(model.proj.merge[3].weight, last)
    assert torch.equal(model.proj.merge[4].weight, last)


def text_of_pages() -> torch.Tensor:
    """Token ids [2, 8, 2] of two pages, here and there none."""
    torch.manual_seed(1)
    ids_PVT = torch.randint(0, VOCABULARY, (2, 8, 2))
    ids_PVT[torch.rand(2, 8, 2) < 0.4] = -1
    return ids_PVT


@pytest.mark.parametrize("deal_tokens", [False, True])
def test_tokens_see_each_other_before_they_become_memory(deal_tokens):
    """Those in use on their own page, by how many tokens they are apart, wherever in their pieces these begin."""
    proj = dealing(text_layers=2, merged_layers=0, deal_tokens=deal_tokens)
    ids_PVT, used_P = text_of_pages(), torch.tensor([4, 3])
    memory_PVD = proj(None, used_P, token_ids_PVT=ids_PVT)
    without = dealing(merged_layers=0, deal_tokens=deal_tokens)
    without.load_state_dict({k: v for k, v in proj.state_dict().items() if not k.startswith("text.")})
    assert not torch.allclose(without(None, used_P, token_ids_PVT=ids_PVT), memory_PVD)
    alone = proj(None, used_P[1:], token_ids_PVT=ids_PVT[1:])
    torch.testing.assert_close(alone, memory_PVD[1:])
    changed = ids_PVT.clone()
    changed[1, 6:] = 3  # not in use
    torch.testing.assert_close(proj(None, used_P, token_ids_PVT=changed)[1, :3], memory_PVD[1, :3])
    changed = ids_PVT.clone()
    changed[0, 0] = torch.tensor([7, 8])
    assert not torch.allclose(proj(None, used_P, token_ids_PVT=changed)[0, 3], memory_PVD[0, 3])
    empty = torch.full_like(ids_PVT, -1)
    assert proj(None, used_P, token_ids_PVT=empty).isfinite().all()
    memory_PVD.pow(3).sum().backward()
    assert all(p.grad.any() for layer in proj.text.layers for p in layer.parameters() if p.ndim == 2)


def test_tokens_count_their_distance_in_tokens():
    """And not in pieces: within the same piece as before or beyond an empty one, the next token is the next."""
    proj = dealing(text_layers=1, merged_layers=0, deal_tokens=False)
    for matrix in proj.merge:
        torch.nn.init.normal_(matrix.weight)
    close = torch.tensor([[[3, -1], [4, -1], [5, -1], [6, -1]]])
    spread = torch.tensor([[[3, 4], [-1, -1], [5, -1], [6, -1]]])
    exactly = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(proj(None, token_ids_PVT=close)[0, 1], proj(None, token_ids_PVT=spread)[0, 1], **exactly)
    changed = proj.text.forward
    proj.text.forward = lambda hidden, used, _: changed(hidden, used)  # places on the page
    moved = (proj(None, token_ids_PVT=close) - proj(None, token_ids_PVT=spread))[0, 1]
    assert moved.abs().max() > 1e-5


def test_further_layers_begin_with_what_is_there(tmp_path):
    model = tiny_model(kind="attention")
    model.proj = dealing(merged_layers=1)
    for matrix in model.proj.merge:
        torch.nn.init.normal_(matrix.weight)
    model.save_pretrained(tmp_path)
    ids_PVT = text_of_pages()
    before_PVD = model.proj(None, token_ids_PVT=ids_PVT)
    model.proj = dealing(text_layers=2, merged_layers=3)
    load_projection(model, tmp_path, start=True)
    memory_PVD = model.proj(None, token_ids_PVT=ids_PVT)
    torch.testing.assert_close(memory_PVD, before_PVD)
    memory_PVD.pow(3).sum().backward()
    learns = {n for n, p in model.proj.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"text.layers.1.mlp2.weight", "merged.layers.2.out.weight"} <= learns
    with pytest.raises(CheckpointError, match="missing merged.layers.1.mlp1.bias; "):
        load_projection(model, tmp_path)
    weights = load_file(tmp_path / "adapter.safetensors")
    del weights["merged.layers.0.qkv.weight"]  # a layer that is there is there as a whole
    save_file(weights, tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match="missing merged.layers.0.qkv.weight"):
        load_projection(model, tmp_path, start=True)


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


def test_layers_over_tokens_need_tokens():
    with pytest.raises(ConfigError, match="text_layers=1 needs read_tokens of 1 or more"):
        ProjectionSettings(kind="attention", text_layers=1)
    with pytest.raises(ConfigError, match="num_layers=-1: expected 0 or more"):
        ProjectionSettings(kind="attention", num_layers=-1)
    settings = ProjectionSettings(
        kind="attention", num_layers=0, pieces=2, read_tokens=2, text_layers=2, merged_layers=1
    )
    rival = rival_projection(settings, RivalRecord(kind="mean-pooling", pieces=2, tokens_per_page=3))
    assert (rival.num_layers, rival.text_layers, rival.merged_layers, rival.read_tokens) == (2, 0, 1, 0)
    assert dealing(num_layers=0).attention is None
