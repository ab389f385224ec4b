"""Cross-entropy of a linear layer's logits, which never exist all at once."""

from functools import cache

import torch

LOGITS_AT_ONCE = 2**29  # 1 GiB in bf16; each part of them reads and writes the whole gradient of the weight in float32


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignored: int) -> torch.Tensor:
    """The summed cross-entropy in nats, a float32 scalar, of the logits x @ weight.T, without those whose label is ``ignored``.

    ``tokens_at_once`` at a time, and at once their gradients, which need the very same logits: the backward pass only scales them.
    Where no gradient is asked for, as in evaluation, there is no product but the logits'.

    Args:
        x: [tokens, hidden].
        weight: [vocabulary, hidden], of x's dtype.
        labels: int64 [tokens].
    """
    # Asked here: inside the function gradients are always off, and under no_grad it would still be told that its inputs need them.
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(x, weight, labels, ignored, gradients)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, ignored, gradients):
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        if not gradients:
            for some, their_labels in _parts(x, weight, labels):
                # The kernel of training: a second one would have to be compiled, and eager steps hold five times the logits.
                loss += _loss_and_gradient(x.device.type)(some @ weight.T, their_labels, ignored)[0]
            return loss
        gradient_of_x, gradient_of_weight = [], torch.zeros_like(weight, dtype=torch.float32)
        for some, their_labels in _parts(x, weight, labels):
            part_of_loss, gradient = _loss_and_gradient(x.device.type)(some @ weight.T, their_labels, ignored)
            loss += part_of_loss
            gradient_of_x.append(gradient @ weight)
            gradient_of_weight += _product_in_float32(gradient.T, some)
        ctx.save_for_backward(torch.cat(gradient_of_x), gradient_of_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        of_x, of_weight = ctx.saved_tensors
        return (of_x * scale).to(of_x.dtype), (of_weight * scale).to(ctx.dtype), None, None, None


def tokens_at_once(vocabulary: int) -> int:
    """How many have at most ``LOGITS_AT_ONCE`` logits; a power of two, so that the parts of a batch are alike, and their kernels compiled once."""
    return 1 << max(1, LOGITS_AT_ONCE // vocabulary).bit_length() - 1


def _parts(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor):
    tokens = tokens_at_once(len(weight))
    return zip(x.split(tokens), labels.split(tokens), strict=True)


def _eager_loss_and_gradient(logits: torch.Tensor, labels: torch.Tensor, ignored: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed loss, its gradient, of logits' dtype: softmax less one at the label, 0 where the label does not count)."""
    counts = labels != ignored
    log_p = logits.float().log_softmax(-1)
    of_labels = log_p.gather(1, labels.where(counts, 0)[:, None])[:, 0]
    at_label = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    gradient = (log_p.exp() - at_label.float()).where(counts[:, None], 0.0).to(logits.dtype)
    return -of_labels.where(counts, 0.0).sum(), gradient


@cache
def _loss_and_gradient(device: str):
    """On a GPU one kernel for each pass over the logits, in place of ten."""
    return torch.compile(_eager_loss_and_gradient) if device == "cuda" else _eager_loss_and_gradient


def _product_in_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, added up and returned in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else a.float() @ b.float()
