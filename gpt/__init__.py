"""A GPT on minitensor: text, tokens, model, training loop, checkpoints and sampling."""
