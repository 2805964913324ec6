"""Ordinary checkpoints of optimized transformers models, which plain transformers loads.

What passes removed is said in the configuration: fewer layers, narrower feed-forwards, fewer heads. The fields are found by
trying: a field is changed in proportion to a size, and kept if the model that transformers builds from it fits better. Layers
of different widths are padded with zeros to the widest.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lissom.artifacts.directory import check_new, write_directory
from lissom.artifacts.model_files import Saveable, write_processors
from lissom.artifacts.pruned_tokenizer import renumbered_config
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.verify.divergence import relative_error, tolerance_of
from lissom.errors import UnsupportedError
from lissom.frontends.capture.kv_cache import is_kv_cache_object, without_kv_cache

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Shapes = dict[str, tuple[int, ...]]
_LAYER = re.compile(r"\.(\d+)\.")
_WIDTH = "intermediate_size"
"""The field of a configuration with the width of the feed-forward."""
_ADVICE = "CompiledModel.save writes it with its program, for lissom.load"


def save_checkpoint(
    program: Program,
    model: PreTrainedModel,
    example: Sample,
    directory: Path,
    tokenizer: Saveable | None = None,
    processor: Saveable | None = None,
) -> None:
    """Write the program's weights as a checkpoint of the model's class, after comparing the loaded checkpoint with the program.

    The directory is written completely or not at all. An existing one is not replaced: its weights in other files than the
    checkpoint's would stay, and transformers may read those.

    Args:
        program: captured from the model and not lowered.
        example: flat inputs for the comparison.

    Raises:
        UnsupportedError: if the configuration cannot say what was removed, or the checkpoint computes something else.
        ArtifactError: if the directory exists, or cannot be written.
    """
    check_new(directory)
    made = plain_model(program.weights(), program, model).model

    def write(folder: Path) -> None:
        made.save_pretrained(folder)
        _confirm(program, model, example, folder)
        write_processors(folder, str(model.config._name_or_path) or None, tokenizer, processor)

    write_directory(directory, write)


@dataclass(frozen=True)
class PlainModel:
    """A model of transformers with the weights of a program.

    Attributes:
        names: the model's name for each weight of the original model that stays.
        padded: the former and the new width of the feed-forward; None where it is as it was.
    """

    model: Any
    names: Mapping[str, str]
    padded: tuple[int, int] | None = None


def plain_model(weights: Mapping[str, torch.Tensor], program: Program, model: PreTrainedModel, multiple: int = 1) -> PlainModel:
    """A model of the same class with these weights, and a configuration that says what was removed.

    Args:
        weights: of the program, by the original model's names; others are ignored.
        multiple: the width of the feed-forward is padded with zeros to a multiple of it.

    Raises:
        UnsupportedError: if no configuration of this class has the shapes of the weights.
    """
    names, config = kept_layers(weights, model)
    config = renumbered_config(config, program)
    kept = {names[name]: weight.detach() for name, weight in weights.items() if name in names}
    exact = _fit(model, config, {name: tuple(weight.shape) for name, weight in kept.items()})
    fitted = _widened(model, exact, multiple)
    state = _state(model, fitted, kept, {new: old for old, new in names.items()})
    made: Any = type(model)(copy.deepcopy(fitted.config))
    made.load_state_dict(state, assign=True, strict=False)
    made.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(renumbered_config(model.generation_config, program))
    widths = (int(getattr(exact.config, _WIDTH)), int(getattr(fitted.config, _WIDTH))) if fitted is not exact else None
    return PlainModel(made, names, widths)


def kept_layers(used: Collection[str], model: PreTrainedModel) -> tuple[dict[str, str], PretrainedConfig]:
    """The name in the checkpoint for every weight of the model that stays, and the configuration with fewer layers.

    Args:
        used: the names of the weights that the program uses. A layer is gone if it uses none of the layer's.

    Raises:
        UnsupportedError: if the configuration has no field for the number of layers.
    """
    config, used = copy.deepcopy(model.config), set(used)
    names = {name: name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    for path, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        inner = [[name for name in names if name.startswith(f"{path}.{index}.")] for index in range(len(layers))]
        kept = [index for index, layer_names in enumerate(inner) if not layer_names or used & set(layer_names)]
        if len(kept) == len(layers) or not kept:
            continue
        _shorten(model, config, path, len(layers), kept)
        places = {index: place for place, index in enumerate(kept)}
        for index, layer_names in enumerate(inner):
            for name in layer_names:
                if index in places:
                    names[name] = f"{path}.{places[index]}.{name.removeprefix(f'{path}.{index}.')}"
                else:
                    del names[name]
    return names, config


def _shorten(model: PreTrainedModel, config: PretrainedConfig, path: str, count: int, kept: list[int]) -> None:
    """Set the field of the configuration that makes this list of layers shorter. Raises UnsupportedError."""
    for field, value in list(config.to_dict().items()):
        if value != count or isinstance(value, bool):
            continue
        trial = copy.deepcopy(config)
        # Fields with one entry for each layer, such as its kind of attention.
        for other, items in trial.to_dict().items():
            if isinstance(items, list) and len(items) == count:
                setattr(trial, other, [items[index] for index in kept])
        setattr(trial, field, len(kept))
        built = _built(model, trial)
        if built is not None and len(built.get_submodule(path)._modules) == len(kept):
            config.__dict__.update(trial.__dict__)
            return
    raise UnsupportedError(
        f"{type(model).__name__} has no field in its configuration for {len(kept)} of {count} layers in '{path}', so no "
        f"ordinary checkpoint holds it; {_ADVICE}"
    )


@dataclass(frozen=True)
class _Fitted:
    """A configuration, and the shapes of the weights of the model that transformers builds from it."""

    config: PretrainedConfig
    shapes: Shapes


def _fit(model: PreTrainedModel, config: PretrainedConfig, wanted: Shapes) -> _Fitted:
    """The configuration whose model has weights of these shapes; those of different layers are padded to one width.

    Raises:
        UnsupportedError: naming the first weight that no field explains, and what would be needed.
    """
    shapes = _shapes(model, config)
    if shapes is None:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be made from its configuration alone, so no ordinary checkpoint holds it; {_ADVICE}"
        )
    target = _widest(wanted, shapes)
    while wrong := _wrong(shapes, target):
        better = _improved(model, config, shapes, target)
        if better is None:
            name, dim = wrong[0]
            raise UnsupportedError(
                f"the configuration of {type(model).__name__} cannot say that '{name}' is {list(wanted.get(name, ()))}: none "
                f"of its fields changes the size {shapes[name][dim]} in dimension {dim} alone; an ordinary checkpoint would "
                f"need such a field (a head size of its own, for heads); {_ADVICE}"
            )
        config, shapes = better
    return _Fitted(config, shapes)


def _widened(model: PreTrainedModel, fitted: _Fitted, multiple: int) -> _Fitted:
    """The configuration with a feed-forward whose width is a multiple; the same where it has no field for it."""
    width = getattr(fitted.config, _WIDTH, None)
    if not isinstance(width, int) or width % multiple == 0:
        return fitted
    config = copy.deepcopy(fitted.config)
    setattr(config, _WIDTH, -(-width // multiple) * multiple)
    shapes = _shapes(model, config)
    return fitted if shapes is None or shapes.keys() != fitted.shapes.keys() else _Fitted(config, shapes)


def _widest(wanted: Shapes, known: Shapes) -> Shapes:
    """The shapes with every size the largest of the same weight in all layers, where these were equal before.

    Args:
        known: the shapes that the configuration gives.
    """
    kinds = {name: (_LAYER.sub(".*.", name), known.get(name)) for name in wanted}
    groups: dict[object, list[tuple[int, ...]]] = defaultdict(list)
    for name, shape in wanted.items():
        groups[kinds[name]].append(shape)
    largest = {kind: tuple(map(max, zip(*shapes, strict=True))) for kind, shapes in groups.items()}
    return {name: largest[kinds[name]] for name in wanted}


def _wrong(shapes: Shapes, target: Shapes) -> list[tuple[str, int]]:
    """The weights and dimensions whose sizes differ."""
    both = ((name, shape, target[name]) for name, shape in shapes.items() if name in target)
    return [(name, dim) for name, one, two in both for dim, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]


def _improved(
    model: PreTrainedModel, config: PretrainedConfig, shapes: Shapes, target: Shapes
) -> tuple[PretrainedConfig, Shapes] | None:
    """The configuration with one field changed so that fewer sizes are wrong; None if no field helps."""
    wrong = _wrong(shapes, target)
    ratios = dict.fromkeys((shapes[name][dim], target[name][dim]) for name, dim in wrong)
    fields = [name for name, value in config.to_dict().items() if type(value) is int and value > 1]
    # The numbers of heads before the sizes of heads, which have the same effect on the shapes of projections.
    for field in sorted(fields, key=lambda name: ("head" not in name or "dim" in name, "dim" in name or "hidden_size" in name)):
        value = getattr(config, field)
        for now, then in ratios:
            if value * then % now:
                continue
            trial = copy.deepcopy(config)
            setattr(trial, field, value * then // now)
            trial_shapes = _shapes(model, trial)
            # A field that takes weights away, such as the number of layers, explains no size.
            if (
                trial_shapes is not None
                and trial_shapes.keys() == shapes.keys()
                and len(_wrong(trial_shapes, target)) < len(wrong)
            ):
                return trial, trial_shapes
    return None


def _shapes(model: PreTrainedModel, config: PretrainedConfig) -> Shapes | None:
    built = _built(model, config)
    if built is None:
        return None
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


def _built(model: PreTrainedModel, config: PretrainedConfig) -> nn.Module | None:
    """A model of the configuration without values; None if transformers refuses the configuration."""
    with torch.device("meta"):
        try:
            return type(model)(copy.deepcopy(config))
        # Models check their configurations in their own ways.
        except Exception:
            return None


def _state(
    model: PreTrainedModel, fitted: _Fitted, weights: Mapping[str, torch.Tensor], old: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """The checkpoint's weights: those of the program, padded; those it does not use from the model.

    Args:
        old: the model's name of each weight.
    """
    original, state = model.state_dict(), dict[str, torch.Tensor]()
    # The program has one name for weights that are tied.
    tied = {original[old[name]].data_ptr(): weight for name, weight in weights.items() if old.get(name) in original}
    for name, shape in fitted.shapes.items():
        weight = weights.get(name)
        if weight is None and old.get(name) in original:
            own = original[old[name]].detach()
            weight = tied.get(own.data_ptr(), own)
        if weight is None or any(size > room for size, room in zip(weight.shape, shape, strict=True)):
            raise UnsupportedError(
                f"the program of {type(model).__name__} has no weight for '{name}', {list(shape)}, which its checkpoint has; "
                f"{_ADVICE}"
            )
        if weight.shape != shape:
            padded = weight.new_zeros(shape)
            padded[tuple(slice(size) for size in weight.shape)] = weight
            weight = padded
        state[name] = weight.clone()
    return state


def _confirm(program: Program, model: PreTrainedModel, example: Sample, folder: Path) -> None:
    """Load the checkpoint in plain transformers and compare it with the program. Raises UnsupportedError."""
    loaded = type(model).from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval()
    error = error_of(loaded, program, example)
    if not error <= tolerance_of(program):
        raise UnsupportedError(
            f"an ordinary checkpoint of {type(model).__name__} cannot hold this program: loaded by transformers, it differs by "
            f"{error:.2g} relative, allowed {tolerance_of(program):.2g}; quantizers, low-rank factors and changed operators "
            f"are no weights of the model; {_ADVICE}"
        )


def error_of(model: nn.Module, program: Program, example: Sample) -> float:
    """The largest relative error of a model's outputs, without a KV cache, to the program's on the same inputs.

    Args:
        model: on the CPU. Infinite if the outputs differ in number or shape, or are no tensors.
    """
    args, kwargs = program.signature.arguments([tensor.cpu() for tensor in example])
    with torch.no_grad(), without_kv_cache(model):
        wanted = [leaf for leaf in program.run(example) if isinstance(leaf, torch.Tensor)]
        given = pytree.tree_leaves(model(*args, **kwargs), is_leaf=is_kv_cache_object)
    outputs = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
    if not wanted or [leaf.shape for leaf in outputs] != [leaf.shape for leaf in wanted]:
        return float("inf")
    return max(relative_error(two.cpu(), one) for one, two in zip(outputs, wanted, strict=True))
