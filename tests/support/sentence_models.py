"""Small models of Sentence Transformers with random weights and the tokenizer of MiniLM."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling

from lissom.frontends.models.huggingface import find_directory

TEXTS = ["How do I reset my password?", "Whisk the eggs.", "x", "one two three " * 12]
PAIRS = [("How do I reset my password?", text) for text in TEXTS]


def transformer(kind: type[transformers.PreTrainedModel], task: str = "feature-extraction", **options: int) -> Transformer:
    """A BERT of one layer as a module of Sentence Transformers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = kind(transformers.BertConfig(max_position_embeddings=64, **sizes, **options)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(find_directory("minilm")).save_pretrained(folder)
        return Transformer(folder, transformer_task=task)


def sentence_transformer(mode: str | Sequence[str] = "mean", **options: object) -> SentenceTransformer:
    """Transformer, pooling, a dense layer, normalization."""
    pooling = Pooling(16, mode)
    modules = [transformer(transformers.BertModel), pooling, Dense(pooling.get_embedding_dimension(), 8), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu", **options)


def cross_encoder(labels: int = 1) -> CrossEncoder:
    task = "sequence-classification"
    module = transformer(transformers.BertForSequenceClassification, task, num_labels=labels)
    return CrossEncoder(modules=[module], device="cpu")


def sparse_encoder(strategy: str = "max", activation: str = "relu") -> SparseEncoder:
    modules = [transformer(transformers.BertForMaskedLM, "fill-mask"), SpladePooling(strategy, activation)]
    return SparseEncoder(modules=modules, device="cpu")
