"""One optimizer step on any number of ranks: DeepSpeed, or plain PyTorch on one device. Imports optim and the folders
below it."""
