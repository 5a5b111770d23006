"""Quantizes a float ONNX graph as NNCF does it; run by `int8_speed --nncf` in an environment that has nncf."""

import sys

import nncf
import numpy as np
import openvino


def main() -> None:
    """GRAPH INPUTS OUT: an .onnx, an .npz of inputs to calibrate on, and the .xml to write."""
    graph, inputs, out = sys.argv[1:4]
    calibration = nncf.Dataset([dict(np.load(inputs))])
    quantized = nncf.quantize(
        openvino.Core().read_model(graph), calibration, model_type=nncf.ModelType.TRANSFORMER, subset_size=1
    )
    openvino.save_model(quantized, out, compress_to_fp16=False)


if __name__ == "__main__":
    main()
