"""``manylora train`` trains, evaluates and publishes an adapter. ``adapters.training`` does the training."""
