"""What networks are trained and evaluated on: hub, folder, Parquet, CSV; in device memory or streamed.

DataSettings ─sources─▶ TableSource ─images, texts─▶ Store ─data─▶ three splits ─split─▶ batches
    ─augment─▶ cropped, flipped ─prepared─▶ what a network takes
A packed file holds pixels and labels: DataSettings ─sources─▶ PackedStore ─data─▶ three splits ─split─▶ batches
"""

from litdeploy.data.augment import Crops, augment, draw_crops, normalise, pixel_scale, prepared, standardise
from litdeploy.data.data import Data, check_against, open_data
from litdeploy.data.pack import Packing, pack
from litdeploy.data.split import Picked, Split, free_memory, normalised_batches, shuffled, worker_died

__all__ = [
    "Crops",
    "Data",
    "Packing",
    "Picked",
    "Split",
    "augment",
    "check_against",
    "draw_crops",
    "free_memory",
    "normalise",
    "normalised_batches",
    "open_data",
    "pack",
    "pixel_scale",
    "prepared",
    "shuffled",
    "standardise",
    "worker_died",
]
