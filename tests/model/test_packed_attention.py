"""What attention over packed rows refuses: LLMs for which its kernels would give something else."""

import pytest
import torch

from ocrmem.errors import ConfigError
from ocrmem.model import packed_attention as packed_attention_module
from ocrmem.model.packed_attention import PACKED, check_plain, has_kernel, packed_attention, unused_mask


def test_plain_attention_is_not_refused():
    check_plain(2048, {})
    check_plain(2048, {"sliding_window": None, "softcap": None, "s_aux": None, "position_ids": None})
    check_plain(2048, {"sliding_window": 2048})


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"sliding_window": 2047}, "a sliding window of 2047 positions, which the kernels"),
        ({"softcap": 50.0}, "capped logits"),
        ({"s_aux": torch.zeros(4), "sliding_window": 128}, "a sliding window of 128 positions and attention sinks"),
    ],
)
def test_other_attention_is_refused(wanted, message):
    with pytest.raises(ConfigError, match=message):
        check_plain(2048, wanted)


def test_where_a_kernel_keeps_samples_apart(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(packed_attention_module, "varlen_attn", lambda: None)
    assert has_kernel(PACKED, gpu)
    assert not has_kernel(PACKED, cpu)
    assert not has_kernel("sdpa", gpu)
    monkeypatch.setattr(packed_attention_module, "varlen_attn", None)  # torch before 2.10: a mask has to do it
    assert not has_kernel(PACKED, gpu)


def test_an_llm_that_does_not_pass_the_edges_on_is_refused():
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups, module.training = True, 1, False
    states = torch.randn(1, 2, 6, 8)
    with pytest.raises(ConfigError, match="do not pass on where the samples of a packed row begin"):
        packed_attention(module, states, states, states, unused_mask(states.device))
    out, _ = packed_attention(module, states, states, states, None)  # as in `generate`
    assert out.shape == (1, 6, 2, 8)
