"""Models to test with, in plain PyTorch as their authors would write them."""
