"""A text-classification pipeline on a compiled model: all-MiniLM-L6-v2 with a head fitted to eight sentences; saved, loaded."""

import tempfile

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import lissom
from lissom.frontends.models.huggingface import find_directory

SENTENCES = {
    "cooking": [
        "Whisk the eggs, then season them.",
        "The recipe needs a pinch of salt.",
        "Bake the bread until it is brown.",
        "Chop the onions and fry them in butter.",
    ],
    "astronomy": [
        "The orbit of the comet takes it past Jupiter.",
        "The telescope found a planet of another star.",
        "A moon of Saturn has an ocean under its ice.",
        "Galaxies drift apart as the universe grows.",
    ],
}

checkpoint = find_directory("minilm")  # or your own directory or name, with or without a classification head
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForSequenceClassification.from_pretrained(checkpoint, id2label=dict(enumerate(SENTENCES)))

inputs = tokenizer([text for texts in SENTENCES.values() for text in texts], padding=True, return_tensors="pt")
labels = torch.arange(len(SENTENCES)).repeat_interleave(4)
optimizer = torch.optim.Adam(model.classifier.parameters(), lr=0.05)
model.eval()
for _ in range(20):
    optimizer.zero_grad()
    model(**inputs, labels=labels).loss.backward()
    optimizer.step()

compiled = lissom.compile(model, inputs)
with tempfile.TemporaryDirectory() as folder:
    compiled.save(f"{folder}/classifier")
    loaded = lissom.load(f"{folder}/classifier")  # the label names are saved with it

classify = pipeline("text-classification", model=loaded, tokenizer=tokenizer, device="cpu")
for text in ["Stir the soup and add some pepper.", "The rocket left for Mars last night."]:
    print(f"{classify(text)[0]['label']}: {text}")
