"""Folders of OpenVINO's IR: models without state, and decoders with a KV cache, which openvino-genai generates with."""
