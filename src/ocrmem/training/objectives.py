"""`ObjectiveTrainer`: a `MEMTrainer` on packed rows of a bank.

A step is one packed row: gather the features, project, splice, run the LLM once over all samples, cross entropy at the
labels; where samples are distilled, once more over their full text for the teacher's distribution.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainingArguments

from ocrmem.config.objectives import TASKS, Features, ObjectiveSettings
from ocrmem.data.bank import Bank
from ocrmem.errors import ConfigError
from ocrmem.model.label_loss import cross_entropy_sum
from ocrmem.model.llm import compile_layers
from ocrmem.model.mem_model import MEMModel
from ocrmem.model.projection import compile_projection
from ocrmem.training.graphs import GraphedLayers
from ocrmem.training.optimizer import MuonAdamW
from ocrmem.training.packing import PackedRows, unpacked
from ocrmem.training.trainer import MEMTrainer

FORWARD_KEYS = (
    "input_ids",
    "labels",
    "position_ids",
    "cu_seq_lens_q",
    "max_length_q",
    "placeholder_index",
    "memory_index",
    "target_index",
    "target_weights",
    "features",
    "page_num_tokens",
    "num_pages",
    "memory_targets",
    "memory_token_ids",
    "memory_letters",
    "reading",
)
"""What of a packed row `MEMModel.forward` takes."""


class FeatureSource:
    """Turns what a packed row says of its memory into features [P, V, E] on the training device.

    Args:
        bank: at its finest, one piece to a memory token.
        embedding: the LLM's input embedding, read by the rivals.
        on_device: copy the whole bank's features to the device once.
    """

    def __init__(
        self, bank: Bank, kind: Features, *, embedding: torch.nn.Module, device: torch.device, on_device: bool = False
    ) -> None:
        self.kind: Features = kind
        self.embedding, self.device = embedding, device
        self.features_UVE = bank.features_UVE
        if kind == "ocr" and on_device:
            self.features_UVE = bank.features_UVE.to(device)

    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        """features_PVE of a row; the row's `units` or `slots` say which."""
        if self.kind != "ocr":
            return text_features(batch["slots"], self.embedding, self.kind)
        units_PU = batch["units"].to(self.features_UVE.device)
        found = self.features_UVE[units_PU.clamp(min=0).flatten()].to(self.device, non_blocking=True)
        found = found.reshape(found.shape[0], found.shape[1] // batch["pieces"], found.shape[2] * batch["pieces"])
        found = found * (units_PU >= 0).flatten().to(self.device)[:, None, None]
        pages, per_page = units_PU.shape
        return found.reshape(pages, per_page * found.shape[1], found.shape[2])


@torch.no_grad()
def text_features(slots_PVT: torch.Tensor, embedding: torch.nn.Module, kind: Features) -> torch.Tensor:
    """What a trained rival's projection reads of each memory token: the embeddings of its text tokens.

    `mean-pooling` gives their mean [P, V, D]; `convolution` all of them side by side [P, V, tokens × D], so that the
    projection's first layer is a convolution whose kernel and stride are one memory token, or one piece of it where
    the projection has several. Scaled to unit RMS.
    """
    present = (slots_PVT >= 0)[..., None]
    embeds = embedding(slots_PVT.clamp(min=0).long()).float() * present
    scale = embedding.weight.float().pow(2).mean().rsqrt()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    if kind == "mean-pooling":
        return embeds.sum(dim=2) / present.sum(dim=2).clamp(min=1) * scale
    return embeds.flatten(2) * scale


@torch.no_grad()
def covered_embeddings(slots_PVT: torch.Tensor, embedding: torch.nn.Module) -> torch.Tensor:
    """Mean embedding of the text tokens under each memory token, [P, V, D]; zeros where there is none."""
    present = (slots_PVT >= 0)[..., None]
    embeds = embedding(slots_PVT.clamp(min=0).long()).float() * present
    return embeds.sum(dim=2) / present.sum(dim=2).clamp(min=1)


def distillation_loss(student_NC: torch.Tensor, teacher_NC: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) in nats, mean over the N positions (Hinton et al. 2015, temperature 1)."""
    student = F.log_softmax(student_NC.float(), dim=-1)
    teacher = F.log_softmax(teacher_NC.float(), dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def varying_share(memory_PVD: torch.Tensor, page_num_tokens_P: torch.Tensor) -> torch.Tensor:
    """Share of the memory tokens' variance that lies within pages: near 0 where all of a page looks alike."""
    used_PV1 = (torch.arange(memory_PVD.shape[1], device=memory_PVD.device) < page_num_tokens_P[:, None])[..., None]
    memory = memory_PVD.float() * used_PV1
    count_P1 = page_num_tokens_P.clamp(min=1)[:, None]
    page_mean = memory.sum(dim=1) / count_P1
    mean = memory.sum(dim=(0, 1)) / count_P1.sum()
    within = (((memory - page_mean[:, None]) * used_PV1) ** 2).sum()
    total = (((memory - mean) * used_PV1) ** 2).sum()
    return within / total.clamp(min=1e-12)


class ObjectiveTrainer(MEMTrainer):
    """Trains on `PackedRows`; checkpoints, resume and the gradient check are those of `MEMTrainer`.

    Args:
        eval_rows: packed rows of held-out text by name (`reconstruction-1`, `cloze`); each is run whole, its own loss
            and token accuracy reported, and once with the pages of other samples.
    """

    learns_to_read = True

    def __init__(
        self,
        model: MEMModel,
        args: TrainingArguments,
        *,
        rows: PackedRows,
        eval_rows: dict[str, list[dict[str, Any]]],
        settings: ObjectiveSettings,
        source: FeatureSource,
        eval_source: FeatureSource | None = None,
        optimizer: Literal["muon"] | None = None,
        gradient_check: Any = "error",
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if args.per_device_train_batch_size != 1:
            raise ConfigError(
                f"training.per_device_train_batch_size={args.per_device_train_batch_size}: with objectives a step is "
                "one packed row; leave it at 1 and set objectives.packed_length, or gradient_accumulation_steps."
            )
        super().__init__(
            model,
            args,
            train_dataset=rows,
            eval_dataset=rows if eval_rows else None,  # `evaluate` reads eval_rows
            data_collator=unpacked,
            gradient_check=gradient_check,
            callbacks=callbacks,
        )
        # A row's loss is a mean of its own; to count labels over all processes, Trainer would wait for each of them.
        self.model_accepts_loss_kwargs = False
        self.settings, self.source, self.eval_source = settings, source, eval_source or source
        self.rows, self.eval_rows = rows, eval_rows
        self._muon = optimizer == "muon"
        self._compiled = False
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._labels, self._since = 0, time.perf_counter()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """In order: a row's number says its step."""
        return SequentialSampler(train_dataset or self.train_dataset)  # pyright: ignore[reportArgumentType]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Muon where the config asks for it, else Trainer's."""
        if self._muon and self.optimizer is None:
            self.optimizer = MuonAdamW(self.model.proj, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
        return super().create_optimizer(*args, **kwargs) if not self._muon else self.optimizer  # pyright: ignore

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a row to the device, and give it its features."""
        inputs = super()._prepare_inputs(inputs)
        if "reading" in inputs:
            inputs["reading"]["features"] = self.source(inputs["reading"])
        elif "features" not in inputs:
            inputs["features"] = self.source(inputs)
        return inputs

    def check_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What `MEMModel.forward` takes of a row; where the LLM or a part of the projection does not run in it, of
        `PackedRows.checked_row`."""
        partial = inputs.get("warm_start") or inputs.get("pieces", self.rows.whole) < self.rows.whole
        inputs = self._prepare_inputs(self.rows.checked_row() if partial else dict(inputs))
        return {key: inputs[key] for key in FORWARD_KEYS if key in inputs}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Warm start: cosine distance to the covered text's mean embedding, at its weight. Else cross entropy, and the
        KL divergence from the teacher at its weight. With `projection.read_tokens`, the cross entropy of reading the
        letters too, from which alone the layers that read learn."""
        if self.settings.compile and not self._compiled:
            compile_layers(self.model.base_llm_model)
            dtype = self.model.base_llm_model.dtype
            self.model.proj.compute_dtype = None if dtype == torch.float32 else dtype
            compile_projection(self.model.proj)
            GraphedLayers(self.model.base_llm_model)
            self.model.cross_entropy = torch.compile(cross_entropy_sum, dynamic=True)
            self._compiled = True
        if inputs.get("warm_start"):
            inputs["memory_targets"] = covered_embeddings(inputs["slots"], self.model.get_input_embeddings())
            outputs = model(**{key: inputs[key] for key in FORWARD_KEYS if key in inputs})
            self._note("warm_start", outputs.loss)
            self._note_memory(inputs)
            outputs.loss = self.settings.warm_start_weight * outputs.loss
            return self._with_reading(outputs)
        self._labels += inputs["task_of_label"].numel()
        weight = inputs.get("distillation", 0.0)
        teacher_NC = teacher_logits(self.model, inputs) if weight and "teacher_input_ids" in inputs else None
        self._note_memory(inputs)
        outputs = model(**{key: inputs[key] for key in FORWARD_KEYS if key in inputs}, use_cache=False)
        loss = self._with_reading(outputs)
        self._note_tasks(outputs, inputs)
        if teacher_NC is not None:
            divergence = distillation_loss(outputs.logits[inputs["distilled_index"]], teacher_NC)
            self._note("distillation", divergence)
            loss = loss + weight * divergence
        return (loss, outputs) if return_outputs else loss

    def _with_reading(self, outputs: Any) -> torch.Tensor:
        if outputs.reading_loss is None:
            return outputs.loss
        self._note("reading", outputs.reading_loss)
        return outputs.loss + outputs.reading_loss

    @torch.no_grad()
    def _note_tasks(self, outputs: Any, inputs: dict[str, Any]) -> None:
        if self.state.global_step % max(1, int(self.args.logging_steps) // 4):
            return
        targets_N = targets_of(inputs)
        losses_N = F.cross_entropy(outputs.logits.float(), targets_N, reduction="none")
        right_N = (outputs.logits.argmax(dim=-1) == targets_N).float()
        tasks_N = inputs["task_of_label"]
        for index in tasks_N.unique().tolist():
            chosen = tasks_N == index
            self._note(f"{TASKS[index]}_loss", losses_N[chosen].mean())
            self._note(f"{TASKS[index]}_accuracy", right_N[chosen].mean())

    @torch.no_grad()
    def _note_memory(self, inputs: dict[str, Any]) -> None:
        if not self.model.training or self.state.global_step % self.settings.log_memory_steps:
            return
        features = inputs["features"] if "features" in inputs else self.source(inputs)
        counts = inputs["page_num_tokens"]
        self._note("memory_varies", varying_share(self.model.proj(features, counts), counts))
        without = ("memory_token_ids", "memory_letters", "reading")
        arguments = {key: inputs[key] for key in FORWARD_KEYS if key in inputs and key not in without}
        arguments["features"] = features.roll(1, dims=0)
        self._note("wrong_page_loss", self.model(**arguments, use_cache=False).loss)

    def _note(self, name: str, value: torch.Tensor) -> None:
        self._sums.setdefault(name, []).append(value.detach().float())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log, with the means of what was noted since the last one."""
        if "loss" in logs:
            logs = {**logs, **{name: float(torch.stack(values).mean()) for name, values in self._sums.items()}}
            now = time.perf_counter()
            logs["label_tokens_per_second"] = self._labels / (now - self._since)
            self._sums, self._labels, self._since = {}, 0, now
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Loss and token accuracy on every set of held-out rows, with the right pages and with wrong ones."""
        was_training = self.model.training
        self.model.eval()
        metrics: dict[str, float] = {}
        source, self.source = self.source, self.eval_source
        try:
            for name, rows in self.eval_rows.items():
                for suffix, roll in (("", False), ("_wrong_page", True)):
                    loss, accuracy = self._evaluate_rows(rows, roll=roll)
                    metrics[f"{metric_key_prefix}_{name}_loss{suffix}"] = loss
                    metrics[f"{metric_key_prefix}_{name}_accuracy{suffix}"] = accuracy
        finally:
            self.source = source
            self.model.train(was_training)
            self._labels, self._since = 0, time.perf_counter()
        right = [value for key, value in metrics.items() if key.endswith("_loss")]
        metrics[f"{metric_key_prefix}_loss"] = sum(right) / max(1, len(right))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_rows(self, rows: Sequence[dict[str, Any]], *, roll: bool) -> tuple[float, float]:
        total = right = count = 0.0
        for row in rows:
            inputs = self._prepare_inputs(dict(row))
            arguments = {key: inputs[key] for key in FORWARD_KEYS if key in inputs}
            if roll:
                arguments["features"] = arguments["features"].roll(1, dims=0)
            outputs = self.model(**arguments, use_cache=False)
            targets_N = targets_of(inputs)
            total += float(outputs.loss) * len(targets_N)
            right += float((outputs.logits.argmax(dim=-1) == targets_N).sum())
            count += len(targets_N)
        return (total / count, right / count) if count else (math.nan, math.nan)


def targets_of(inputs: dict[str, Any]) -> torch.Tensor:
    """int64 [N]: the labels that the rows of `MEMOutput.logits` predict."""
    return inputs["labels"].flatten()[inputs["target_index"] + 1]


@torch.no_grad()
def teacher_logits(model: MEMModel, inputs: dict[str, Any]) -> torch.Tensor:
    """Logits of the frozen LLM with the full text, at the positions of the distilled labels."""
    row = {key.removeprefix("teacher_"): value for key, value in inputs.items() if key.startswith("teacher_")}
    # Its loss goes nowhere; with weights it is the function that is compiled already.
    row["target_weights"] = torch.ones_like(row["target_index"], dtype=torch.float32)
    return model(**{key: row[key] for key in FORWARD_KEYS if key in row}, use_cache=False).logits
