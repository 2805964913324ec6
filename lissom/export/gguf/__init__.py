"""GGUF files of optimized decoders, which llama.cpp runs. Only what describes or writes these files is here."""
