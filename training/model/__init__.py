"""The U-Net and its layers, LoRA adapters, and losses on the features of a frozen encoder. Imports config and text."""
