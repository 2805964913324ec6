"""Models by name or directory, with example inputs: Hugging Face, timm, torchvision, adapters. No program is here."""
