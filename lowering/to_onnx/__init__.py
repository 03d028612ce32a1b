"""ONNX: models on disk, and their run in ONNX Runtime."""
