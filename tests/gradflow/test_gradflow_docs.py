"""The page of breaks says what the programs on it really give."""

import contextlib
import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import pytest
import zoo
from zoo_parts import CASES

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = ROOT / "docs" / "make_gradient_breaks.py"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_gradient_breaks", GENERATOR)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not all(map(zoo.available, CASES.values())), reason="needs what every case of the zoo needs")
def test_the_page_is_up_to_date(generator, rank_results):
    results = generator.run_zoo()
    with contextlib.chdir(ROOT):
        page = generator.document(results, rank_results)
    assert generator.essence(generator.TARGET.read_text(encoding="utf-8")) == generator.essence(page), (
        "docs/gradient-breaks.md is out of date; run python docs/make_gradient_breaks.py"
    )


def test_the_pictures_on_the_page_are_there(generator):
    page = generator.TARGET.read_text(encoding="utf-8")
    for file in generator.PICTURES.values():
        assert f"]({file})" in page
        assert ElementTree.parse(generator.TARGET.with_name(file)).getroot().tag.endswith("svg")
