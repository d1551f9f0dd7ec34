"""The generated stubs alone, as a robot in any language uses them: a DROID observation with PNG pictures.

python examples/generated_stubs.py HOST:PORT
"""

import io
import sys

import grpc
import numpy as np
from openpi_flash.v1 import inference_pb2, policy_pb2_grpc, types_pb2
from PIL import Image


def main(address: str) -> None:
    request = inference_pb2.InferRequest(seed=7)
    request.observation.prompt = "pick up the red cup"
    for name in ("observation/exterior_image_1_left", "observation/wrist_image_left"):
        png = io.BytesIO()
        Image.new("RGB", (224, 224), (120, 90, 60)).save(png, "PNG")
        image = request.observation.images[name]
        image.encoding, image.height, image.width = types_pb2.IMAGE_ENCODING_PNG, 224, 224
        image.data = png.getvalue()
    for name, values in (("observation/joint_position", np.zeros(7)), ("observation/gripper_position", np.zeros(1))):
        tensor = request.observation.tensors[name]
        tensor.dtype, tensor.data = types_pb2.DTYPE_FLOAT64, values.tobytes()
        tensor.shape.extend(values.shape)
    with grpc.insecure_channel(address) as channel:
        response = policy_pb2_grpc.PolicyServiceStub(channel).Infer(request, timeout=10)
    actions = response.tensors["actions"]
    print(np.frombuffer(actions.data, "<f8").reshape(tuple(actions.shape)))
    print(f"model {response.timing.model_ms:.1f} ms of {response.timing.total_ms:.1f} ms in the action service")


if __name__ == "__main__":
    main(sys.argv[1])
