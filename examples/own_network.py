"""A network of your own: anything with a container of like blocks. Run it as `python examples/own_network.py`."""

from torch import nn

import litdeploy


def network() -> nn.Module:
    blocks = (nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), nn.GELU()) for _ in range(12))
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.Sequential(*blocks), nn.Linear(128, 10))


if __name__ == "__main__":
    # Load your trained weights into the module first; these are new ones.
    teacher = litdeploy.load(network(), input_shape=(1, 8, 8), normalise="half")
    bundle = litdeploy.compress(teacher, student_depth=4, data="digits", epochs=2, out="own-deploy", overwrite=True)
    litdeploy.export(bundle, network=network)
    print(litdeploy.profile(bundle, network=network, target="demo").verdict)
