"""The cross-entropy that sees a part of the logits at a time, against PyTorch's of all of them in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model.loss
from model.loss import linear_cross_entropy

IGNORED = -100
TOKENS, HIDDEN, VOCABULARY = 37, 16, 50


def tensors(dtype=torch.float32, device="cpu", tokens=TOKENS, vocabulary=VOCABULARY):
    generator = torch.Generator(device).manual_seed(torch.seed() % 2**31)
    x, weight = (torch.randn(n, HIDDEN, generator=generator, device=device).to(dtype).requires_grad_() for n in (tokens, vocabulary))
    labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    labels[::5] = IGNORED
    return x, weight, labels


def of_all_logits(x, weight, labels):
    return F.cross_entropy(x @ weight.T, labels, ignore_index=IGNORED, reduction="sum")


def check(x, weight, labels, tolerance):
    """Loss and both gradients, of three times the loss, against float64."""
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = of_all_logits(*exact, labels)
    loss = linear_cross_entropy(x, weight, labels, IGNORED)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=tolerance)
    gradients = torch.autograd.grad(3 * loss, (x, weight))
    for gradient, wanted, tensor in zip(gradients, torch.autograd.grad(3 * expected, exact), (x, weight)):
        assert gradient.dtype == tensor.dtype
        assert (gradient - wanted).norm() <= tolerance * wanted.norm()


@pytest.fixture(params=[1, 7 * VOCABULARY, 2**28], ids=["a token", "seven tokens", "all"])
def at_once(request, monkeypatch):
    monkeypatch.setattr(model.loss, "LOGITS_AT_ONCE", request.param)
    return request.param


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_loss_and_gradients(at_once, dtype, tolerance):
    check(*tensors(dtype), tolerance)


def test_nothing_counts(at_once):
    x, weight, labels = tensors()
    loss = linear_cross_entropy(x, weight, labels.fill_(IGNORED), IGNORED)
    assert loss.item() == 0 and all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (x, weight)))


def test_one_gradient_alone_and_none(at_once):
    x, weight, labels = tensors()
    both = torch.autograd.grad(linear_cross_entropy(x, weight, labels, IGNORED), (x, weight))
    for alone, wanted in zip((x, weight), both):
        given = [t if t is alone else t.detach() for t in (x, weight)]
        assert torch.equal(torch.autograd.grad(linear_cross_entropy(*given, labels, IGNORED), alone)[0], wanted)
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, labels, IGNORED).item() == pytest.approx(of_all_logits(x, weight, labels).item(), rel=1e-6)


def test_extreme_logits_neither_overflow_nor_lose_the_loss():
    x, weight, labels = tensors()
    with torch.no_grad():  # multiples of 8192 that float32 holds exactly: between two logits of 40,000 that all but tie, rounding would decide
        x.round_().mul_(2**13)
        weight.mul_(4).round_()
    check(x, weight, labels, 1e-5)


def test_a_sequence_of_a_million_tokens(monkeypatch):
    """In 123 parts, as those of 50,304 words are: their sums in float32 lose nothing that counts."""
    monkeypatch.setattr(model.loss, "LOGITS_AT_ONCE", 8 * 8192)
    check(*tensors(tokens=1_000_000, vocabulary=8), 1e-6)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns, and how many operations were products of matrices."""

    elements = products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += function is torch.ops.aten.mm.default
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_all_logits_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(model.loss, "LOGITS_AT_ONCE", 4 * VOCABULARY)
    x, weight, labels = tensors(tokens=400)
    with Largest() as largest:
        linear_cross_entropy(x, weight, labels, IGNORED).backward()
    assert max(x.numel(), weight.numel()) <= largest.elements < 400 * VOCABULARY / 2


@pytest.mark.parametrize("enabled, products", [(True, 3), (False, 1)])
def test_where_no_gradient_is_asked_for_the_logits_are_the_only_product(enabled, products):
    with Largest() as seen, torch.set_grad_enabled(enabled):
        loss = linear_cross_entropy(*tensors(), IGNORED)
    assert seen.products == products and loss.requires_grad is enabled


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-4)])
def test_on_a_gpu(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(model.loss, "LOGITS_AT_ONCE", 2**22)
    check(*tensors(dtype, "cuda", tokens=1000, vocabulary=50257), tolerance)
