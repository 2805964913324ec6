"""A model of Sentence Transformers compiled whole, saved, and loaded by Sentence Transformers."""

import tempfile

import torch
from sentence_transformers import SentenceTransformer

import lissom
from lissom.frontends.models.huggingface import find_directory

SENTENCES = ["How do I reset my password?", "I cannot get into my account.", "Whisk the eggs, then season them."]

encoder = SentenceTransformer(str(find_directory("minilm")), device="cpu")  # or your own directory or name
original = encoder.encode(SENTENCES, convert_to_tensor=True)

fast = lissom.compile(encoder)  # transformer, pooling and normalization in one program
with tempfile.TemporaryDirectory() as folder:
    fast.save(folder)
    fast = SentenceTransformer(folder, device="cpu")
embeddings = fast.encode(SENTENCES, convert_to_tensor=True)

print(fast.similarity(embeddings, embeddings))
torch.testing.assert_close(embeddings, original, rtol=1e-4, atol=1e-4)
print("equal to the original model's embeddings")
