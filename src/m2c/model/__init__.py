"""What to compute: configs, checkpoints, the forward pass, scores. No bytes of tiers."""
