"""Small tokenizers of every kind, trained on a few sentences, with templates and padding."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "A vocabulary has rows; the rows of rare tokens are rarely read, and they are many.",
    "Быстрая коричневая лиса прыгает через ленивую собаку, и собака спит.",
    "Η γρήγορη αλεπού πηδάει πάνω από το σκυλί.",
    "日本語の文章も少しあります。 数字: 0123456789, e.g. 3.14 and 2,71!",
) * 3
_SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]


def _finished(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a template, padding, and added tokens, one of which is not special."""
    first, last = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", first), ("</s>", last)]
    )
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<pad>"), pad_token="<pad>")
    tokenizer.add_special_tokens(["<extra>"])
    tokenizer.add_tokens([AddedToken("foxy", normalized=False), AddedToken("unseen")])
    return tokenizer


def _byte_level(ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """As converted from SentencePiece: characters and bytes, and every split of a token is a merge."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=240, special_tokens=_SPECIAL, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    words = [token for token in tokens if token not in _SPECIAL]
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    ids = {token: index for index, token in enumerate(tokens)}
    pairs = [(word[:at], word[at:]) for word in words for at in range(1, len(word))]
    merges = sorted((pair for pair in pairs if pair[0] in ids and pair[1] in ids), key=lambda pair: ids["".join(pair)])
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(_SPECIAL)
    return tokenizer


def _words() -> Tokenizer:
    """A BPE whose words end in a suffix."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=_SPECIAL, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _unigram(byte_fallback: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=200, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False)
    )
    if not byte_fallback:
        return tokenizer
    data = json.loads(tokenizer.to_str())
    pieces = [*data["model"]["vocab"], *([f"<0x{byte:02X}>", -20.0] for byte in range(256))]
    data["model"] |= {"vocab": pieces, "byte_fallback": True}
    data["decoder"] = json.loads(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]).__getstate__())
    return Tokenizer.from_str(json.dumps(data))


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=260, special_tokens=_SPECIAL, show_progress=False)
    )
    return tokenizer


KINDS: dict[str, Any] = {
    "byte-level": _byte_level,
    "byte-level-whole-words": lambda: _byte_level(ignore_merges=True),
    "byte-fallback": _byte_fallback,
    "words": _words,
    "unigram": _unigram,
    "unigram-bytes": lambda: _unigram(byte_fallback=True),
    "word-piece": _word_piece,
}


@cache
def tokenizer(kind: str) -> Tokenizer:
    """A tokenizer of KINDS, trained once a session."""
    return _finished(KINDS[kind]())
