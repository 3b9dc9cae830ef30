"""What a run must remember to go on bit for bit: taken from what is under way, and put back into it.

student/NAME                weights and buffers
optimiser/I/NAME            of the I-th parameter that is trained
random/order, …             states of the random generators
cache/cuts, cache/filled    which features are kept, and of which views
rank1/…                     what another rank has otherwise: statistics of its own part of the batches, its sections
"""

from __future__ import annotations

import json
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from litdeploy.config.spec import NetworkSpec
from litdeploy.errors import BundleError, NetworkError, TrainingError
from litdeploy.networks.width import narrow
from litdeploy.trainer.checkpoints import Saved, same_bits
from litdeploy.trainer.live import Live
from litdeploy.trainer.refill import refill
from litdeploy.trainer.run import Position, Run


def due(run: Run) -> bool:
    """Whether this rank holds it time for a checkpoint; the first one's opinion is asked."""
    position = run.position
    return (
        run.checkpoints is not None
        and run.ranks.first
        and run.checkpoints.due(position.epochs_done, position.steps_done)
    )


def checkpoint(run: Run, live: Live | None) -> None:
    """Writes one, where the run has a place for them. Of several ranks, all call it; without `live` the first alone.

    Raises:
        BundleError: it cannot be written; those before stay.
        TrainingError: a weight is not a finite number.
    """
    if run.checkpoints is None:
        return
    if live is not None:
        live.watch.look()
    position, saved = run.position, take(run, live)
    if live is None:
        run.checkpoints.write(position.epochs_done, position.step, saved)
    else:
        run.ranks.on_first(run.checkpoints.write, position.epochs_done, position.step, saved)
    run.checkpoints.begin(position.epochs_done, position.steps_done)


def take(run: Run, live: Live | None) -> Saved:
    """What the run is now, between two steps. Of several ranks, all call it, and the first gets what all have.

    Args:
        live: None: all phases are over.

    Raises:
        TrainingError: a weight is not a finite number.
    """
    tensors = _tensors(run, live)
    infinite = [name for name, tensor in tensors.items() if name.startswith("student/") and not _finite(tensor)]
    if infinite if live is None else run.ranks.totals([float(bool(infinite))])[0]:
        raise TrainingError(
            f"epoch {run.position.epochs_done + 1}, step {run.position.step}: weights are no longer finite numbers "
            f"({', '.join(infinite[:3]) or 'of another rank'}). Try a lower learning rate: --learning-rate "
            f"{run.recipe.main.learning_rate / 3:.2g} --overwrite"
        )
    if live is not None and run.ranks.size > 1:
        for rank, theirs in enumerate(run.ranks.gather(tensors)):
            differing = {key: value for key, value in theirs.items() if not same_bits(value, tensors.get(key))}
            tensors |= {f"rank{rank}/{key}": value for key, value in differing.items()}
    facts: dict[str, Any] = {
        "position": {**run.position.model_dump(mode="json"), "elapsed": run.elapsed},
        "spec": run.spec.model_dump(mode="json"),
    }
    if live is not None:
        facts["learning_rates"] = [float(group["lr"]) for group in live.optimiser.param_groups]
        facts["schedule"] = live.schedule.last_epoch
    if run.cache is not None:
        run.cache.flush()
        # A pass under way will begin once more.
        under_way = live is not None and live.passes.before is not None and live.passes.teacher is not None
        facts["cache"] = {
            "views": run.cache.views,
            "passes": run.cache.passes - under_way,
            "began_empty": run.cache.began_empty,
        }
    return Saved(tensors, facts)


def views_saved(saved: Saved) -> int:
    """Views of each image whose features were kept; 0: none were."""
    return int((saved.facts.get("cache") or {}).get("views", 0))


def position_of(saved: Saved) -> Position:
    """How far the run was.

    Raises:
        BundleError: it does not say.
    """
    try:
        return Position.model_validate(saved.facts.get("position"))
    except ValidationError:
        raise _foreign("position") from None


def rebuild(run: Run) -> None:
    """Gives the student the shape that was saved, and what else phases changed up to then: the teacher, say. `put_back`
    fills it.

    Raises:
        BundleError: what was saved is not of this student.
        LitdeployError: what the run kept beside its checkpoints is not there.
    """
    assert run.saved is not None
    try:
        run.spec = NetworkSpec.model_validate_json(json.dumps(run.saved.facts.get("spec")))
        narrow(run.student, run.spec.widths)
    except ValidationError:
        raise _foreign("spec") from None
    except NetworkError as error:
        raise _foreign(str(error)) from None
    run.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for phase in run.phases[: run.position.phase + 1]:
        if phase.transition is not None:
            phase.transition.restore(run)


