"""Training: the corpus and its tokenizer, the losses, the loop."""
