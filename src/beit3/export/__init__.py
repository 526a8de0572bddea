"""Networks as torch.export programs and ONNX files, checked against eager, and run again."""
