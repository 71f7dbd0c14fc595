"""Models that the tests split: plain single-GPU PyTorch, as their authors would write them."""
