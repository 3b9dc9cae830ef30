"""What a module returns: its named tensors, the answer among them, and the task that it is the answer of.

A module may return a tensor, a tuple, list, dict or dataclass, nested at will, or an output object of transformers.
`named_tensors` flattens them; `answer_of` picks what a task means by the output; `detect_task` finds the task from the
structure and the shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast, get_args

from torch import Tensor, nn

from litdeploy.batch import Batch, size_of
from litdeploy.config.spec import AnyInput, TaskName
from litdeploy.errors import NetworkError

# What transformers puts into its output objects besides the output.
_AUXILIARY = {
    *("loss", "past_key_values", "hidden_states", "attentions", "cross_attentions", "router_logits", "aux_loss"),
    *("encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions", "loss_dict"),
    *("decoder_hidden_states", "decoder_attentions", "global_attentions", "reshaped_hidden_states"),
}
_EMBEDDING = ("sentence_embedding", "text_embeds", "image_embeds", "embedding", "last_hidden_state", "pooler_output")
# The tensor that a task means among several; the first of them all if none has one of these names.
_ANSWERS: dict[str, tuple[str, ...]] = {"embedding": _EMBEDDING}
_LOGITS = ("logits",)
# Task → the place of the classes among the sizes of its output, without the batch.
_CLASS_AXES: dict[str, int] = {"classification": 0, "dense": 0, "tokens": -1}

_FORMS: dict[str, str] = {
    "classification": "logits of at least two classes (N, classes)",
    "embedding": "an embedding (N, D), or a sequence of them (N, L, D)",
    "dense": "logits of at least two classes for each pixel (N, classes, H, W)",
    "tokens": "logits for each token (N, L, vocabulary or classes), of texts of L tokens",
    "translation": "an image of the input's size, for an image and the domains that it shall have",
    "tree": "tensors whose first size is that of the batch",
}


def named_tensors(output: object, source: str = "the network") -> dict[str, Tensor]:
    """The tensors in what a module returns, by name: dictionary keys, field names, `output0`, `output1`, … for places
    in a tuple, joined by `.` if nested; `output` for a tensor alone.

    Raises:
        NetworkError: there are none.
    """
    found = dict(_flattened(output, ""))
    if not found:
        raise NetworkError(
            f"{source} returns {_described(output)}, which holds no tensor. Return a tensor, or a tuple, list, dict "
            "or dataclass of tensors."
        )
    return found


def answer_of(output: object, task: str) -> Batch:
    """The answer in what a module returns: all named tensors for the task `tree`, one tensor for every other.

    Raises:
        NetworkError: it holds no tensor.
    """
    if task == "tree":
        return named_tensors(output)
    if isinstance(output, Tensor):
        return output
    names = _ANSWERS.get(task, _LOGITS)
    for name in names:
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    found = named_tensors(output)
    return next((found[name] for name in names if name in found), next(iter(found.values())))


def class_count_of(answer: Batch, task: str) -> int:
    """Number of classes of an answer; 0 if its task has none."""
    axis = _CLASS_AXES.get(task)
    if axis is None or not isinstance(answer, Tensor):
        return 0
    return int(answer.shape[1:][axis])


def detect_task(module: nn.Module, inputs: Batch, spec: AnyInput, output: object, source: str) -> TaskName:
    """The task of a network that was run on inputs of two samples.

    A module may declare its own in an attribute `task`. An output of several tensors is a `tree`, except for an encoder
    without a head, whose last hidden state is an embedding; of one tensor, its shape and the kind of input decide.

    Raises:
        NetworkError: the output holds no tensor, or one whose first size is not that of the batch.
    """
    found = named_tensors(output, source)
    for name, tensor in found.items():
        if tensor.shape[:1] != (size_of(inputs),):
            raise NetworkError(
                f"{source}: its output '{name}' has the shape {tuple(tensor.shape)} for {size_of(inputs)} samples. The "
                "first size of each output must be the batch's."
            )
    if spec.domains:
        return spec.task
    declared = getattr(module, "task", None)
    if declared in get_args(TaskName):
        return cast(TaskName, declared)
    encodes = next(iter(found)) in _EMBEDDING or getattr(module, "num_classes", None) == 0
    if encodes and "logits" not in found and _has_form(answer_of(output, "embedding"), "embedding", inputs, spec):
        return "embedding"
    config = getattr(module, "config", None)
    regresses = getattr(config, "problem_type", None) == "regression"
    if len(found) > 1 or regresses:
        return "tree"
    answer = answer_of(output, "classification")
    fits = (task for task in _BY_SHAPE if _has_form(answer, task, inputs, spec))
    return next(fits, "tree")


_BY_SHAPE: tuple[TaskName, ...] = ("classification", "dense", "tokens")


def check_task(task: str, inputs: Batch, spec: AnyInput, output: object, source: str) -> None:
    """Check that an output can be that of a task.

    Raises:
        NetworkError: it cannot.
    """
    if _has_form(answer_of(output, task), task, inputs, spec):
        return
    fitting = [name for name in _FORMS if _has_form(answer_of(output, name), name, inputs, spec)]
    raise NetworkError(
        f"{source}: its output is {_described(output)}, and --task {task} needs {_FORMS[task]}. Leave --task out, or "
        f"give one that fits: {', '.join(fitting)}."
    )


def _has_form(answer: Batch, task: str, inputs: Batch, spec: AnyInput) -> bool:
    """Whether an answer to inputs of two samples has the structure and shape of a task's."""
    if isinstance(answer, dict):
        return task == "tree"
    sizes = tuple(answer.shape[1:])
    if not answer.is_floating_point():
        return False
    match task:
        case "classification":
            return len(sizes) == 1 and sizes[0] > 1
        case "embedding":
            return len(sizes) in (1, 2)
        case "dense":
            return len(sizes) == 3 and sizes[0] > 1 and len(spec.shape) == 3
        case "tokens":
            texts = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
            return len(sizes) == 2 and not texts.is_floating_point() and texts.shape[1:] == sizes[:1]
        case "translation":
            return spec.domains > 0 and sizes == spec.shape
    return False


def _flattened(output: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield prefix or "output", output
        return
    for name, value in _parts(output):
        if not prefix and isinstance(value, Tensor):
            yield name, value
        else:
            yield from _flattened(value, f"{prefix}.{name}" if prefix else name)


def _parts(output: object) -> list[tuple[str, Any]]:
    if isinstance(output, Mapping):
        auxiliary = _AUXILIARY if hasattr(output, "to_tuple") else set()  # a ModelOutput of transformers
        return [(str(key), value) for key, value in output.items() if key not in auxiliary]
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [(each.name, getattr(output, each.name)) for each in dataclasses.fields(output)]
    fields: Sequence[str] | None = getattr(output, "_fields", None)  # of a named tuple
    if isinstance(output, tuple | list):
        names = fields or [f"output{place}" for place in range(len(output))]
        return list(zip(names, output, strict=True))
    return []


def _described(output: object) -> str:
    """The structure of an output in a few words."""
    if isinstance(output, Tensor):
        return f"a tensor of shape ({', '.join(['N', *map(str, output.shape[1:])])})"
    found = dict(_flattened(output, ""))
    if not found:
        return f"a {type(output).__name__}"
    return "the tensors " + ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in found.items())
