"""Sentence Transformers with a compiled model in place of its transformer: similarity of sentences."""

import torch
from sentence_transformers import SentenceTransformer

import lissom
from lissom.frontends.huggingface import find_directory

SENTENCES = ["How do I reset my password?", "I cannot get into my account.", "Whisk the eggs, then season them."]

encoder = SentenceTransformer(str(find_directory("minilm")), device="cpu")  # or your own directory or name
original = encoder.encode(SENTENCES, convert_to_tensor=True)

example = encoder.tokenizer(SENTENCES, padding=True, return_tensors="pt")
encoder[0].model = lissom.compile(encoder[0].model, example)
found = encoder.encode(SENTENCES, convert_to_tensor=True)

print(encoder.similarity(found, found))
torch.testing.assert_close(found, original, rtol=1e-4, atol=1e-4)
print("equal to the original model's embeddings")
