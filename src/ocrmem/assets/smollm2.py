"""The SmolLM2 asset: from a GGUF file to a Hugging Face folder, once.

`from_pretrained(gguf_file=…)` takes about 20 s every time; the folder loads in about one.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CONTROL = 3
"""GGUF's token type of special tokens (`gguf.TokenType.CONTROL`)."""
PAD_ID = 0
"""`<|endoftext|>`. The GGUF file pads with `<|im_end|>`, which also ends every turn, so that masking pads
would unlearn stopping. `<|endoftext|>` occurs in no chat."""


def prepare(source: Path, folder: Path) -> None:
    """Write config, float32 safetensors, generation config, tokenizer and chat template of the GGUF file.

    Raises:
        OSError: a file could not be written.
    """
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, GenerationConfig

    fields = {name: field.contents() for name, field in GGUFReader(source).fields.items()}
    build_tokenizer(fields).save_pretrained(folder)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars have no other switch
        llm = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="float32")
    _save_weights(llm, folder / "model.safetensors")
    ids = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": PAD_ID,
    }
    _save_config(llm, folder, ids)
    GenerationConfig(**ids).save_pretrained(folder)


def build_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file describes.

    Built here, since transformers' own GGUF reader goes wrong on this file: 5.17 takes `<|im_start|>` for the
    end of a turn and turns `▁` into a space, and both 5.17 and 5.23 leave out the cut into single digits that
    `tokenizer.ggml.pre` = `smollm` stands for, so that the spaces before a number come out otherwise than in
    training.

    Args:
        fields: the file's metadata by name.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = ByteLevelDecoder()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token, kind in kinds if kind == CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[PAD_ID],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _save_weights(llm: PreTrainedModel, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = {key: tensor.contiguous() for key, tensor in llm.state_dict().items()}
    if llm.config.tie_word_embeddings:
        del state["lm_head.weight"]  # the embedding matrix again; safetensors refuses shared memory
    try:
        save_file(state, path, {"format": "pt"})
    except SafetensorError as error:  # what a full disk comes as
        raise OSError(str(error)) from error
    path.chmod(0o644)  # safetensors makes it readable by its owner alone; a cache may be shared


def _save_config(llm: PreTrainedModel, folder: Path, ids: Mapping[str, int]) -> None:
    # Rebuilt rather than edited: the loaded config also says to read the weights from the GGUF file.
    dropped = {"quantization_config", "_name_or_path", "_model_name_or_path", "unk_token_id"}
    values = {key: value for key, value in llm.config.to_dict().items() if key not in dropped}
    values |= {**ids, "architectures": [type(llm).__name__]}
    type(llm.config)(**values).save_pretrained(folder)
