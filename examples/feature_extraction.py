"""A feature-extraction pipeline of transformers on a compiled model."""

import torch
from transformers import AutoModel, AutoTokenizer, pipeline

import lissom
from lissom.frontends.models.huggingface import find_directory

checkpoint = find_directory("minilm")  # or your own directory or name
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModel.from_pretrained(checkpoint).eval()

# Batch and sequence are found to be dynamic; any output of the tokenizer will do as an example.
example = tokenizer(["One sentence.", "And another, somewhat longer."], padding=True, return_tensors="pt")
compiled = lissom.compile(model, example)

text = "The orbit of the comet takes it past Jupiter."
features = pipeline("feature-extraction", model=compiled, tokenizer=tokenizer, device="cpu")(text, return_tensors=True)
original = pipeline("feature-extraction", model=model, tokenizer=tokenizer, device="cpu")(text, return_tensors=True)

print(f"features of {features.shape[1]} tokens, {features.shape[2]} numbers each")
torch.testing.assert_close(features, original, rtol=1e-4, atol=1e-4)
print("equal to those of the original model")
