"""What a plan costs in time and memory, imported as `autoshard.cost_model`."""
