"""PP-OCRv6-small's ONNX weights, put on transformers' architecture.

The ONNX file has its batch norms folded into the convolutions, but for three in the head, which are folded here: a
batch norm is `y = (x - mean) * gamma / sqrt(var + eps) + beta`, so it scales the convolution and adds a bias. No batch
norm is left that train mode could change. Convolutions and linear layers stand in the same order in both, and every
shape is checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from torch import nn

from ocrmem.errors import CheckpointError

if TYPE_CHECKING:
    from transformers.models.pp_ocrv6_small_rec.modeling_pp_ocrv6_small_rec import (
        PPOCRV6SmallRecForTextRecognition,
    )

CHARACTERS_KEY = "character"
"""ONNX metadata entry with the characters of the classes, one a line; class 0, the CTC blank, is not in it."""


class OnnxWeights:
    """The layers of the ONNX graph in order of execution, each with its constants."""

    def __init__(self, path: Path) -> None:
        self.path = path
        model = _read(path)
        graph = model.graph
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                self._constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self._consumers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.characters: list[str] = metadata.get(CHARACTERS_KEY, "").split("\n")
        self.convolutions: list[tuple[np.ndarray, np.ndarray]] = []
        self.linears: list[tuple[np.ndarray, np.ndarray]] = []
        self.norms: list[tuple[np.ndarray, np.ndarray]] = []
        for node in graph.node:
            if node.op_type == "Conv":
                self.convolutions.append(self._convolution(node))
            elif node.op_type == "MatMul" and (weight := self._constant(node, 1)) is not None:
                self.linears.append((weight.T, self._following(node, "Add", weight.shape[1])))
            elif (
                node.op_type == "Mul"
                and (scale := self._constant(node, 1)) is not None
                and scale.ndim == 1
                and len(scale) > 1
            ):
                self.norms.append((scale, self._following(node, "Add", len(scale))))

    def _constant(self, node: Any, position: int) -> np.ndarray | None:
        return self._constants.get(node.input[position])

    def _following(self, node: Any, op_type: str, size: int) -> np.ndarray:
        """The constant of `size` values that the next node of `op_type` adds."""
        for consumer in self._consumers.get(node.output[0], []):
            if consumer.op_type == op_type:
                for name in consumer.input:
                    if name in self._constants and self._constants[name].size == size:
                        return self._constants[name].reshape(-1)
        raise CheckpointError(
            f"{str(self.path)!r}: after {node.name} an {op_type} with {size} constants was expected, as in "
            "PP-OCRv6_rec_small.onnx of rapidocr 3.10.0; give that file."
        )

    def _convolution(self, node: Any) -> tuple[np.ndarray, np.ndarray]:
        weight = self._constants[node.input[1]]
        norm = next((n for n in self._consumers.get(node.output[0], []) if n.op_type == "BatchNormalization"), None)
        if norm is None:
            return weight, self._following(node, "Add", weight.shape[0])
        gamma, beta, mean, variance = (self._constants[name].astype(np.float64) for name in norm.input[1:])
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        scale = gamma / np.sqrt(variance + epsilon)
        folded = weight.astype(np.float64) * scale[:, None, None, None]
        return folded.astype(np.float32), (beta - mean * scale).astype(np.float32)


def _read(path: Path) -> Any:
    try:
        return onnx.load(path)
    except (OSError, DecodeError, ValueError, IsADirectoryError) as error:
        raise CheckpointError(
            f"PP-OCR weights {str(path)!r} are truncated or no ONNX file ({error}); fetch them again with "
            "`ocrmem fetch pp-ocrv6-small-rec`."
        ) from error


def fold_norms(model: nn.Module) -> None:
    """Give every convolution a bias and take out the batch norms, which the ONNX weights do not have."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d) and child.bias is None:
                child.bias = nn.Parameter(child.weight.new_zeros(child.out_channels))


@torch.no_grad()
def load_onnx(model: PPOCRV6SmallRecForTextRecognition, weights: OnnxWeights) -> None:
    """Copy every layer, strictly.

    Raises:
        CheckpointError: the number of layers, or the shape of one, differs.
    """
    encoder = model.head.encoder
    norms: list[Any] = []
    linears: list[Any] = []
    block: Any
    for block in encoder.svtr_block:
        norms += [block.layer_norm1, block.layer_norm2]
        linears += [block.self_attn.qkv, block.self_attn.projection, block.mlp.fc1, block.mlp.fc2]
    layers = {
        "convolutions": ([m for m in model.modules() if isinstance(m, nn.Conv2d)], weights.convolutions),
        "layer norms": ([*norms, encoder.norm], weights.norms),
        "linear layers": ([*linears, model.head.head], weights.linears),
    }
    names = {id(module): name for name, module in model.named_modules()}
    loaded = set()
    for kind, (modules, found) in layers.items():
        if len(modules) != len(found):
            raise CheckpointError(
                f"{str(weights.path)!r} holds {len(found)} {kind}, expected {len(modules)}: it is another model than "
                "PP-OCRv6-small recognition."
            )
        for module, (weight, bias) in zip(modules, found, strict=True):
            for parameter, value in ((module.weight, weight), (module.bias, bias)):
                if tuple(parameter.shape) != value.shape:
                    raise CheckpointError(
                        f"{str(weights.path)!r}: {names[id(module)]} has shape {list(value.shape)}, expected "
                        f"{list(parameter.shape)}: it is another model than PP-OCRv6-small recognition."
                    )
                parameter.copy_(torch.from_numpy(np.array(value)))
                loaded.add(id(parameter))
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in loaded]
    if left:
        raise CheckpointError(f"{str(weights.path)!r} has no weights for {', '.join(left)}.")
