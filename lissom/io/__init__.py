"""Files and processes: atomic writes, checked JSON, single tensors of safetensors files, Python processes.
Nothing here knows a program."""
