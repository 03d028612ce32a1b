"""TensorRT-RTX: an engine a phase, built from its ONNX model on any machine."""
