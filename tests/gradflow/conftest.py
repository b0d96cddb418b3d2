"""What the tests of the gradient doctor share."""

import pytest
import torch
import zoo_ranks


@pytest.fixture(autouse=True)
def one_thread():
    """Keep torch from spinning up threads for 64-wide layers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def rank_results():
    """The two-process scenarios, run once: results of rank 0 and rank 1, by scenario."""
    return zoo_ranks.run_all()
