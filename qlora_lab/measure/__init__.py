"""The measure room: what a model is worth. perplexity, held_out (loss and answers on held-out data), rouge."""
