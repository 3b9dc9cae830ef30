"""Networks: built by name or recognized from weights, their sections, and shallower students of them."""

from litdeploy.networks.finding import find_sections, sections_of
from litdeploy.networks.hub import is_hub, pooling_named, published, tokenizer_folder
from litdeploy.networks.load import build, load, new, new_like
from litdeploy.networks.network import Network
from litdeploy.networks.output import answer_of
from litdeploy.networks.registry import FAMILIES, NetworkName, describe, request
from litdeploy.networks.sections import Section

__all__ = [
    "FAMILIES",
    "Network",
    "NetworkName",
    "Section",
    "answer_of",
    "build",
    "describe",
    "find_sections",
    "is_hub",
    "load",
    "new",
    "new_like",
    "pooling_named",
    "published",
    "request",
    "sections_of",
    "tokenizer_folder",
]
