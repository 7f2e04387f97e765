"""A tiny LTX-2 that draws: its clips and captions, the program that recognises them, and its training."""
