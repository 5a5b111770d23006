"""Asks a Triton server for many pictures at once, over HTTP and gRPC; runs where `tritonclient` is, apart from ours.

python triton_client.py HTTP_PORT GRPC_PORT JOBS.json PICTURES.npz writes the pictures that came, and prints the errors.
"""

import json
import queue
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc
import tritonclient.http

MODEL = "pictures"


def inputs(module, job):
    """The inputs of a request, as one of the two clients takes them."""
    arrays = {
        "prompt": np.array([[job["prompt"].encode()]], np.object_),
        "seed": np.array([[job["seed"]]], np.uint64),
    }
    if "negative_prompt" in job:
        arrays["negative_prompt"] = np.array([[job["negative_prompt"].encode()]], np.object_)
    if "height" in job:
        arrays["height"] = np.array([[job["height"]]], np.int32)
    types = {"O": "BYTES", "u": "UINT64", "i": "INT32"}
    given = []
    for name, array in arrays.items():
        given.append(module.InferInput(name, list(array.shape), types[array.dtype.kind]))
        given[-1].set_data_from_numpy(array)
    return given


def main():
    """Send all jobs before the first answer is read."""
    http_port, grpc_port, jobs_file, out = sys.argv[1:]
    jobs = json.loads(Path(jobs_file).read_text())
    answers = queue.Queue()
    grpc = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}")
    http = tritonclient.http.InferenceServerClient(
        f"127.0.0.1:{http_port}", concurrency=len(jobs), network_timeout=600.0, connection_timeout=600.0
    )
    waiting, asked = [], 0
    for k, job in enumerate(jobs):
        if job["protocol"] == "grpc":
            given = inputs(tritonclient.grpc, job)
            grpc.async_infer(MODEL, given, lambda result, error, k=k: answers.put((k, result, error)))
            asked += 1
        else:
            waiting.append((k, http.async_infer(MODEL, inputs(tritonclient.http, job))))
    pictures, errors = {}, {}
    for k, request in waiting:
        try:
            pictures[str(k)] = request.get_result().as_numpy("picture")[0]
        except tritonclient.utils.InferenceServerException as error:
            errors[k] = error.message()
    for _ in range(asked):
        k, result, error = answers.get(timeout=600)
        if error is None:
            pictures[str(k)] = result.as_numpy("picture")[0]
        else:
            errors[k] = error.message()
    np.savez(out, **pictures)
    print(json.dumps({"errors": errors}))


if __name__ == "__main__":
    main()
