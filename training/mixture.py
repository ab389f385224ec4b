"""The corpora a run reads, one or a weighted mixture, as one: their shares, their hash, and what they must have in common."""

import hashlib
import json
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from training.corpus import Corpus, CorpusError
from training.data_order import SHARES
from training.tokenizers import Tokenizer


@dataclass(frozen=True)
class MixtureFacts:
    """What a run takes from one corpus: `epochs` is how often it reads the training split over all its steps."""

    name: str
    folder: str
    corpus_sha256: str
    share: float
    training_tokens: int
    samples: int
    epochs: float


class Mixture:
    """Corpora in the order of their hashes, so that neither folders nor the order in the YAML decide what a step reads.

    `shares`: how many of SHARES samples each gives, at least one.
    """

    def __init__(self, corpora: list[Corpus], weights: list[float]):
        order = sorted(range(len(corpora)), key=lambda i: corpora[i].sha256)
        self.corpora = [corpora[i] for i in order]
        self.names = [corpus.folder.resolve().name for corpus in self.corpora]
        _refuse_strangers(self.corpora, self.names)
        self.shares = _apportion([weights[i] for i in order], self.corpora)
        self.tokenizer_name = self.corpora[0].tokenizer_name
        content = json.dumps([[corpus.sha256, share] for corpus, share in zip(self.corpora, self.shares, strict=True)])
        self.sha256 = self.corpora[0].sha256 if len(corpora) == 1 else hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def open(cls, weights: dict[str, float]) -> "Mixture":
        """The corpora in these folders. Raises CorpusError if one is missing or damaged, or they do not belong together."""
        return cls([Corpus.open(folder) for folder in weights], list(weights.values()))

    def check_fits(self, *, model_vocab_size: int, sequence_length: int) -> None:
        for corpus in self.corpora:
            corpus.check_fits(model_vocab_size=model_vocab_size, sequence_length=sequence_length)

    def verify(self) -> None:
        for corpus in self.corpora:
            corpus.verify()

    def load_tokenizer(self) -> Tokenizer:
        return self.corpora[0].load_tokenizer()

    @property
    def token_bytes(self) -> np.ndarray:
        """See Corpus.token_bytes; the same for all."""
        return self.corpora[0].token_bytes

    def facts(self, *, sequence_length: int, run_samples: int) -> list[MixtureFacts]:
        """`run_samples`: sequences that the run reads, of `sequence_length` each."""
        found = []
        for name, corpus, share in zip(self.names, self.corpora, self.shares, strict=True):
            split = corpus.split("train")
            samples = split.samples(sequence_length)
            found.append(MixtureFacts(name, str(corpus.folder), corpus.sha256, share / SHARES, split.tokens, samples,
                                      run_samples * share / SHARES / samples))
        return found


def _refuse_strangers(corpora: list[Corpus], names: list[str]) -> None:
    first = corpora[0]
    for number, (corpus, name) in enumerate(zip(corpora, names, strict=True)):
        if corpus.tokenizer_sha256 != first.tokenizer_sha256:
            raise CorpusError(f"data.mixture: {first.folder} holds tokens of {first.tokenizer_name!r}, {corpus.folder} of {corpus.tokenizer_name!r}"
                              f"{' in another version' * (corpus.tokenizer_name == first.tokenizer_name)}; prepare both with one tokenizer")
        if corpus.sha256 in (other.sha256 for other in corpora[:number]):
            raise CorpusError(f"data.mixture: {corpora[number - 1].folder} and {corpus.folder} are the same corpus; name it once")
        if name in names[:number]:
            raise CorpusError(f"data.mixture: two folders are called {name}, and their losses would be too; rename one")


def _apportion(weights: list[float], corpora: list[Corpus]) -> list[int]:
    """Whole shares of SHARES in proportion to the weights, by largest remainder. Raises CorpusError where one would get none."""
    exact = [Fraction(str(weight)) for weight in weights]  # as written: 0.1 is a tenth
    quotas = [weight * SHARES / sum(exact) for weight in exact]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (shares[i] - quotas[i], i))
    for i in by_remainder[: SHARES - sum(shares)]:
        shares[i] += 1
    for share, corpus in zip(shares, corpora, strict=True):
        if not share:
            raise CorpusError(f"data.mixture: the weight of {corpus.folder} is less than 1/{SHARES} of them all, and mixtures are made of {SHARES} "
                              "parts; raise it, or leave the corpus out")
    return shares
