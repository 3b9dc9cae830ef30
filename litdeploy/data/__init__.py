"""What networks are trained and evaluated on: hub, folder, Parquet, CSV; resident in device memory or streamed.

DataSettings ─sources─▶ Source ─table─▶ Table (encoded images, labels) ─images─▶ pixels ─split─▶ batches
    ─augment─▶ cropped, flipped ─normalise─▶ what a network takes
A packed file holds labels and pixels as they are: DataSettings ─sources─▶ Packed ─split─▶ batches
"""

from litdeploy.data.augment import Crops, augment, draw_crops, normalise, pixel_scale, prepared, standardise
from litdeploy.data.check import check_against
from litdeploy.data.data import Data, open_data
from litdeploy.data.memory import free_memory
from litdeploy.data.pack import Packing, pack
from litdeploy.data.split import Picked, Split, normalised_batches, shuffled, worker_died

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
