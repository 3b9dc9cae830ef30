"""Networks of transformers, named by their folder, `hf:FOLDER`, or by a name in the hub's cache.

The configuration (config.json) decides the class; a sentence embedder's pooling is added to its encoder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from litdeploy.config.spec import AnyInput, InputSpec, TensorInput, TokenInput
from litdeploy.errors import CheckpointError, NetworkError, first_line, import_library
from litdeploy.files import is_file, is_folder, parse_json, read_small, write_text
from litdeploy.networks.embedder import EMBEDDING, MODULES, Embedding, SentenceEmbedder, encoder_folder, read_embedding
from litdeploy.networks.families.family import Arguments
from litdeploy.storage.bundle import CONFIG
from litdeploy.storage.checkpoint import SUFFIXES, load_weights

Asked = TypeVar("Asked")

_HUB = "hf:"
# Weights in a folder that transformers saved; the first that exists is used.
_PUBLISHED = ("model.safetensors", "pytorch_model.bin")
# Files that transformers and sentence-transformers read in addition to the configuration and the tokenizer.
_BESIDE = ("preprocessor_config.json", "generation_config.json", "config_sentence_transformers.json")
_PREPROCESSOR = _BESIDE[0]
# Class that builds → transformers' table of its classes by model type. In the order in which they are tried for a
# configuration that states no class.
_CLASSES = {
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSemanticSegmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
}
# A second of audio at 16 kHz; no configuration states a length, and --input-shape another one.
_SAMPLES = 16_000
_CLASSIFIERS = tuple(_CLASSES)[:2]
_ENCODER = "AutoModel"


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


def hub_folder(name: str) -> Path | None:
    """The folder that a name stands for, here or in the hub's cache; None if there is none."""
    where = Path(name.removeprefix(_HUB))
    return where if is_folder(where) else _cached(str(where))


def tokenizer_folder(name: str) -> str:
    """The folder of a network's tokenizer, for its name; the name itself if there is no folder."""
    folder = hub_folder(name)
    return name.removeprefix(_HUB) if folder is None else str(encoder_folder(folder))


def published(source: str | Path, network: Asked | None = None) -> tuple[Path, Asked | str | None]:
    """The weights file and the network name of a folder that transformers or sentence-transformers saved, or of a
    model's name in the hub's cache; any other source is returned unchanged.

    Raises:
        CheckpointError: the folder has no weights file, or several; or it is a pipeline of several networks; or the
            cache has no such model.
    """
    folder = Path(source)
    if (
        not (is_file(folder) or is_folder(folder))
        and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source))
        and folder.suffix not in SUFFIXES
    ):
        cached = _cached(str(source))
        if cached is None:
            raise CheckpointError(
                f"{source}: no such file or folder, and no model of that name in the hub's cache. Nothing is "
                f"downloaded here: hf download {source}"
            )
        folder = cached
    if is_file(folder / "model_index.json"):
        raise CheckpointError(
            f"{folder}: holds a pipeline of several networks (model_index.json, as diffusers saves them). litdeploy "
            "takes one network: a folder that transformers or sentence-transformers saved."
        )
    described = is_file(folder / CONFIG) or is_file(folder / MODULES)
    if not is_folder(folder) or not described or is_file(folder / "manifest.json"):
        return folder, network
    place = encoder_folder(folder)
    found = [place / name for name in _PUBLISHED if is_file(place / name)]
    if not found:
        parts = sorted(path.name for path in place.glob("*.index.json"))
        raise CheckpointError(
            f"{place}: has a config.json and no {' or '.join(_PUBLISHED)}"
            + (
                f", but weights in several files ({parts[0]}). Save them in one"
                if parts
                else ". Save its weights there"
            )
            + ': model.save_pretrained(FOLDER, max_shard_size="2GB")'
        )
    return found[0], network if network is not None else f"hf:{folder}"


def pooling_named(network: Any, pooling: str | None) -> Any:
    """A network's name with a pooling among its arguments; unchanged if there is none.

    Raises:
        NetworkError: the network is not of transformers.
    """
    if pooling is None:
        return network
    if not isinstance(network, str) or not is_hub(network):
        raise NetworkError(
            f"--pooling {pooling} is for text encoders of transformers, and this is "
            f"{network if isinstance(network, str) else 'another network'}. Leave it out."
        )
    return f"{network},pooling={pooling}"


