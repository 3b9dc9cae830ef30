"""Images of your own, in a folder of class folders (train/cat/1.png, test/cat/2.png). Usage: own_data.py FOLDER"""

import sys

import litdeploy
from litdeploy.trainer import train

if __name__ == "__main__":
    data = {"source": sys.argv[1], "image_size": [32, 32]}
    trained = train("resnet56", data=data, epochs=10, normalise="imagenet", out="teacher.safetensors")
    bundle = litdeploy.compress(trained.path, data=data, student_depth=20, epochs=5, out="deploy")
    litdeploy.export(bundle)
    print(litdeploy.profile(bundle).verdict)
