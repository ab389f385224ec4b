"""What a query may see."""

import torch


def causal_mask(queries: range, keys: range, offset: int, device: torch.device) -> torch.Tensor:
    """Boolean [len(queries), len(keys)], True where the query may see the key: key <= query + offset.

    offset = seq_k - seq_q aligns the last query with the last key, so that a few new queries see all the keys before them.
    """
    query = torch.arange(queries.start, queries.stop, device=device)
    key = torch.arange(keys.start, keys.stop, device=device)
    return key <= query[:, None] + offset