def _cached(name: str) -> Path | None:
    """The folder of a model in the hub's cache; None if it is not there or transformers is not installed."""
    try:
        look_up: Any = import_module("huggingface_hub").try_to_load_from_cache
        found = [look_up(name, file) for file in (CONFIG, MODULES)]
    except (ImportError, ValueError):  # not installed; not a name that a model can have
        return None
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def hub_builder(network: str, folder: Path | None) -> Callable[..., nn.Module]:
    """A builder of the network that a configuration describes.

    Args:
        network: `hf:` and a folder, or a model's name in the hub's cache.
        folder: the folder of the configuration, in place of the one in the name.
    """
    name = network.removeprefix(_HUB)
    transformers: Any = import_library("transformers", f"hf:{name}", "pip install transformers")

    def build(*, pooling: str | None = None, **arguments: Any) -> nn.Module:
        place = folder or hub_folder(name)
        embedding = None if place is None else read_embedding(place)
        config = _read_config(transformers, name, place and encoder_folder(place), arguments)
        if pooling is not None or embedding is not None:
            embedding = (embedding or Embedding()).with_pooling(pooling, network)
        kind = _class_of(config, name, embedding is not None, "num_labels" in arguments)
        # A cache of keys and values is for generation.
        config.get_text_config().use_cache = False
        # The pooler's output is not used; without it a file may or may not have its weights.
        bare = {"add_pooling_layer": False} if kind == _ENCODER and _takes_tokens(config) else {}
        module = _built(getattr(transformers, kind), config, bare)
        if kind == _ENCODER and getattr(module, "main_input_name", "") == "input_ids":
            takes = hub_input(module)
            if not isinstance(takes, TokenInput):
                raise NetworkError(
                    f"hf:{name}: {type(module).__name__} does not state how long a text may be "
                    "(max_position_embeddings in its config.json)."
                )
            return SentenceEmbedder(module, embedding or Embedding(), takes)
        images = None if place is None else _preprocessed(module, place)
        if images is not None:
            module.input_spec = images  # type: ignore[assignment]
        return module

    return build


