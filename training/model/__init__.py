"""The U-Net and its layers, with LoRA adapters. Imports config."""
