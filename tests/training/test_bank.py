"""The bank: units, features, tails, and how it is built."""

import numpy as np
import pytest
import torch
from training.bank_parts import PROSE

from ocrmem.data.bank import build_bank
from ocrmem.render.renderer import Renderer


def test_units_hold_the_text_once_and_in_order(bank, documents):
    for number, document in enumerate(documents):
        units = range(bank.first_unit_K[number], bank.first_unit_K[number] + bank.num_units_K[number])
        found = "".join(document.text[bank.unit_start_U[unit] : bank.unit_end_U[unit]] for unit in units)
        assert found == document.text
        for unit in units:
            chars = bank.slot_chars_UV[unit]
            assert (np.diff(chars) >= 0).all()
            assert chars[0] == bank.unit_start_U[unit]


@torch.no_grad()
def test_features_are_the_encoders_and_joining_only_regroups_them(bank, encoders):
    whole, fine = encoders
    (page,) = Renderer(whole.page).pages(PROSE)
    pixels = torch.from_numpy(page.image_HW)[None]
    expected = fine(pixels)[0, : page.num_lines * 40].to(torch.float16)
    found = bank.features_UVE[: page.num_lines].reshape(-1, 600)
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-3)
    joined = bank.joined(4)
    assert joined.unit_tokens_U[: page.num_lines].sum() == whole.num_tokens(page)
    expected = whole(pixels)[0, : page.num_lines * 10].to(torch.float16)
    torch.testing.assert_close(joined.features_UVE[: page.num_lines].reshape(-1, 2400), expected, rtol=0, atol=4e-3)


@torch.no_grad()
def test_a_tail_is_the_line_up_to_its_cut(bank, documents, encoders):
    found = [(k, cut, before, unit) for (k, cut), (before, unit) in bank.tails.items() if unit >= 0]
    assert len(found) >= 8
    for k, cut, before, unit in found[:3]:
        first = bank.first_unit_K[k]
        assert bank.unit_end_U[unit] == cut
        assert bank.unit_start_U[unit] == bank.unit_start_U[first + before]
        page = Renderer(encoders[1].page).pages(documents[k].text[:cut], start=int(bank.unit_start_U[unit]))[0]
        expected = encoders[1](torch.from_numpy(page.image_HW)[None])[0, :40].to(torch.float16)
        torch.testing.assert_close(bank.features_UVE[unit], expected, rtol=0, atol=4e-3)


def test_a_bank_is_built_once_and_a_killed_build_is_not_read(documents, encoders, tokenizer, tmp_path, monkeypatch):
    def build():
        return build_bank(documents[:1], encoder=encoders[1], tokenizer=tokenizer, folder=tmp_path)

    monkeypatch.setattr("ocrmem.data.bank.np.savez", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build()
    assert {path.suffix for path in tmp_path.iterdir()} == {".incomplete", ".lock"}
    monkeypatch.undo()
    first = build()
    monkeypatch.setattr("ocrmem.data.bank._encode", lambda *_: pytest.fail("encoded twice"))
    assert torch.equal(build().features_UVE, first.features_UVE)


def test_a_bank_without_features_is_that_with_them_where_there_is_one(documents, encoders, tokenizer, tmp_path):
    def build(encode):
        return build_bank(documents[:1], encoder=encoders[1], tokenizer=tokenizer, folder=tmp_path, encode=encode)

    assert build(False).features_UVE.shape[-1] == 0
    encoded = build(True)
    assert torch.equal(build(False).features_UVE, encoded.features_UVE)


def test_worker_processes_build_the_same_bank(documents, encoders, tokenizer, bank, tmp_path):
    other = build_bank(documents, encoder=encoders[1], tokenizer=tokenizer, folder=tmp_path, num_workers=2)
    assert torch.equal(other.features_UVE, bank.features_UVE)
    assert np.array_equal(other.token_ids_T, bank.token_ids_T)
    assert other.tails == bank.tails


def test_a_line_that_ends_early_leaves_its_blank_on_the_page(bank):
    last = [int(bank.first_unit_K[k] + bank.num_units_K[k] - 1) for k in range(len(bank.documents))]
    short = next(unit for unit in last if bank.unit_tokens_U[unit] < bank.tokens_per_unit)
    own = int(bank.unit_tokens_U[short])
    assert bank.tokens_on([short]) == own
    assert bank.tokens_on([0, short]) == bank.tokens_per_unit + own
    assert bank.tokens_on([short, 0]) == bank.tokens_per_unit + bank.unit_tokens_U[0]
    units = [short] * (bank.units_per_page + 1)
    assert [len(page) for page in bank.pages_of(units)] == [bank.units_per_page, 1]
