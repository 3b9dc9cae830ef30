"""What networks are trained and evaluated on: hub, folder, Parquet, CSV; in device memory or streamed.

DataSettings ─sources─▶ TableSource ─images, texts─▶ Store ─data─▶ three splits ─split─▶ batches
    ─augment─▶ cropped, flipped ─prepared─▶ what a network takes
The user's own objects: Objects ─ObjectStore─▶ three splits, of tensors as the network takes them
A packed file holds pixels and labels: DataSettings ─sources─▶ PackedStore ─data─▶ three splits ─split─▶ batches
"""

from litdeploy.data.augment import Crops, augment, draw_crops, normalise, pixel_scale, prepared, standardise
from litdeploy.data.data import Data, check_against, open_data, open_objects
from litdeploy.data.objects import Objects, ObjectStore, given_objects
from litdeploy.data.pack import Packing, pack
from litdeploy.data.split import Picked, Split, free_memory, normalised_batches, shuffled, worker_died

__all__ = [
    "Crops",
    "Data",
    "ObjectStore",
    "Objects",
    "Packing",
    "Picked",
    "Split",
    "augment",
    "check_against",
    "draw_crops",
    "free_memory",
    "given_objects",
    "normalise",
    "normalised_batches",
    "open_data",
    "open_objects",
    "pack",
    "pixel_scale",
    "prepared",
    "shuffled",
    "standardise",
    "worker_died",
]
