"""Compiled models on disk: a directory of JSON, safetensors and what the backend built; nothing in it is ever unpickled."""
