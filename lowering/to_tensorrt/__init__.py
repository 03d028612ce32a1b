"""TensorRT: a bundle of ONNX models with plugin nodes, the plugins' PTX, and what builds engines of them."""
