"""Networks of transformers, named by their configuration's folder, `hf:FOLDER`, or by a name in the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from litdeploy.errors import CheckpointError, NetworkError, import_library
from litdeploy.files import is_file, is_folder
from litdeploy.storage.bundle import CONFIG

Asked = TypeVar("Asked")

_HUB = "hf:"
# Weights in a folder that transformers saved; the first that exists is used.
_PUBLISHED = ("model.safetensors", "pytorch_model.bin")
# A constant table that older versions of transformers saved with the weights.
_COUNTED = "embeddings.position_ids"


def is_hub(name: str) -> bool:
    """Whether a name is that of a transformers network."""
    return name.startswith(_HUB)


def absolute(name: str) -> str:
    """The name with an absolute folder: it is stored with the weights, which may be used from any working folder."""
    where = Path(name.removeprefix(_HUB))
    if not is_folder(where):
        return name
    if "," in str(where.resolve()):
        raise NetworkError(f"{name}: a comma in a folder's name begins an argument. Rename {where.resolve()}.")
    return f"{_HUB}{where.resolve()}"


def published(source: str | Path, network: Asked | None = None) -> tuple[Path, Asked | str | None]:
    """The weights file and the network name of a folder that transformers saved (config.json, model.safetensors);
    any other source is returned unchanged.

    Raises:
        CheckpointError: the folder has no weights file, or several.
    """
    folder = Path(source)
    if not is_folder(folder) or not is_file(folder / CONFIG) or is_file(folder / "manifest.json"):
        return folder, network
    found = [folder / name for name in _PUBLISHED if is_file(folder / name)]
    if not found:
        parts = sorted(path.name for path in folder.glob("*.index.json"))
        raise CheckpointError(
            f"{folder}: has a config.json and no {' or '.join(_PUBLISHED)}"
            + (
                f", but weights in several files ({parts[0]}). Save them in one"
                if parts
                else ". Save its weights there"
            )
            + ': model.save_pretrained(FOLDER, max_shard_size="2GB")'
        )
    return found[0], network if network is not None else f"hf:{folder}"


def hub_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the constant tables that older versions of transformers saved."""
    return {name: tensor for name, tensor in weights.items() if not name.endswith(_COUNTED)}


def hub_builder(network: str, folder: Path | None) -> Callable[..., nn.Module]:
    """A builder of the image or text classifier that a configuration describes.

    Args:
        network: `hf:` and a folder, or a model's name in the hub's cache.
        folder: the folder of the configuration, in place of the one in the name.
    """
    name = network.removeprefix(_HUB)
    transformers: Any = import_library("transformers", f"hf:{name}", "pip install transformers")

    def build(**arguments: Any) -> nn.Module:
        try:
            config = transformers.AutoConfig.from_pretrained(
                folder or name, trust_remote_code=False, local_files_only=True, **arguments
            )
        except (OSError, ValueError) as error:
            cached = (
                ""
                if Path(name).is_absolute()
                else f", or a model's name whose config.json is in the hub's cache (hf download {name} config.json)"
            )
            raise NetworkError(
                f"hf:{name}: no configuration by that name ({str(error).splitlines()[0]}). Give a local folder that "
                f"holds its config.json{cached}; nothing is downloaded. Where the folder was moved: --network hf:FOLDER"
            ) from None
        _check_config(config, name)
        for kind in (transformers.AutoModelForImageClassification, transformers.AutoModelForSequenceClassification):
            try:
                # Otherwise it would ask, at the terminal, whether to run code that the configuration names.
                module: nn.Module = kind.from_config(config, trust_remote_code=False)
            except ValueError:  # it has no classifier of this kind
                continue
            return module
        raise NetworkError(
            f"hf:{name}: transformers {transformers.__version__} has no classifier of images or of texts for its "
            f"configuration ({type(config).__name__})."
        )

    return build


def _check_config(config: Any, name: str) -> None:
    """Refuse a configuration that names kernels at the hub, which are code; nested configurations too."""
    for key, value in vars(config).items():
        if key.endswith("_implementation_internal") and isinstance(value, str) and not value.isidentifier():
            raise NetworkError(
                f"hf:{name}: its configuration asks for kernels from elsewhere ({value!r}), which are code. Take "
                f"`{key.removesuffix('_internal')}` out of its config.json."
            )
        if hasattr(value, "to_diff_dict"):  # a configuration
            _check_config(value, name)


def declared_classes(module: nn.Module) -> tuple[str, ...]:
    """Class names from a transformers module's configuration; empty if it has none but LABEL_0, LABEL_1, …"""
    names = getattr(getattr(module, "config", None), "id2label", None)
    if not isinstance(names, dict) or sorted(names, key=str) != sorted(range(len(names)), key=str):
        return ()
    found = tuple(str(names[number]) for number in range(len(names)))
    return () if len(set(found)) < len(found) or any(re.fullmatch(r"LABEL_\d+", name) for name in found) else found