def put_back(run: Run, live: Live | None) -> None:
    """Makes run and phase what was saved of them, on this rank.

    Raises:
        BundleError: what was saved is not of this student.
        TrainingError: the kept features are no longer those of the run.
    """
    assert run.saved is not None
    facts, own = run.saved.facts, f"rank{run.ranks.rank}/"
    tensors = {key: value for key, value in run.saved.tensors.items() if not key.startswith("rank")}
    tensors |= {key.removeprefix(own): value for key, value in run.saved.tensors.items() if key.startswith(own)}
    try:
        _fill({f"student/{key}": value for key, value in run.student.state_dict().items()}, tensors)
        if live is None:
            run.saved = None
            return
        _put_back_optimiser(run, live, tensors, facts)
        for name, generator in (("order", run.order), ("draws", run.draws)):
            generator.set_state(tensors[f"random/{name}"])
        torch.set_rng_state(tensors["random/torch"])
        if run.device.type == "cuda" and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"], run.device)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise _foreign(str(error)) from None
    if run.cache is not None:
        _put_back_cache(run, live, tensors, facts["cache"])
    run.saved = None


def _tensors(run: Run, live: Live | None) -> dict[str, Tensor]:
    found = {f"student/{key}": value for key, value in run.student.state_dict().items()}
    if live is not None:
        for name, parameter in _trained(run, live).items():
            state = live.optimiser.state.get(parameter, {})
            found |= {f"optimiser/{key}/{name}": value for key, value in state.items() if isinstance(value, Tensor)}
        # Of the order, what the pass under way began with: its first steps are drawn again, and left out.
        before = live.passes.before
        found["random/order"] = run.order.get_state() if before is None else before[0]
        found["random/draws"] = run.draws.get_state()
        found["random/torch"] = torch.get_rng_state()
        if run.device.type == "cuda":
            found["random/cuda"] = torch.cuda.get_rng_state(run.device)
    if run.cache is not None:
        found |= {f"cache/{key}": value for key, value in run.cache.marks().items()}
    # Clones: safetensors takes no two tensors of one memory, as tied weights are.
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in found.items()}


def _trained(run: Run, live: Live) -> dict[str, Tensor]:
    """Parameters that this rank trains in this phase, by names that all ranks have in common."""
    names = {id(parameter): f"student/{name}" for name, parameter in run.student.named_parameters()}
    return {names[id(each)]: each for group in live.optimiser.param_groups for each in group["params"]}


@torch.no_grad()
def _fill(live: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    for name, tensor in live.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(f"{name}: shape {tuple(saved[name].shape)}")
        tensor.copy_(saved[name])


def _put_back_optimiser(run: Run, live: Live, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    trained = _trained(run, live)
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        buffer, _, name = rest.partition("/")
        parameter = trained.get(name)
        if kind != "optimiser" or parameter is None:  # of the first rank's own sections, say
            continue
        # In the parameter's own memory format: other strides are other instructions, which round otherwise.
        like = torch.empty_like(parameter, dtype=value.dtype) if value.shape == parameter.shape else None
        live.optimiser.state[parameter][buffer] = (
            value.to(parameter.device, copy=True) if like is None else like.copy_(value)
        )
    # All else of a schedule follows from the recipe.
    steps = int(facts["schedule"])
    live.schedule.load_state_dict({"last_epoch": steps, "_step_count": steps + 1})
    for group, rate in zip(live.optimiser.param_groups, facts["learning_rates"], strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = float(rate)


def _put_back_cache(run: Run, live: Live, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    assert run.cache is not None
    kept = run.cache.put_back(tensors["cache/cuts"], tensors["cache/filled"], facts["began_empty"])
    if not kept and not facts["began_empty"]:
        raise TrainingError(
            "the teacher's features that the run began with are no longer in --feature-cache-dir, so that it cannot be "
            "gone on from. Give the folder that it was given, or begin anew: --overwrite"
        )
    if not kept:
        run.progress.note("feature cache: the features are made again")
        refill(run, live)
    run.cache.passes = int(facts["passes"])


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _foreign(what: str) -> BundleError:
    return BundleError(
        f"the checkpoint is not one of this student ({what}). Begin anew: the same command with --overwrite"
    )
