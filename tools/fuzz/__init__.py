"""Random transformers compiled with random pipelines, each judged by an oracle that does not use Lissom's verifier.

`python -m tools.fuzz --count 1000` runs a campaign. A case is a number, which determines the model, the pipeline, the backend
and the inputs, equal on every machine.
"""
