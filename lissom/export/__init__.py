"""Export to other runtimes: GGUF files, checkpoints, folders of ONNX models or OpenVINO's IR. Formats that Lissom itself loads
are in `artifacts`."""
