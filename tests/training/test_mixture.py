import hashlib
import json

import numpy as np
import pytest
import torch

from training.batches import TrainingBatches
from training.corpus import CorpusError, write_corpus
from training.data_order import SHARES
from training.evaluation import mixed
from training.mixture import Mixture
from training.tokenizers import ByteTokenizer, load_tokenizer


def make(folder, letter, documents, **changes):
    """A corpus whose documents are made of one letter."""
    arguments = dict(tokenizer=load_tokenizer("bytes"), splits={"train": [letter * 15] * documents, "validation": [letter * 40]}, provenance={})
    return write_corpus(folder, **(arguments | changes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    for letter, documents in (("a", 50), ("b", 5), ("c", 200)):
        make(folder / f"all-{letter}", letter, documents)
    return {letter: str(folder / f"all-{letter}") for letter in "abc"}


def test_one_corpus_is_a_mixture_of_itself(folders):
    mixture = Mixture.open({folders["a"]: 0.3})
    assert mixture.sha256 == mixture.corpora[0].sha256 and mixture.shares == [SHARES]


def test_the_hash_names_contents_and_shares(folders, tmp_path):
    weights = {folders["a"]: 0.3, folders["b"]: 0.1, folders["c"]: 0.6}
    mixture = Mixture.open(weights)
    assert Mixture.open(dict(reversed(weights.items()))).sha256 == mixture.sha256
    assert Mixture.open({folder: 10 * weight for folder, weight in weights.items()}).sha256 == mixture.sha256
    assert Mixture.open(weights | {folders["a"]: 0.31}).sha256 != mixture.sha256
    assert Mixture.open({folders["a"]: 1, folders["b"]: 1}).sha256 != Mixture.open({folders["a"]: 1, folders["c"]: 1}).sha256
    moved = str(make(tmp_path / "moved", "a", 50).folder)
    assert Mixture.open({moved: 0.3} | {folders[letter]: weights[folders[letter]] for letter in "bc"}).sha256 == mixture.sha256
    content = [[corpus.sha256, share] for corpus, share in zip(mixture.corpora, mixture.shares, strict=True)]
    assert mixture.sha256 == hashlib.sha256(json.dumps(content).encode()).hexdigest()


@pytest.mark.parametrize("weights, shares", [((0.7, 0.1, 0.2), (7000, 1000, 2000)), ((1, 1, 1), (3333, 3333, 3334)), ((1e-4, 0.5, 0.4999), (1, 5000, 4999))])
def test_shares_are_the_weights_as_written_and_add_up(folders, weights, shares):
    mixture = Mixture.open(dict(zip(folders.values(), weights, strict=True)))
    by_name = dict(zip(mixture.names, mixture.shares, strict=True))
    assert sorted(by_name.values()) == sorted(shares) and sum(mixture.shares) == SHARES
    if len(set(weights)) > 1:
        assert tuple(by_name[f"all-{letter}"] for letter in "abc") == shares


def test_batches_hold_each_corpus_in_its_share(folders):
    mixture = Mixture.open({folders["a"]: 0.2, folders["b"]: 0.5, folders["c"]: 0.3})
    def read(steps, *, rank=0, world=1):
        batches = TrainingBatches([corpus.split("train") for corpus in mixture.corpora], shares=mixture.shares, sequence_length=8, seed=1, rank=rank,
                                  world=world, micro_batch_size=10 // world, accumulation=2, device=torch.device("cpu"))
        found = [torch.cat([torch.cat([tokens, labels[:, -1:]], dim=1) for tokens, labels in batches.step(step)]) for step in steps]
        batches.close()
        return found

    windows = torch.cat(read(range(SHARES // 20)))
    letters = [int(row[row != 256].mode().values) for row in windows]
    assert [letters.count(ord(letter)) for letter in "abc"] == [2000, 5000, 3000]
    np.testing.assert_array_equal(read([7])[0], torch.cat([read([7], rank=rank, world=2)[0] for rank in (0, 1)]))  # 7 alone, on two ranks


def test_processes_that_share_sequences_read_the_same_and_have_the_labels_of_their_part(folders):
    mixture = Mixture.open({folders["a"]: 0.2, folders["b"]: 0.5, folders["c"]: 0.3})
    splits = [corpus.split("train") for corpus in mixture.corpora]

    def read(rank: int, world: int, sharing: int) -> tuple[torch.Tensor, torch.Tensor]:
        batches = TrainingBatches(splits, shares=mixture.shares, sequence_length=8, seed=1, rank=rank, world=world, micro_batch_size=4,
                                  accumulation=1, device=torch.device("cpu"), sharing=sharing)
        ((tokens, labels),) = batches.step(7)
        batches.close()
        return tokens, labels

    for reader in (0, 1):
        tokens, labels = read(reader, 2, 1)
        shared = [read(2 * reader + part, 4, 2) for part in (0, 1)]
        assert all(torch.equal(each, tokens) for each, _ in shared)
        assert torch.equal(torch.cat([part for _, part in shared], dim=1), labels)


def test_epochs_are_told(folders):
    mixture = Mixture.open({folders["a"]: 0.5, folders["b"]: 0.5})
    facts = {each.name: each for each in mixture.facts(sequence_length=8, run_samples=1000)}
    assert facts["all-a"].samples == (50 * 16 - 1) // 8 == 99 and facts["all-a"].epochs == pytest.approx(500 / 99)
    assert facts["all-b"].epochs == pytest.approx(500 / 9) and facts["all-b"].share == 0.5 and facts["all-b"].training_tokens == 80


def test_corpora_that_do_not_belong_together_are_refused(folders, tmp_path):
    class Other(ByteTokenizer):
        name = "other"
        sha256 = "0" * 64

    strange = str(make(tmp_path / "strange", "x", 3, tokenizer=Other()).folder)
    with pytest.raises(CorpusError, match="data.mixture: .* holds tokens of '.*', .* of '.*'; prepare both with one tokenizer"):
        Mixture.open({folders["a"]: 1, strange: 1})
    same = str(make(tmp_path / "same", "a", 50).folder)
    with pytest.raises(CorpusError, match="are the same corpus; name it once"):
        Mixture.open({folders["a"]: 1, same: 1})
    namesake = str(make(tmp_path / "all-a", "y", 3).folder)
    with pytest.raises(CorpusError, match="two folders are called all-a"):
        Mixture.open({folders["a"]: 1, namesake: 1})
    with pytest.raises(CorpusError, match="the weight of .*all-b is less than 1/10000 of them all"):
        Mixture.open({folders["a"]: 1, folders["b"]: 1e-5})


def test_what_is_wrong_with_one_corpus_is_told(folders, tmp_path):
    mixture = Mixture.open({folders["a"]: 1, folders["b"]: 1})
    with pytest.raises(CorpusError, match="all-a: the validation split has 41 tokens"):
        mixture.check_fits(model_vocab_size=257, sequence_length=48)
    damaged = make(tmp_path / "damaged", "d", 3)
    (damaged.folder / "train_00000.bin").write_bytes(b"\x01" * 96)
    with pytest.raises(CorpusError, match="damaged/train_00000.bin: altered"):
        Mixture.open({folders["a"]: 1, str(damaged.folder): 1}).verify()


def test_validation_of_a_mixture_weighs_corpora_by_their_shares():
    results = {"a": {"val_loss": 2.0, "val_perplexity": 0.0, "val_bits_per_byte": 1.0}, "b": {"val_loss": 4.0, "val_perplexity": 0.0, "val_bits_per_byte": 1.5}}
    assert mixed({"a": results["a"]}, [SHARES]) == results["a"]
    found = mixed(results, [2500, 7500])
    assert found["val_loss"] == 3.5 and found["val_perplexity"] == pytest.approx(np.exp(3.5))
    # In 4 tokens, one of a and three of b: 14 nats, and as many bytes as each corpus has in a token.
    nats, text_bytes = 14 / np.log(2), 2 / np.log(2) / 1.0 + 3 * 4 / np.log(2) / 1.5
    assert found["val_bits_per_byte"] == pytest.approx(nats / text_bytes)
    assert found["val_loss/a"] == 2.0 and found["val_loss/b"] == 4.0
