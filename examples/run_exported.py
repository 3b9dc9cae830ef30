"""Runs an exported file; litdeploy need not be installed. Usage: run_exported.py student.onnx|student.pt2 IMAGES.npy"""

import sys

import numpy as np

if __name__ == "__main__":
    path, images = sys.argv[1], np.load(sys.argv[2])  # float32 (N, C, H, W), normalised
    if path.endswith(".onnx"):
        import onnxruntime

        [logits] = onnxruntime.InferenceSession(path).run(["logits"], {"images": images})
    else:
        import torch

        logits = torch._inductor.aoti_load_package(path)(torch.from_numpy(images)).numpy()
    print(*logits.argmax(1))
