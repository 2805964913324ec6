"""Export to other runtimes: GGUF files, checkpoints, folders of ONNX models. Formats that Lissom itself loads are in
`artifacts`."""
