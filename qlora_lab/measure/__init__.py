"""The measure room: how good a model, a codebook or a low rank is. perplexity, held_out, sweep, sensitivity."""
