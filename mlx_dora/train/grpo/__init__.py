"""GRPO: groups of sampled completions, their rewards, advantages and loss."""
