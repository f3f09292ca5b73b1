"""A head's partial products become logits, -inf beyond each row's own vocabulary. On devices only: see `device`."""