def _read_config(transformers: Any, name: str, place: Path | None, arguments: Mapping[str, Any]) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(
            place or name, trust_remote_code=False, local_files_only=True, **arguments
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
    return config


def _class_of(config: Any, name: str, embeds: bool, labels: bool) -> str:
    """The class that builds a configuration's network: the one that `architectures` states, unless the caller asks for
    an embedder (by a pooling) or for a classifier (by a number of labels).

    Raises:
        NetworkError: its class is none of those that litdeploy takes.
    """
    tables = import_module("transformers.models.auto.modeling_auto")
    names = {auto: getattr(tables, table).get(config.model_type) for auto, table in _CLASSES.items()}
    known = {auto: (of,) if isinstance(of, str) else tuple(of) for auto, of in names.items() if of is not None}
    stated = tuple(getattr(config, "architectures", None) or ())
    kind = next((auto for auto, of in known.items() if set(of) & set(stated)), None)
    if kind is None and stated and all(each.endswith(("Model", "ForPreTraining")) for each in stated):
        kind = _ENCODER
    if embeds:
        kind = _ENCODER
    elif labels and (kind is None or not kind.endswith(("Classification", "Segmentation"))):
        kind = next((auto for auto in _CLASSIFIERS if auto in known), kind)
    elif not stated:
        kind = next((auto for auto in (*_CLASSIFIERS, _ENCODER) if auto in known), None)
    decoder = bool(getattr(config, "is_encoder_decoder", False))
    if kind not in known or (decoder and not kind.endswith("Classification")):
        found = ", ".join(stated) or type(config).__name__
        raise NetworkError(
            f"hf:{name}: its configuration is of {found}"
            + (" (an encoder with a decoder)" if decoder else "")
            + ", which litdeploy does not take. It takes classifiers of texts, tokens, images and audio, semantic "
            "segmentation, causal and masked language models, and encoders, which `architectures` in config.json names."
        )
    return str(kind)


def _takes_tokens(config: Any) -> bool:
    return isinstance(getattr(config, "vocab_size", None), int)


def _built(kind: Any, config: Any, arguments: dict[str, bool]) -> nn.Module:
    """Build the module in float32, as weights are read."""
    try:
        # `trust_remote_code`: else it would ask, at the terminal, whether to run code that the configuration names.
        module: nn.Module = kind.from_config(config, trust_remote_code=False, dtype=torch.float32, **arguments)
    except TypeError:
        if not arguments:
            raise
        return _built(kind, config, {})  # the class has no pooler
    return module


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


def transformer_of(module: nn.Module) -> Any:
    """The transformers module in a network: that of a sentence embedder, or the network itself."""
    return module.transformer if isinstance(module, SentenceEmbedder) else module


def class_arguments(module: nn.Module) -> dict[str, bool]:
    """What the class of a transformers module takes, besides the configuration, to build one without a pooler."""
    optional = "add_pooling_layer" in signature(type(module)).parameters
    return {"add_pooling_layer": False} if optional and getattr(module, "pooler", None) is None else {}


def fill(module: nn.Module, weights: Mapping[str, Tensor], source: str, network: str) -> nn.Module:
    """The module with weights as transformers saved them, whose names may lack or have the base's prefix (`bert.`), be
    those of older versions, or belong to a head that the module does not have.

    Raises:
        CheckpointError: weights are missing, or have other shapes.
    """
    inner = transformer_of(module)
    own = inner.state_dict()
    if own.keys() == weights.keys():
        load_weights(inner, weights, source, network)
        return module
    with quiet():
        try:
            filled, info = type(inner).from_pretrained(
                None,
                config=inner.config,
                state_dict=dict(weights),
                output_loading_info=True,
                dtype=torch.float32,
                **class_arguments(inner),
            )
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{source}: these are not the weights of {network} ({first_line(error)}).") from None
    lacking = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if lacking:  # by the names of the module, it says what is missing
        found = {key: value for key, value in filled.state_dict().items() if key not in lacking}
        load_weights(inner, found, source, network)
    if inner is module:
        if hasattr(module, "input_spec"):
            filled.input_spec = module.input_spec
        module = filled
    else:
        module.transformer = filled
    return module


def as_classifier(arguments: Arguments, module: nn.Module) -> Arguments | None:
    """The arguments by which the same configuration makes a classifier, as it always did for older bundles; None if the
    module is one already."""
    config = transformer_of(module).config
    if "num_labels" in arguments or type(transformer_of(module)).__name__.endswith(("Classification", "Segmentation")):
        return None
    return {**arguments, "num_labels": config.num_labels}


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back transformers' progress bars, and its report of weights that were not used."""
    log: Any = import_module("transformers.utils.logging")
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def hub_input(module: nn.Module) -> AnyInput | None:
    """The input of a transformers module, by its configuration; None if it does not state it."""
    config = getattr(module, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if isinstance(size, int) and isinstance(channels, int):
        return InputSpec(shape=(channels, size, size), mean=(0.5,) * channels, std=(0.5,) * channels)
    if getattr(module, "main_input_name", "") == "input_values":
        return TensorInput.of((_SAMPLES,), "input_values")
    vocabulary, positions = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    if isinstance(vocabulary, int) and isinstance(positions, int):
        length = positions - _reserved_positions(module)
        return TokenInput(length=length, vocabulary=vocabulary, pad=_pad_of(config, vocabulary))
    return None


def _pad_of(config: Any, vocabulary: int) -> int:
    """The id after a text's end: the padding's, or else that of the end, as for GPT-2, which has no other."""
    ends = getattr(config, "eos_token_id", None)
    for pad in (getattr(config, "pad_token_id", None), ends[0] if isinstance(ends, list) and ends else ends):
        if isinstance(pad, int) and 0 <= pad < vocabulary:
            return pad
    return 0


def _reserved_positions(module: nn.Module) -> int:
    """Rows of the position table that no token uses: RoBERTa's kin count from the row after the padding's."""
    tables = [
        child
        for name, child in module.named_modules()
        if name.endswith("position_embeddings") and isinstance(child, nn.Embedding)
    ]
    return max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)


def _preprocessed(module: nn.Module, folder: Path) -> InputSpec | None:
    """The images that preprocessor_config.json states: their size, if the configuration states none, and their
    normalization; None if it states no images."""
    path, takes = folder / _PREPROCESSOR, hub_input(module)
    if not is_file(path) or getattr(module, "main_input_name", "") != "pixel_values":
        return None
    try:
        stated = parse_json(read_small(path))
        mean, std = tuple(stated["image_mean"]), tuple(stated["image_std"])
        shape = takes.shape if isinstance(takes, InputSpec) else (len(mean), *_size(stated))
        return InputSpec(shape=shape, mean=mean, std=std)
    except (OSError, ValueError, TypeError, KeyError):  # as without the file; `inspect` shows the normalization
        return None


def _size(stated: dict[str, Any]) -> tuple[int, int]:
    """Height and width, of the crop if there is one."""
    size = stated["crop_size"] if stated.get("do_center_crop") else stated["size"]
    if isinstance(size, int):
        return size, size
    edge = size.get("shortest_edge")
    return (edge, edge) if edge is not None else (size["height"], size["width"])


def declared_classes(module: nn.Module) -> tuple[str, ...]:
    """Class names from a transformers classifier's configuration; empty if it has none but LABEL_0, LABEL_1, …"""
    names = getattr(getattr(module, "config", None), "id2label", None)
    if not type(module).__name__.endswith(("Classification", "Segmentation")):
        return ()  # an encoder's configuration may have those of a classifier that it was
    if not isinstance(names, dict) or sorted(names, key=str) != sorted(range(len(names)), key=str):
        return ()
    found = tuple(str(names[number]) for number in range(len(names)))
    return () if len(set(found)) < len(found) or any(re.fullmatch(r"LABEL_\d+", name) for name in found) else found


def write_configuration(module: nn.Module, name: str, folder: Path) -> None:
    """Write what rebuilds a transformers network without its folder: its configuration, a sentence embedder's
    settings, and the files that transformers reads in addition.

    Args:
        name: of the network; its folder is read if it is still there.
        folder: exists.
    """
    transformer_of(module).config.save_pretrained(folder)
    if isinstance(module, SentenceEmbedder):
        write_text(folder / EMBEDDING, json.dumps(module.embedding.model_dump(), indent=2) + "\n")
    place = hub_folder(name)
    if place is None:
        return
    for file in _BESIDE:
        found = [each / file for each in (place, encoder_folder(place)) if is_file(each / file)]
        if found:
            shutil.copyfile(found[0], folder / file)
