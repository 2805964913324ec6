"""Small classifiers of texts with random weights and the tokenizer of MiniLM."""

from __future__ import annotations

from collections.abc import Sequence

import transformers

from lissom.frontends.models.huggingface import find_directory
from tests.support.models import seeded

TEXTS = ["Whisk the eggs, then season them.", "The orbit of the comet takes it past Jupiter."]


def minilm_tokenizer() -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(find_directory("minilm"))


def text_classifier(
    tokenizer: transformers.PreTrainedTokenizerBase, labels: Sequence[str], layers: int
) -> transformers.BertForSequenceClassification:
    """A BERT that takes the tokens of this tokenizer."""
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, id2label=dict(enumerate(labels)),
    )  # fmt: skip
    return seeded(lambda: transformers.BertForSequenceClassification(config))
