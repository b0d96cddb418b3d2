"""What tests of banks, tasks and rows share besides the fixtures of conftest.py."""

import numpy as np

PROSE = (
    "The geoid is the shape that the ocean surface would take under the influence of the gravity of Earth. It was "
    "described in 1828 by Gauss, who called it the mathematical figure of the Earth.\nMost maps use an ellipsoid. "
    "In Hamburg, heights were once measured from the level of the Elbe in 1899, as Friedrich wrote."
)
PAGE = {"page_width": 1600, "page_height": 384}


def memory_id(frame):
    return frame.chat_format.tokenizer.convert_tokens_to_ids(frame.chat_format.memory_token)


def documents_of(bank, units):
    return (np.searchsorted(bank.first_unit_K, units, side="right") - 1).tolist()


def text_of(bank, sample):
    """What the memory of a sample shows: the text of its units, one after the other."""
    found = zip(documents_of(bank, sample.units), sample.units, strict=True)
    return "".join(bank.documents[k].text[bank.unit_start_U[unit] : bank.unit_end_U[unit]] for k, unit in found)
