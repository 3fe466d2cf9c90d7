"""FLOPs, their ledger, peak rates."""
