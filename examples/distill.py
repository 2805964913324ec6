"""Three of MiniLM's six layers removed, and what a few steps of distillation win back; then a training loop of one's own."""

from pathlib import Path

import torch

import lissom
from lissom.frontends.models.huggingface import load

checkpoint = load("minilm")
lines = Path(__file__).read_text(encoding="utf-8").splitlines()  # any text of your own; thousands of sentences in earnest
sentences = [line.strip() for line in lines if line.strip()]
data = [checkpoint.encode(sentences[at : at + 8]) for at in range(0, len(sentences), 8)]

# As a pass: the original is the teacher, a tenth of the data decides which weights stay.
passes = "prune-layers{keep=0.5},distill{steps=40}"
small = lissom.optimize(checkpoint.model, checkpoint.example_inputs, passes=passes, data=data)
step = small.report.history.steps[-1]
print(next(note for note in step.notes if " steps in " in note).partition(";")[2].strip())

# By hand: an ordinary module, whose weights go back into the program.
module = small.program.trainable()
optimizer = torch.optim.AdamW(module.parameters(), lr=2e-5)
for batch in data[:5]:
    with torch.no_grad():
        wanted = checkpoint.model(**batch).last_hidden_state
    loss = torch.nn.functional.mse_loss(module(**batch).last_hidden_state, wanted)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
compiled = lissom.compile(small.program.with_weights(module), checkpoint.example_inputs)
print(f"{type(compiled.config).__name__}, {compiled.program.parameter_count / 1e6:.1f} million weights")
