"""The pass `pack-tokens` and its analysis of token flow."""
